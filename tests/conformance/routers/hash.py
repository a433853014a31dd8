"""Hash layers: Roller et al. (2106.04426, section 3). The expert is a fixed function of the token's
id.

"balanced" is the paper's balanced hash: ids in the order of their counts, each to the emptiest
expert so far. The table is free, so its properties are checked. Weights "score" are not the
paper's.
"""

import numpy as np
from scipy.special import softmax

DEFAULTS = dict(k=1, table="random", weights="equal")

CASES = [
    dict(num_experts=8, fields={}, train=True, bias=False),
    dict(num_experts=8, fields=dict(table="balanced"), train=False, bias=False),
    dict(num_experts=8, fields=dict(k=3), train=True, bias=False),
    dict(num_experts=8, fields=dict(k=2, weights="score"), train=True, bias=False),
    dict(num_experts=8, fields=dict(table="balanced", weights="score"), train=True, bias=False),
    dict(num_experts=8, fields=dict(k=2, table="balanced"), train=True, bias=False),
]


def check(x, params, case, given, chosen, weight):
    fields = DEFAULTS | case["fields"]
    k = fields["k"]
    valid = np.flatnonzero(given.mask)
    assert not chosen[~given.mask].any(), "padding is routed"
    assert (chosen[valid].sum(1) == k).all(), f"a token has not exactly {k} experts"

    experts_of = {}
    for t in valid:
        row = experts_of.setdefault(int(given.token_id[t]), chosen[t])
        assert (row == chosen[t]).all(), f"id {given.token_id[t]} has two sets of experts"

    expected = np.zeros(chosen.shape)
    for t in valid:
        if fields["weights"] == "equal":
            expected[t, chosen[t]] = 1 / k
        else:
            s = softmax(x[t] @ params["kernel"])[chosen[t]]
            expected[t, chosen[t]] = s if k == 1 else s / s.sum()
    np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-6)

    if len(experts_of) >= 2 * case["num_experts"] and k < case["num_experts"]:
        distinct = {row.tobytes() for row in experts_of.values()}
        assert len(distinct) > 1, "every id has the same experts"

    # Greedy gives an id to the emptiest expert: the fullest stays within one count of it.
    counts = given.token_counts
    if fields["table"] == "balanced" and k == 1 and set(experts_of) == set(range(len(counts))):
        load = sum(counts[i] * row.astype(float) for i, row in experts_of.items())
        assert load.max() - load.min() <= max(counts), f"loads {load} are not balanced"


def example():
    # As many choices as experts: the table leaves nothing open.
    # token 0 and 2: softmax of log 3, log 1 = 3/4, 1/4, over their sum 1
    # token 1: softmax of log 1, log 4 = 1/5, 4/5
    return dict(
        x=np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]),
        params=dict(kernel=np.log([[3.0, 1.0], [1.0, 4.0]])),
        case=dict(num_experts=2, fields=dict(k=2, weights="score"), train=True, bias=False),
        given=dict(token_id=np.array([5, 9, 5]), mask=np.array([True, True, True])),
        chosen=np.ones((3, 2), bool),
        weight=np.array([[0.75, 0.25], [0.2, 0.8], [0.75, 0.25]]),
    )
