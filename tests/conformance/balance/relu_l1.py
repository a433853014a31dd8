"""ReMoE's adaptive L1 regularisation, balanced by load: Wang et al. (2412.14711, sections 3.3-3.4).

One layer: the paper averages the loss and the sparsity over layers and has one coefficient for all
of them.
"""

from types import SimpleNamespace

import numpy as np

DEFAULTS = dict(multiplier=1.2, balanced=True)

CASES = [
    dict(fields={}, router=dict(kind="remoe")),
    dict(fields=dict(balanced=False, multiplier=1.5), router=dict(kind="remoe")),
    dict(fields={}, router=dict(kind="remoe", max_experts=3)),
]


def loss(aux, fields, state):
    """Before the coefficient. f is a constant to the gradient."""
    fields = DEFAULTS | fields
    if not aux.mask.any():
        return 0.0
    r = np.maximum(aux.logit[aux.mask], 0.0)
    num_tokens, num_experts = r.shape
    f = np.ones(num_experts)
    if fields["balanced"]:
        f = num_experts / (aux.k * num_tokens) * (r > 0).sum(0)
    return float((f * r).sum(1).mean())


def update(state, batches, fields):
    fields = DEFAULTS | fields
    active = sum((aux.logit[aux.mask] > 0).sum() for aux in batches)
    num_tokens = sum(aux.mask.sum() for aux in batches)
    # target - sparsity = (1 - k/E) - (1 - active / (T E));
    # its sign is that of active - k T, which has no rounding
    sign = np.sign(active - batches[0].k * num_tokens)
    return {"coefficient": state["coefficient"] * fields["multiplier"] ** float(sign)}


def example():
    # relu: 1 0 2 0 and 0 0 .5 0. Active tokens 1 0 2 0, f = 4 / (1 * 2) of them = 2 0 4 0.
    # token 0: 2 * 1 + 4 * 2 = 10; token 1: 4 * .5 = 2; mean 6. The last token is padding.
    # sparsity 1 - 3/8 = .625, target 1 - 1/4 = .75: not sparse enough, times 1.2
    logit = np.array([[1.0, -1, 2, -1], [-1, -1, 0.5, -1], [5, 5, 5, 5]])
    relu = np.array([[1.0, 0, 2, 0], [0, 0, 0.5, 0], [0, 0, 0, 0]])
    aux = SimpleNamespace(
        logit=logit,
        prob=np.array([[1 / 3, 0, 2 / 3, 0], [0, 0, 1, 0], [0.25, 0.25, 0.25, 0.25]]),
        rank=np.maximum(logit, 0.0),
        choice=np.array([[2, 0, 4, 4], [2, 4, 4, 4], [4, 4, 4, 4]]),
        weight=relu,
        mask=np.array([True, True, False]),
        sequence=np.array([0, 0, 0]),
        chance=None,
        num_experts=4,
        k=1,
    )
    return dict(
        aux=aux,
        fields={},
        state={"coefficient": 1e-8},
        loss=6.0,
        updated={"coefficient": 1.2e-8},
    )
