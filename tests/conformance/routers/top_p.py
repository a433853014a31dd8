"""Top-p (dynamic) routing: Huang et al. (2403.07652, section 2): the fewest experts whose
probabilities reach the threshold, weighted by these probabilities. max_experts and renormalise are
not in the paper.
"""

import numpy as np
from scipy.special import softmax

DEFAULTS = dict(threshold=0.4, max_experts=0, renormalise=False)

CASES = [
    dict(num_experts=8, fields={}, train=True, bias=False),
    dict(num_experts=8, fields=dict(threshold=0.8, renormalise=True), train=True, bias=False),
    dict(num_experts=8, fields=dict(threshold=0.9, max_experts=2), train=False, bias=False),
    dict(num_experts=8, fields=dict(threshold=0.01, renormalise=True), train=True, bias=False),
]


def route(x, params, case, given):
    fields = DEFAULTS | case["fields"]
    z = x @ params["kernel"]
    chosen = np.zeros(z.shape, bool)
    weight = np.zeros(z.shape)
    for t in np.flatnonzero(given.mask):
        p = softmax(z[t])
        selected = []
        for e in np.argsort(-p, kind="stable"):
            selected.append(e)
            if p[selected].sum() >= fields["threshold"] or len(selected) == fields["max_experts"]:
                break
        w = p[selected]
        if fields["renormalise"] and len(selected) > 1:
            w = w / w.sum()
        chosen[t, selected] = True
        weight[t, selected] = w
    return chosen, weight


def example():
    kernel = np.log([[5.0, 3.0, 1.0, 1.0], [1.0, 1.0, 7.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    # token 0: .5 < .6, .5 + .3 >= .6: two, weights .5 and .3 over .8
    # token 1: .7 >= .6: one, its weight stays .7
    # token 2: .25 each: three would be needed, two are allowed, the lowest; 1/2 each
    return dict(
        x=np.eye(3),
        params=dict(kernel=kernel),
        case=dict(
            num_experts=4,
            fields=dict(threshold=0.6, max_experts=2, renormalise=True),
            train=True,
            bias=False,
        ),
        given=dict(mask=np.array([True, True, True])),
        chosen=np.array([[1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0]], bool),
        weight=np.array([[5 / 8, 3 / 8, 0, 0], [0, 0, 0.7, 0], [0.5, 0.5, 0, 0]]),
    )
