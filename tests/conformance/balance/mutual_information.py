"""Minus the mutual information of token and expert: mean entropy of the tokens' probabilities less
the entropy of their mean (natural logarithm): ModuleFormer's loss for tokens and modules (Shen et
al., 2306.04640; equation as quoted in a review of it). Related: the local and global entropy losses
of Mustafa et al. (2206.02770) and tasks in place of tokens by Chen et al. (2212.08066), not re-read.
"""

from types import SimpleNamespace

import numpy as np
from scipy.special import entr  # -p log p, 0 at 0

DEFAULTS = dict(scope="micro_batch")

CASES = [
    dict(fields={}, router=dict(kind="top_k", k=2)),
    dict(fields=dict(scope="sequence"), router=dict(kind="top_k", k=2)),
    dict(fields={}, router=dict(kind="top_k", k=2, score="sigmoid")),
]


def over(prob):
    """The loss over some of the tokens."""
    return entr(prob).sum(1).mean() - entr(prob.mean(0)).sum()


def loss(aux, fields, state):
    fields = DEFAULTS | fields
    if not aux.mask.any():
        return 0.0
    if fields["scope"] == "micro_batch":
        return float(over(aux.prob[aux.mask]))
    total = 0.0
    for sequence in np.unique(aux.sequence[aux.mask]):
        rows = aux.mask & (aux.sequence == sequence)
        total += rows.sum() * over(aux.prob[rows])
    return float(total / aux.mask.sum())


def example():
    # Each token: 1/4 log 4 + 3/4 log 4/3 = log 4 - 3/4 log 3. The mean is 1/2 1/2 with log 2.
    # The difference is log 2 - 3/4 log 3, about -.131.
    prob = np.array([[0.75, 0.25], [0.25, 0.75]])
    aux = SimpleNamespace(
        logit=np.log(prob),
        prob=prob,
        rank=prob,
        choice=np.array([[0], [1]]),
        weight=np.array([[0.75, 0], [0, 0.75]]),
        mask=np.array([True, True]),
        sequence=np.array([0, 0]),
        chance=None,
        num_experts=2,
        k=1,
    )
    return dict(aux=aux, fields={}, state={}, loss=np.log(2) - 0.75 * np.log(3))
