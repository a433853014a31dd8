"""Cosine routing: X-MoE, Chi et al. (2204.09179, section 3). Low-dimensional tokens and centroids,
both of unit length; the learned temperature divides. Its lower bound is Tutel's, not the paper's.
"""

import numpy as np
from scipy.special import softmax

DEFAULTS = dict(k=2, projection=16, min_temperature=0.01)

CASES = [
    dict(num_experts=8, fields={}, train=True, bias=False),
    dict(num_experts=8, fields=dict(k=1, projection=4), train=False, bias=False),
    dict(num_experts=8, fields=dict(k=3, min_temperature=2.0), train=True, bias=False),
]


def route(x, params, case, given):
    fields = DEFAULTS | case["fields"]
    tokens = x @ params["projection"]
    centroids = params["centroid"]
    temperature = max(float(np.squeeze(params["temperature"])), fields["min_temperature"])
    chosen = np.zeros((len(x), len(centroids)), bool)
    weight = np.zeros(chosen.shape)
    for t in np.flatnonzero(given.mask):
        cosine = np.array(
            [tokens[t] @ c / (np.linalg.norm(tokens[t]) * np.linalg.norm(c)) for c in centroids]
        )
        p = softmax(cosine / temperature)
        selected = np.argsort(-p, kind="stable")[: fields["k"]]
        chosen[t, selected] = True
        weight[t, selected] = p[selected]
    return chosen, weight


def example():
    # The temperature .001 is below the bound .2.
    # token 0: (3, 4) of length 5: cosines .6 .8 -.6, over .2: 3 4 -3 -> 1 and 0
    # token 1: (-10, 0): cosines -1 0 1, over .2: -5 0 5 -> 2 and 1
    first = np.exp(3) + np.exp(4) + np.exp(-3)
    second = np.exp(-5) + 1 + np.exp(5)
    return dict(
        x=np.array([[3.0, 4.0], [-10.0, 0.0]]),
        params=dict(
            projection=np.eye(2),
            centroid=np.array([[1.0, 0.0], [0.0, 7.0], [-2.0, 0.0]]),
            temperature=np.array(0.001),
        ),
        case=dict(
            num_experts=3,
            fields=dict(k=2, projection=2, min_temperature=0.2),
            train=True,
            bias=False,
        ),
        given=dict(mask=np.array([True, True])),
        chosen=np.array([[1, 1, 0], [0, 1, 1]], bool),
        weight=np.array(
            [[np.exp(3) / first, np.exp(4) / first, 0], [0, 1 / second, np.exp(5) / second]]
        ),
    )
