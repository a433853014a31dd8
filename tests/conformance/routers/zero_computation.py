"""MoE++: Jin et al. (2410.07348, sections 3.1-3.2): experts without computation, and gating
residuals.

Columns: feed-forward experts, then zero, copy and constant ones. The paper's residual matrix acts
on column vectors, this one on rows: it is the transpose. The paper does not renormalise. The
authors' code (SkyworkAI/MoE-plus-plus) adds the residual to the logits and mixes a constant expert by
a softmax of two in the same way; its weights differ: the zero expert's becomes 0, the others are
renormalised and multiplied by k.
"""

import numpy as np
from scipy.special import softmax

DEFAULTS = dict(
    k=2, num_zero=1, num_copy=1, num_constant=1, gating_residual=True, renormalise=False
)

CASES = [
    dict(num_experts=8, fields={}, train=True, bias=False),
    dict(num_experts=8, fields=dict(gating_residual=False), train=True, bias=False),
    dict(
        num_experts=4,
        fields=dict(k=3, num_zero=2, num_copy=0, num_constant=3, renormalise=True),
        train=False,
        bias=False,
    ),
    dict(num_experts=4, fields=dict(k=1, num_zero=0), train=True, bias=False),
]


def route(x, params, case, given):
    fields = DEFAULTS | case["fields"]
    z = x @ params["kernel"]
    if fields["gating_residual"]:
        z = z + given.previous_logit @ params["residual"]
    num_columns = case["num_experts"] + sum(
        fields[name] for name in ("num_zero", "num_copy", "num_constant")
    )
    assert z.shape[1] == num_columns, f"{z.shape[1]} columns of scores, not {num_columns}"
    chosen = np.zeros(z.shape, bool)
    weight = np.zeros(z.shape)
    for t in np.flatnonzero(given.mask):
        p = softmax(z[t])
        selected = np.argsort(-p, kind="stable")[: fields["k"]]
        w = p[selected]
        if fields["renormalise"] and fields["k"] > 1:
            w = w / w.sum()
        chosen[t, selected] = True
        weight[t, selected] = w
    return chosen, weight


def example():
    kernel = np.log([[4.0, 3.0, 1.0, 1.0, 1.0]])  # two feed-forward experts, zero, copy, constant
    residual = np.zeros((5, 5))
    residual[0, 2] = 1.0  # from the previous layer's expert 0 to the zero expert
    previous = np.zeros((2, 5))
    previous[1, 0] = np.log(8)
    # token 0: 4 3 1 1 1 over 10 -> 0 and 1
    # token 1: log 8 is added to the zero expert's logit: 4 3 8 1 1 over 17 -> 2 and 0
    return dict(
        x=np.ones((2, 1)),
        params=dict(kernel=kernel, residual=residual),
        case=dict(num_experts=2, fields=dict(k=2), train=True, bias=False),
        given=dict(previous_logit=previous, mask=np.array([True, True])),
        chosen=np.array([[1, 1, 0, 0, 0], [1, 0, 1, 0, 0]], bool),
        weight=np.array([[0.4, 0.3, 0, 0, 0], [4 / 17, 0, 8 / 17, 0, 0]]),
    )
