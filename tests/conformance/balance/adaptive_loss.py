"""A load-balancing loss whose coefficient follows the load. From no paper: after axlearn's
AdaptiveLoadBalanceLoss, with MaxVio = max N / mean N - 1 (2408.15664, section 4.1) as the measure.
"""

from types import SimpleNamespace

import numpy as np

DEFAULTS = dict(rate=0.05, target=0.1, smallest=1e-4, largest=1.0)

CASES = [
    dict(fields={}, router=dict(kind="top_k", k=2)),
    dict(fields=dict(rate=0.2, target=100.0), router=dict(kind="top_k", k=2)),  # falls
    dict(fields=dict(target=0.0, largest=0.01), router=dict(kind="top_k", k=1)),  # at its limit
    dict(fields=dict(target=100.0, smallest=0.01), router=dict(kind="top_k", k=2)),
]


def counts(aux):
    """The number of choices of each column, over valid tokens."""
    columns = aux.prob.shape[1]
    choice = aux.choice[aux.mask]
    return np.bincount(choice[choice < columns], minlength=columns)


def loss(aux, fields, state):
    """The Switch loss, before the coefficient."""
    if not aux.mask.any():
        return 0.0
    n = counts(aux)
    f = n / max(n.sum(), 1)
    return float(len(n) * (f * aux.prob[aux.mask].mean(0)).sum())


def update(state, batches, fields):
    fields = DEFAULTS | fields
    n = sum(counts(aux) for aux in batches)
    violation = n.max() / n.mean() - 1 if n.sum() > 0 else fields["target"]
    coefficient = state["coefficient"]
    if violation > fields["target"]:
        coefficient = coefficient * (1 + fields["rate"])
    elif violation < fields["target"]:
        coefficient = coefficient / (1 + fields["rate"])
    return {"coefficient": np.clip(coefficient, fields["smallest"], fields["largest"])}


def example():
    # N = 2 3 1, f = 1/3 1/2 1/6; P = 1.3/3 1.1/3 .6/3
    # 3 (1.3/9 + 1.1/6 + .6/18) = 65/60
    # MaxVio = 3/2 - 1 = .5 > .1: times 1.05
    prob = np.array([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
    aux = SimpleNamespace(
        logit=np.log(prob),
        prob=prob,
        rank=prob,
        choice=np.array([[0, 1], [1, 2], [0, 1]]),
        weight=np.array([[5 / 8, 3 / 8, 0], [0, 5 / 8, 3 / 8], [2 / 3, 1 / 3, 0]]),
        mask=np.array([True, True, True]),
        sequence=np.array([0, 0, 1]),
        chance=None,
        num_experts=3,
        k=2,
    )
    return dict(
        aux=aux,
        fields={},
        state={"coefficient": 0.02},
        loss=13 / 12,
        updated={"coefficient": 0.021},
    )
