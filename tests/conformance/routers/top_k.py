"""Top-k token choice: Switch (2101.03961, eq. 1-2, and its input jitter), DeepSeek-V3 (2412.19437,
eq. 13-16).

The scale and the bias are DeepSeek's; the bias takes part in the selection only.
"""

import numpy as np
from scipy.special import expit, softmax

DEFAULTS = dict(
    k=2,
    score="softmax",
    score_before_selection=True,
    renormalise=True,
    scale=1.0,
    input_jitter=0.0,
)

CASES = [
    dict(num_experts=8, fields={}, train=True, bias=False),
    dict(num_experts=8, fields=dict(k=1), train=True, bias=True),
    dict(
        num_experts=8,
        fields=dict(k=3, score="sigmoid", scale=2.5),
        train=True,
        bias=True,
    ),
    dict(
        num_experts=8,
        fields=dict(k=2, score="sqrt_softplus", renormalise=False, scale=1.5),
        train=False,
        bias=True,
    ),
    dict(
        num_experts=8,
        fields=dict(k=2, score_before_selection=False, renormalise=False),
        train=False,
        bias=True,
    ),
    dict(
        num_experts=8,
        fields=dict(k=2, score="sigmoid", score_before_selection=False, input_jitter=0.3),
        train=True,
        bias=False,
    ),
]


def score(z, name):
    """The score of one token's logits."""
    if name == "softmax":
        return softmax(z)
    if name == "sigmoid":
        return expit(z)
    return np.sqrt(np.logaddexp(0.0, z))  # sqrt(softplus(z)), DeepSeek-V4


def route(x, params, case, given):
    fields = DEFAULTS | case["fields"]
    k = fields["k"]
    epsilon = fields["input_jitter"]
    if epsilon > 0 and case["train"]:
        x = x * ((1 - epsilon) + 2 * epsilon * given.uniform(x.shape[1]))
    z = x @ params["kernel"]
    bias = 0.0 if given.bias is None else given.bias

    chosen = np.zeros(z.shape, bool)
    weight = np.zeros(z.shape)
    for t in np.flatnonzero(given.mask):
        if fields["score_before_selection"]:
            s = score(z[t], fields["score"])
            selected = np.argsort(-(s + bias), kind="stable")[:k]
            w = s[selected]
        else:
            selected = np.argsort(-(z[t] + bias), kind="stable")[:k]
            w = score(z[t, selected], fields["score"])
        if fields["renormalise"] and k > 1:
            w = w / w.sum()
        chosen[t, selected] = True
        weight[t, selected] = w * fields["scale"]
    return chosen, weight


def example():
    # softmax of the rows of the kernel: .5 .3 .1 .1 and .1 .2 .3 .4
    kernel = np.log([[5.0, 3.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    x = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    bias = np.array([0.0, 0.0, 0.25, 0.0])
    # token 0, biased: .5 .3 .35 .1 -> 0 and 2; weights .5 and .1 over .6, times 2
    # token 1, biased: .1 .2 .55 .4 -> 2 and 3; weights .3 and .4 over .7, times 2
    # token 2, biased: .25 .25 .5 .25 -> 2, and of the equal ones the lowest, 0; weights 1/2,
    #   times 2
    # token 3 is padding
    return dict(
        x=x,
        params=dict(kernel=kernel),
        case=dict(num_experts=4, fields=dict(k=2, scale=2.0), train=True, bias=True),
        given=dict(bias=bias, mask=np.array([True, True, True, False])),
        chosen=np.array([[1, 0, 1, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], bool),
        weight=np.array(
            [[5 / 3, 0, 1 / 3, 0], [0, 0, 6 / 7, 8 / 7], [1, 0, 1, 0], [0, 0, 0, 0]],
        ),
    )
