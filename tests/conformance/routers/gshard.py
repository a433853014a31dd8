"""GShard's top-2 gate with a random second expert (2006.16668, section 2.2 and algorithm 1),
without its capacity.

The gates are normalised over the two before the second is drawn: a first expert whose second is not
used keeps g1 / (g1 + g2). Checked against the second_expert_policy "random" of fairseq's NLLB gate
with normalize_gate_prob_before_dropping, which draws in the same way.
"""

import numpy as np
from scipy.special import softmax

CASES = [
    dict(num_experts=8, fields={}, train=True, bias=False),
    dict(num_experts=8, fields={}, train=False, bias=False),
    dict(num_experts=2, fields={}, train=True, bias=False),
]


def route(x, params, case, given):
    z = x @ params["kernel"]
    draw = given.uniform(1) if case["train"] else None
    chosen = np.zeros(z.shape, bool)
    weight = np.zeros(z.shape)
    for t in np.flatnonzero(given.mask):
        g = softmax(z[t])
        first, second = np.argsort(-g, kind="stable")[:2]
        g1 = g[first] / (g[first] + g[second])
        g2 = g[second] / (g[first] + g[second])
        chosen[t, first] = True
        weight[t, first] = g1
        if draw is None or 2 * g2 > draw[t, 0]:
            chosen[t, second] = True
            weight[t, second] = g2
    return chosen, weight


def example():
    kernel = np.log([[0.6, 0.3, 0.1], [0.1, 0.3, 0.6], [0.4, 0.2, 0.4]])  # token t sees row t
    draw = np.array([[0.5], [0.7], [0.99]])
    # token 0: g1 = .6/.9 = 2/3, g2 = 1/3; 2/3 > .5: both
    # token 1: the same gates on 2 and 1; 2/3 < .7: the first alone, its gate still 2/3
    # token 2: equal gates, the lowest index first; 2 * 1/2 > .99: both
    return dict(
        x=np.eye(3),
        params=dict(kernel=kernel),
        case=dict(num_experts=3, fields={}, train=True, bias=False),
        given=dict(uniform=lambda width: draw, mask=np.array([True, True, True])),
        chosen=np.array([[1, 1, 0], [0, 0, 1], [1, 0, 1]], bool),
        weight=np.array([[2 / 3, 1 / 3, 0], [0, 0, 2 / 3], [0.5, 0, 0.5]]),
    )
