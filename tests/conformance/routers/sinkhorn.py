"""Sinkhorn routing, as Megatron-LM computes it (the idea: Clark et al., 2202.01169).

Two differences which leave the selection as it is: the logits are shifted before exp (d0 takes the
factor up), and Megatron's 1e-8 in both denominators is left out.
"""

import numpy as np
from scipy.special import expit, softmax

DEFAULTS = dict(k=1, tolerance=1e-4, max_iterations=100)

CASES = [
    dict(num_experts=8, fields={}, train=True, bias=False),
    dict(num_experts=8, fields=dict(k=2), train=True, bias=False),
    dict(num_experts=8, fields=dict(max_iterations=1), train=True, bias=False),
    dict(num_experts=8, fields=dict(k=2, tolerance=1e-2), train=True, bias=False),
    dict(num_experts=8, fields={}, train=False, bias=False),
    dict(num_experts=8, fields=dict(k=2), train=False, bias=False),
]


def normalise(z, tolerance, max_iterations):
    """exp(z) with rows scaled to sum to 1/T and columns to 1/E, in turn."""
    num_tokens, num_experts = z.shape
    cost = np.exp(z - z.max())
    d1 = np.ones(num_experts)
    for _ in range(max_iterations):
        d0 = 1 / num_tokens / (cost * d1).sum(1)
        old, d1 = d1, 1 / num_experts / (cost * d0[:, None]).sum(0)
        if np.abs(d1 - old).mean() <= tolerance:
            break
    return d1 * cost * d0[:, None]


def route(x, params, case, given):
    fields = DEFAULTS | case["fields"]
    z = x @ params["kernel"]
    chosen = np.zeros(z.shape, bool)
    weight = np.zeros(z.shape)
    valid = np.flatnonzero(given.mask)
    if len(valid) == 0:
        return chosen, weight
    ranked = z[valid]
    if case["train"]:
        ranked = normalise(z[valid], fields["tolerance"], fields["max_iterations"])
    for t, row in zip(valid, ranked, strict=True):
        selected = np.argsort(-row, kind="stable")[: fields["k"]]
        w = expit(z[t]) if fields["k"] == 1 else softmax(z[t])
        chosen[t, selected] = True
        weight[t, selected] = w[selected]
    return chosen, weight


def example():
    # Both tokens prefer expert 0: exp(z) = (8 1; 2 1). Scaling rows and columns keeps the ratio
    # 8*1 / (1*2) = 4; the balanced table (p q; q p) with p^2 / q^2 = 4 has p = 2q:
    # token 0 -> 0, token 1 -> 1.
    # The third token, padding, would fill expert 1.
    # weights: sigmoid(log 8) = 8/9, sigmoid(log 1) = 1/2
    return dict(
        x=np.eye(3),
        params=dict(kernel=np.log([[8.0, 1.0], [2.0, 1.0], [1.0, 1000.0]])),
        case=dict(num_experts=2, fields={}, train=True, bias=False),
        given=dict(mask=np.array([True, True, False])),
        chosen=np.array([[1, 0], [0, 1], [0, 0]], bool),
        weight=np.array([[8 / 9, 0], [0, 1 / 2], [0, 0]]),
    )
