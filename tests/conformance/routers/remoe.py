"""ReMoE, ReLU routing: Wang et al. (2412.14711, section 3.1). The limit max_experts is not in the
paper.
"""

import numpy as np

DEFAULTS = dict(max_experts=0)

CASES = [
    dict(num_experts=8, fields={}, train=True, bias=False),
    dict(num_experts=8, fields=dict(max_experts=2), train=True, bias=False),
    dict(num_experts=8, fields=dict(k=1, max_experts=1), train=False, bias=False),
]


def route(x, params, case, given):
    limit = (DEFAULTS | case["fields"])["max_experts"]
    w = np.maximum(x @ params["kernel"], 0.0)
    chosen = np.zeros(w.shape, bool)
    for t in np.flatnonzero(given.mask):
        order = np.argsort(-w[t], kind="stable")
        if limit > 0:
            order = order[:limit]
        chosen[t, order] = w[t, order] > 0
    return chosen, np.where(chosen, w, 0.0)


def example():
    kernel = np.array([[1.0, -1.0, 0.5, 2.0], [-1.0, -2.0, 0.0, -1.0], [-1.0, 3.0, -1.0, 0.0]])
    # token 0: 1, .5 and 2 are above 0, the two largest are kept
    # token 1: none is above 0;  token 2: one
    return dict(
        x=np.eye(3),
        params=dict(kernel=kernel),
        case=dict(num_experts=4, fields=dict(max_experts=2), train=True, bias=False),
        given=dict(mask=np.array([True, True, True])),
        chosen=np.array([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]], bool),
        weight=np.array([[1.0, 0, 0, 2.0], [0, 0, 0, 0], [0, 3.0, 0, 0]]),
    )
