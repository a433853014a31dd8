"""The Switch load-balancing loss (2101.03961, eq. 4-6), for any number of choices:
C * sum_i f_i P_i with f_i = N_i / sum N, which is 1 at balance.
Scope "sequence": DeepSeek-V3 (2412.19437, eq. 17-20).

With k choices per token N_i / sum N is DeepSeek's count / (k T). DeepSeek counts the top-k of the
unbiased scores; here the choices made are counted. f is a constant to the gradient in both.
first_choice_only is GShard's count (2006.16668, section 2.2).
"""

from types import SimpleNamespace

import numpy as np

DEFAULTS = dict(scope="micro_batch", first_choice_only=False)

CASES = [
    dict(fields={}, router=dict(kind="top_k", k=2)),
    dict(fields={}, router=dict(kind="top_k", k=1)),
    dict(fields=dict(first_choice_only=True), router=dict(kind="top_k", k=2)),
    dict(fields=dict(scope="sequence"), router=dict(kind="top_k", k=2, score="sigmoid")),
    dict(
        fields=dict(scope="sequence", first_choice_only=True),
        router=dict(kind="top_k", k=3, score="sqrt_softplus"),
    ),
    dict(fields={}, router=dict(kind="top_p", threshold=0.4)),  # the number of choices varies
]


def over(aux, rows, first_choice_only):
    """The loss over some of the tokens."""
    columns = aux.prob.shape[1]
    choice = aux.choice[rows, :1] if first_choice_only else aux.choice[rows]
    n = np.bincount(choice[choice < columns], minlength=columns)
    f = n / max(n.sum(), 1)
    p = aux.prob[rows].mean(0)
    return columns * (f * p).sum()


def loss(aux, fields, state):
    fields = DEFAULTS | fields
    if not aux.mask.any():
        return 0.0
    if fields["scope"] == "micro_batch":
        return float(over(aux, aux.mask, fields["first_choice_only"]))
    total = 0.0
    for sequence in np.unique(aux.sequence[aux.mask]):
        rows = aux.mask & (aux.sequence == sequence)
        total += rows.sum() * over(aux, rows, fields["first_choice_only"])
    return float(total / aux.mask.sum())


def example():
    # The last token is padding.
    # N = 2 3 1, f = 1/3 1/2 1/6; P = 1.3/3 1.1/3 .6/3
    # 3 (1.3/9 + 1.1/6 + .6/18) = 13/30 + 11/20 + 1/10 = 65/60
    prob = np.array([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]])
    aux = SimpleNamespace(
        logit=np.log(prob),
        prob=prob,
        rank=prob,
        choice=np.array([[0, 1], [1, 2], [0, 1], [3, 3]]),
        weight=np.array([[5 / 8, 3 / 8, 0], [0, 5 / 8, 3 / 8], [2 / 3, 1 / 3, 0], [0, 0, 0]]),
        mask=np.array([True, True, True, False]),
        sequence=np.array([0, 0, 1, 1]),
        chance=None,
        num_experts=3,
        k=2,
    )
    return dict(aux=aux, fields={}, state={}, loss=13 / 12)
