"""Group-limited top-k: DeepSeek-V2 (2405.04434, section 2.2.2: a group's score is its maximum) and
DeepSeek-V3 (2412.19437, section 2.1.2 and the authors' code: the sum of its two highest biased
scores).

A group is num_experts / num_groups consecutive experts.
"""

import numpy as np
from scipy.special import expit, softmax

DEFAULTS = dict(
    k=2,
    score="sigmoid",
    renormalise=True,
    scale=1.0,
    input_jitter=0.0,
    num_groups=2,
    groups_per_token=1,
    group_score="sum_top2",
)

CASES = [
    dict(num_experts=8, fields={}, train=True, bias=True),
    dict(
        num_experts=12,
        fields=dict(k=3, num_groups=4, groups_per_token=2, scale=2.5),
        train=False,
        bias=True,
    ),
    dict(
        num_experts=12,
        fields=dict(
            k=3,
            score="softmax",
            renormalise=False,
            scale=16.0,
            num_groups=4,
            groups_per_token=2,
            group_score="max",
        ),
        train=True,
        bias=False,
    ),
    dict(
        num_experts=8,
        fields=dict(k=4, score="sqrt_softplus", num_groups=2, group_score="max"),
        train=True,
        bias=True,
    ),
    dict(
        num_experts=8,
        fields=dict(k=1, num_groups=4, groups_per_token=3, input_jitter=0.3),
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
    return np.sqrt(np.logaddexp(0.0, z))


def route(x, params, case, given):
    fields = DEFAULTS | case["fields"]
    k = fields["k"]
    epsilon = fields["input_jitter"]
    if epsilon > 0 and case["train"]:
        x = x * ((1 - epsilon) + 2 * epsilon * given.uniform(x.shape[1]))
    z = x @ params["kernel"]
    bias = 0.0 if given.bias is None else given.bias
    group_of = np.arange(z.shape[1]) // (z.shape[1] // fields["num_groups"])
    summands = 2 if fields["group_score"] == "sum_top2" else 1

    chosen = np.zeros(z.shape, bool)
    weight = np.zeros(z.shape)
    for t in np.flatnonzero(given.mask):
        s = score(z[t], fields["score"])
        ranked = s + bias
        group_score = np.array(
            [np.sort(ranked[group_of == g])[-summands:].sum() for g in range(fields["num_groups"])]
        )
        groups = np.argsort(-group_score, kind="stable")[: fields["groups_per_token"]]
        ranked = np.where(np.isin(group_of, groups), ranked, -np.inf)
        selected = np.argsort(-ranked, kind="stable")[:k]
        w = s[selected]
        if fields["renormalise"] and k > 1:
            w = w / w.sum()
        chosen[t, selected] = True
        weight[t, selected] = w * fields["scale"]
    return chosen, weight


def example():
    s = np.array([[0.9, 0.1, 0.1, 0.6, 0.6, 0.2], [0.8, 0.2, 0.1, 0.5, 0.6, 0.1]])
    kernel = np.log(s / (1 - s))  # sigmoid(kernel) = s; token t sees row t
    bias = np.array([0.0, 0.15, 0.0, 0.0, 0.0, -0.9])
    # Two groups of three. Biased:
    # token 0: .9 .25 .1 | .6 .6 -.7: sums 1.15 and 1.2 -> the second group, despite .9.
    #   k = 3 takes all of it, also the expert at -.7: the other group is out at -inf, not at 0.
    #   weights .6 .6 .2 over 1.4
    # token 1: .8 .35 .1 | .5 .6 -.8: sums 1.15 and 1.1 -> the first group (without bias 1.0 < 1.1).
    #   weights .8 .2 .1 over 1.1
    return dict(
        x=np.eye(2),
        params=dict(kernel=kernel),
        case=dict(num_experts=6, fields=dict(k=3), train=True, bias=True),
        given=dict(bias=bias, mask=np.array([True, True])),
        chosen=np.array([[0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0]], bool),
        weight=np.array([[0, 0, 0, 3 / 7, 3 / 7, 1 / 7], [8 / 11, 2 / 11, 1 / 11, 0, 0, 0]]),
    )
