"""The oracle: routing by the true domain. A bound, from no paper.

Which of its domain's experts a token gets is a free but fixed function of its id, so properties are
checked.
"""

import numpy as np

DEFAULTS = dict(k=1, num_domains=5)

CASES = [
    dict(num_experts=8, fields={}, train=True, bias=False),
    dict(num_experts=8, fields=dict(k=2, num_domains=4), train=False, bias=False),
    dict(num_experts=8, fields=dict(k=3, num_domains=4), train=True, bias=False),  # two owned
    dict(num_experts=3, fields=dict(k=2), train=True, bias=False),  # one owned
]


def owned(domain, num_experts, num_domains):
    """The experts of a domain."""
    if domain < 0:
        return set(range(num_experts))
    if num_experts < num_domains:
        return {domain % num_experts}
    return {e for e in range(num_experts) if e % num_domains == domain % num_domains}


def check(x, params, case, given, chosen, weight):
    fields = DEFAULTS | case["fields"]
    assert not chosen[~given.mask].any(), "padding is routed"
    seen = {}
    for t in np.flatnonzero(given.mask):
        domain = int(given.domain[t])
        own = owned(domain, case["num_experts"], fields["num_domains"])
        experts = {int(e) for e in np.flatnonzero(chosen[t])}
        assert experts <= own, f"domain {domain} owns {own}, a token is sent to {experts}"
        number = min(fields["k"], len(own))
        assert len(experts) == number, f"{len(experts)} experts, not {number}"
        np.testing.assert_allclose(weight[t], chosen[t] / number, rtol=1e-6)
        if domain >= 0:
            first = seen.setdefault((int(given.token_id[t]), domain), experts)
            assert first == experts, f"id {given.token_id[t]} has two sets of experts"
    assert not weight[~chosen].any(), "a weight where nothing is chosen"


def example():
    # Two domains: 0 owns the experts 0 and 2, 1 owns 1 and 3. k = 2 takes both, so nothing is open.
    # Domain 3 counts as 3 mod 2 = 1.
    return dict(
        x=np.zeros((3, 1)),
        params={},
        case=dict(num_experts=4, fields=dict(k=2, num_domains=2), train=True, bias=False),
        given=dict(
            token_id=np.array([7, 8, 9]),
            domain=np.array([0, 1, 3]),
            mask=np.array([True, True, True]),
        ),
        chosen=np.array([[1, 0, 1, 0], [0, 1, 0, 1], [0, 1, 0, 1]], bool),
        weight=np.array([[0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5], [0, 0.5, 0, 0.5]]),
    )
