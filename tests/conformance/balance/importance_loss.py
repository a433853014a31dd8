"""The importance loss: Shazeer et al. (1701.06538, eq. 6-7): squared coefficient of variation of
the experts' total gate values. The variance is the population's.
"""

from types import SimpleNamespace

import numpy as np

DEFAULTS = dict(scope="micro_batch")

CASES = [
    dict(fields={}, router=dict(kind="top_k", k=2)),
    dict(fields=dict(scope="sequence"), router=dict(kind="top_k", k=2)),
    dict(fields={}, router=dict(kind="noisy_top_k", k=2)),
    dict(fields={}, router=dict(kind="top_k", k=2, score="sigmoid", renormalise=False)),
]


def squared_variation(total):
    """Variance over squared mean; 0 where everything is 0."""
    return total.var() / total.mean() ** 2 if total.mean() > 0 else 0.0


def loss(aux, fields, state):
    fields = DEFAULTS | fields
    if not aux.mask.any():
        return 0.0
    if fields["scope"] == "micro_batch":
        return float(squared_variation(aux.weight[aux.mask].sum(0)))
    result = 0.0
    for sequence in np.unique(aux.sequence[aux.mask]):
        rows = aux.mask & (aux.sequence == sequence)
        result += rows.sum() * squared_variation(aux.weight[rows].sum(0))
    return float(result / aux.mask.sum())


def example():
    # column sums 1.3 1.3 .4, mean 1, variance (.09 + .09 + .36) / 3 = .18
    prob = np.array([[0.48, 0.32, 0.2], [0.2, 0.48, 0.32], [0.63, 0.27, 0.1]])
    aux = SimpleNamespace(
        logit=np.log(prob),
        prob=prob,
        rank=prob,
        choice=np.array([[0, 1], [1, 2], [0, 1]]),
        weight=np.array([[0.6, 0.4, 0.0], [0.0, 0.6, 0.4], [0.7, 0.3, 0.0]]),
        mask=np.array([True, True, True]),
        sequence=np.array([0, 0, 1]),
        chance=None,
        num_experts=3,
        k=2,
    )
    return dict(aux=aux, fields={}, state={}, loss=0.18)
