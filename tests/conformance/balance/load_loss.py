"""The load loss: Shazeer et al. (1701.06538, appendix A, eq. 10-11): squared coefficient of
variation of the experts' summed chances of being chosen, a smooth stand-in for their loads. The
variance is the population's.
"""

from types import SimpleNamespace

import numpy as np

DEFAULTS = dict(scope="micro_batch")

CASES = [
    dict(fields={}, router=dict(kind="noisy_top_k", k=2)),
    dict(fields=dict(scope="sequence"), router=dict(kind="noisy_top_k", k=2)),
    dict(fields={}, router=dict(kind="noisy_top_k", k=1)),
]


def squared_variation(total):
    """Variance over squared mean; 0 where everything is 0."""
    return total.var() / total.mean() ** 2 if total.mean() > 0 else 0.0


def loss(aux, fields, state):
    fields = DEFAULTS | fields
    if not aux.mask.any():
        return 0.0
    if fields["scope"] == "micro_batch":
        return float(squared_variation(aux.chance[aux.mask].sum(0)))
    result = 0.0
    for sequence in np.unique(aux.sequence[aux.mask]):
        rows = aux.mask & (aux.sequence == sequence)
        result += rows.sum() * squared_variation(aux.chance[rows].sum(0))
    return float(result / aux.mask.sum())


def example():
    # column sums 1.6 1.4 1, mean 4/3; deviations 4/15 1/15 -5/15;
    # variance (16 + 1 + 25) / 225 / 3 = 14/225; over 16/9: 14 * 9 / (225 * 16) = .035
    prob = np.array([[0.5, 0.3, 0.2], [0.3, 0.5, 0.2]])
    aux = SimpleNamespace(
        logit=np.log(prob),
        prob=prob,
        rank=prob,
        choice=np.array([[0, 1], [1, 0]]),
        weight=np.array([[5 / 8, 3 / 8, 0], [3 / 8, 5 / 8, 0]]),
        mask=np.array([True, True]),
        sequence=np.array([0, 0]),
        chance=np.array([[0.9, 0.6, 0.5], [0.7, 0.8, 0.5]]),
        num_experts=3,
        k=2,
    )
    return dict(aux=aux, fields={}, state={}, loss=0.035)
