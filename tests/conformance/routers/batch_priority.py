"""Batch-prioritised routing: V-MoE (2106.05974, section 4).

The priority only orders the tokens for the experts' capacity. Nothing is dropped here, so this is
top-k.
"""

import numpy as np
from scipy.special import expit, softmax

DEFAULTS = dict(k=2, score="softmax", score_before_selection=True, renormalise=True, scale=1.0)

CASES = [
    dict(num_experts=8, fields={}, train=True, bias=False),
    dict(num_experts=8, fields=dict(k=1), train=False, bias=False),
    dict(
        num_experts=8,
        fields=dict(k=2, score="sigmoid", renormalise=False, scale=2.0),
        train=True,
        bias=True,
    ),
    dict(
        num_experts=8,
        fields=dict(k=3, score_before_selection=False, renormalise=False),
        train=False,
        bias=False,
    ),
    dict(
        num_experts=8,
        fields=dict(k=2, score="sqrt_softplus", score_before_selection=False),
        train=True,
        bias=True,
    ),
]

SCORES = dict(
    softmax=softmax,
    sigmoid=expit,
    sqrt_softplus=lambda z: np.sqrt(np.logaddexp(0.0, z)),
)


def route(x, params, case, given):
    fields = DEFAULTS | case["fields"]
    score = SCORES[fields["score"]]
    k = fields["k"]
    z = x @ params["kernel"]
    bias = 0.0 if given.bias is None else given.bias

    chosen = np.zeros(z.shape, bool)
    weight = np.zeros(z.shape)
    for t in np.flatnonzero(given.mask):
        ranked = score(z[t]) if fields["score_before_selection"] else z[t]
        selected = np.argsort(-(ranked + bias), kind="stable")[:k]
        if fields["score_before_selection"]:
            w = score(z[t])[selected]
        else:
            w = score(z[t, selected])
        if fields["renormalise"] and k > 1:
            w = w / w.sum()
        chosen[t, selected] = True
        weight[t, selected] = w * fields["scale"]
    return chosen, weight


def example():
    kernel = np.log([[5.0, 3.0, 1.0, 1.0], [1.0, 1.0, 4.0, 4.0]])  # token t sees row t
    # softmax of the selected logits alone:
    # token 0: log 5, log 3 -> 5/8 and 3/8
    # token 1: log 4, log 4 -> 1/2 and 1/2
    return dict(
        x=np.eye(2),
        params=dict(kernel=kernel),
        case=dict(
            num_experts=4,
            fields=dict(k=2, score_before_selection=False, renormalise=False),
            train=False,
            bias=False,
        ),
        given=dict(mask=np.array([True, True])),
        chosen=np.array([[1, 1, 0, 0], [0, 0, 1, 1]], bool),
        weight=np.array([[5 / 8, 3 / 8, 0, 0], [0, 0, 1 / 2, 1 / 2]]),
    )
