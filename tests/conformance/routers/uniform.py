"""Uniformly random experts. A bound, from no paper; the tokens' contents play no part."""

import numpy as np

DEFAULTS = dict(k=2)

CASES = [
    dict(num_experts=8, fields={}, train=True, bias=False),
    dict(num_experts=8, fields=dict(k=1), train=False, bias=False),
]


def route(x, params, case, given):
    k = (DEFAULTS | case["fields"])["k"]
    number = given.uniform(case["num_experts"])
    chosen = np.zeros(number.shape, bool)
    for t in np.flatnonzero(given.mask):
        chosen[t, np.argsort(-number[t], kind="stable")[:k]] = True
    return chosen, chosen / k


def example():
    number = np.array([[0.1, 0.9, 0.5], [0.7, 0.2, 0.6], [0.3, 0.2, 0.1]])
    # token 0: .9 and .5;  token 1: .7 and .6;  token 2 is padding
    return dict(
        x=np.zeros((3, 1)),
        params={},
        case=dict(num_experts=3, fields=dict(k=2), train=False, bias=False),
        given=dict(uniform=lambda width: number, mask=np.array([True, True, False])),
        chosen=np.array([[0, 1, 1], [1, 0, 1], [0, 0, 0]], bool),
        weight=np.array([[0, 0.5, 0.5], [0.5, 0, 0.5], [0, 0, 0]]),
    )
