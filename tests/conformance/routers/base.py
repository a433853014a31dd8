"""BASE layers: Lewis et al. (2103.16716, section 3). Training: the equal assignment of the highest
total score; evaluation: every token to its highest expert.

The auction is near the optimum only, so the assignment's properties are checked, against scipy's
exact one. Only the weight sigmoid(x . w) is transcribed, not the paper's residual mixture. Loads
with padding are not checked.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.special import expit

DEFAULTS = dict(max_iterations=2000)

CASES = [
    dict(num_experts=8, fields={}, train=True, bias=False),
    dict(num_experts=4, fields={}, train=True, bias=False),
    dict(num_experts=8, fields={}, train=False, bias=False),
]


def check(x, params, case, given, chosen, weight):
    s = x @ params["kernel"]
    num_tokens, num_experts = s.shape
    valid = np.flatnonzero(given.mask)
    assert not chosen[~given.mask].any(), "padding is routed"
    assert (chosen[valid].sum(1) == 1).all(), "a token has not exactly one expert"
    np.testing.assert_allclose(weight, np.where(chosen, expit(s), 0.0), rtol=1e-5, atol=1e-6)

    if not case["train"]:
        assert (chosen[valid].argmax(1) == s[valid].argmax(1)).all(), "not the highest expert"
    elif given.mask.all() and num_tokens % num_experts == 0:
        room = num_tokens // num_experts
        load = chosen.sum(0)
        assert (load == room).all(), f"loads {load}, not {room} each"
        slots = np.repeat(s, room, axis=1)  # an expert is `room` slots for one token each
        optimum = slots[linear_sum_assignment(slots, maximize=True)].sum()
        allowed = 0.01 * (s.max() - s.min()) * num_tokens / 10
        total = s[chosen].sum()
        assert total >= optimum - allowed, f"total {total} is below the optimum {optimum}"


def example():
    # Both tokens prefer expert 0. One each: 2 + 0 = 2 or 1 + 3 = 4, so token 0 goes to expert 1.
    return dict(
        x=np.eye(2),
        params=dict(kernel=np.array([[2.0, 1.0], [3.0, 0.0]])),
        case=dict(num_experts=2, fields={}, train=True, bias=False),
        given=dict(mask=np.array([True, True])),
        chosen=np.array([[0, 1], [1, 0]], bool),
        weight=np.array([[0, 1 / (1 + np.exp(-1))], [1 / (1 + np.exp(-3)), 0]]),
    )
