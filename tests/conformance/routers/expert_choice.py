"""Expert choice: Zhou et al. (2202.09368, section 3.2, eq. 1-2). Each expert takes its highest
tokens.

The paper's capacity is k = n * c / e, n being the tokens of the batch, c the mean number of experts per token. It
knows no padding: with some, n are the tokens that are left without it. Rounded up here.
"""

import math

import numpy as np
from scipy.special import softmax

DEFAULTS = dict(k=2)

CASES = [
    dict(num_experts=8, fields={}, train=True, bias=False),
    dict(num_experts=8, fields=dict(k=1), train=False, bias=False),
    dict(num_experts=5, fields=dict(k=2), train=True, bias=False),
    dict(num_experts=4, fields=dict(k=4), train=True, bias=False),  # every expert takes all
]


def route(x, params, case, given):
    k = (DEFAULTS | case["fields"])["k"]
    num_tokens, num_experts = int(given.mask.sum()), case["num_experts"]
    capacity = math.ceil(num_tokens * k / num_experts)
    s = softmax(x @ params["kernel"], axis=1)  # over the experts
    chosen = np.zeros(s.shape, bool)
    for e in range(num_experts):
        ranked = np.where(given.mask, s[:, e], -np.inf)
        tokens = np.argsort(-ranked, kind="stable")[:capacity]
        chosen[tokens, e] = given.mask[tokens]
    return chosen, np.where(chosen, s, 0.0)


def example():
    s = np.array(
        [
            [0.40, 0.30, 0.20, 0.10],
            [0.30, 0.20, 0.15, 0.35],
            [0.10, 0.10, 0.10, 0.70],
            [0.10, 0.10, 0.70, 0.10],
        ]
    )
    # Four tokens, the last one padding; capacity ceil(3 * 1 / 4) = 1.
    # expert 0: .4 .3 .1 -> token 0;  expert 1: .3 .2 .1 -> token 0
    # expert 2: .2 .15 .1 -> token 0 (the padding has .7);  expert 3: .1 .35 .7 -> token 2
    # Token 1 is taken by no one.
    return dict(
        x=np.eye(4),
        params=dict(kernel=np.log(s)),
        case=dict(num_experts=4, fields=dict(k=1), train=True, bias=False),
        given=dict(mask=np.array([True, True, True, False])),
        chosen=np.array([[1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], bool),
        weight=np.array([[0.4, 0.3, 0.2, 0], [0, 0, 0, 0], [0, 0, 0, 0.7], [0, 0, 0, 0]]),
    )
