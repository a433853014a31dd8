"""The router z-loss: ST-MoE, Zoph et al. (2202.08906, eq. 5): mean over tokens of logsumexp(z)
squared.
"""

from types import SimpleNamespace

import numpy as np
from scipy.special import logsumexp

CASES = [
    dict(fields={}, router=dict(kind="top_k", k=2)),
    dict(fields={}, router=dict(kind="top_k", k=2, score="sigmoid")),
    dict(fields={}, router=dict(kind="zero_computation", k=2)),
]


def loss(aux, fields, state):
    if not aux.mask.any():
        return 0.0
    return float((logsumexp(aux.logit[aux.mask], axis=1) ** 2).mean())


def example():
    # logsumexp = log(1 + 2 + 1) = 2 log 2 and log(1 + 1 + 6) = 3 log 2: (4 + 9) / 2 (log 2)^2.
    # The last token is padding.
    score = np.array([[1.0, 2.0, 1.0], [1.0, 1.0, 6.0], [9.0, 9.0, 9.0]])
    prob = score / score.sum(1, keepdims=True)
    aux = SimpleNamespace(
        logit=np.log(score),
        prob=prob,
        rank=prob,
        choice=np.array([[1], [2], [3]]),
        weight=np.array([[0, 0.5, 0], [0, 0, 0.75], [0, 0, 0]]),
        mask=np.array([True, True, False]),
        sequence=np.array([0, 0, 0]),
        chance=None,
        num_experts=3,
        k=1,
    )
    return dict(aux=aux, fields={}, state={}, loss=6.5 * np.log(2) ** 2)
