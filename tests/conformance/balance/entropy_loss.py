"""The dynamic loss of top-p routing: Huang et al. (2403.07652, section 2): mean entropy of the
tokens' probabilities.
"""

from types import SimpleNamespace

import numpy as np
from scipy.special import entr  # -p log p, 0 at 0

CASES = [
    dict(fields={}, router=dict(kind="top_p", threshold=0.4)),
    dict(fields={}, router=dict(kind="top_k", k=2)),
    dict(fields={}, router=dict(kind="top_k", k=2, score="sigmoid")),
]


def loss(aux, fields, state):
    if not aux.mask.any():
        return 0.0
    return float(entr(aux.prob[aux.mask]).sum(1).mean())


def example():
    # Entropies: log 4 = 2 log 2, and (1/2 * 1 + 1/4 * 2 + 2 * 1/8 * 3) log 2 = 1.75 log 2.
    # The last token is padding.
    prob = np.array([[0.25, 0.25, 0.25, 0.25], [0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]])
    aux = SimpleNamespace(
        logit=np.log(prob),
        prob=prob,
        rank=prob,
        choice=np.array([[0, 1], [0, 1], [4, 4]]),
        weight=np.array([[0.5, 0.5, 0, 0], [2 / 3, 1 / 3, 0, 0], [0, 0, 0, 0]]),
        mask=np.array([True, True, False]),
        sequence=np.array([0, 0, 0]),
        chance=None,
        num_experts=4,
        k=2,
    )
    return dict(aux=aux, fields={}, state={}, loss=1.875 * np.log(2))
