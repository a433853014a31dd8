"""MoE++'s heterogeneous load-balancing loss: Jin et al. (2410.07348, section 3.3):
sum_i eta_i f_i P_i, eta = 1 for feed-forward experts and tau for those without computation.

Normalised here with f_i = N_i / sum N and the factor sum_i 1/eta_i: 1 where f = P is proportional
to 1/eta. The paper's f is N_i / T without either factor (not re-read in the paper; an independent
implementation of it in MLX has the same, and the authors published no code of the loss).
"""

from types import SimpleNamespace

import numpy as np

DEFAULTS = dict(tau=0.75)

CASES = [
    dict(fields={}, router=dict(kind="zero_computation", k=2)),
    dict(
        fields=dict(tau=0.25),
        router=dict(kind="zero_computation", k=2, num_zero=2, num_constant=3),
    ),
    dict(fields=dict(tau=1.0), router=dict(kind="zero_computation", k=1)),  # the Switch loss
]


def loss(aux, fields, state):
    fields = DEFAULTS | fields
    if not aux.mask.any():
        return 0.0
    columns = aux.prob.shape[1]
    eta = np.where(np.arange(columns) < aux.num_experts, 1.0, fields["tau"])
    choice = aux.choice[aux.mask]
    n = np.bincount(choice[choice < columns], minlength=columns)
    f = n / max(n.sum(), 1)
    p = aux.prob[aux.mask].mean(0)
    return float((1 / eta).sum() * (eta * f * p).sum())


def example():
    # Two feed-forward experts and three others: eta = 1 1 .75 .75 .75,
    # sum of 1/eta = 2 + 3 * 4/3 = 6.
    # N = 2 1 1 0 0, f = .5 .25 .25 0 0; P = .4 .2 .2 .1 .1
    # 6 (.5 * .4 + .25 * .2 + .75 * .25 * .2) = 6 * .2875 = 1.725
    prob = np.array([[0.4, 0.1, 0.3, 0.1, 0.1], [0.4, 0.3, 0.1, 0.1, 0.1]])
    aux = SimpleNamespace(
        logit=np.log(prob),
        prob=prob,
        rank=prob,
        choice=np.array([[0, 2], [0, 1]]),
        weight=np.array([[0.4, 0, 0.3, 0, 0], [0.4, 0.3, 0, 0, 0]]),
        mask=np.array([True, True]),
        sequence=np.array([0, 0]),
        chance=None,
        num_experts=2,
        k=2,
    )
    return dict(aux=aux, fields={}, state={}, loss=1.725)
