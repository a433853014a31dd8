"""No choice depends on a later token where a router says so, and on some later token where it says the contrary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routing_cases import (
    FIELDS,
    apply,
    apply_with_capacity,
    dense,
    make_inputs,
    make_params,
    make_router,
    make_tokens,
    variants,
)
from tiny import VOCAB, make_config

from moelab import capacity, generate, model, moe, routers, routing
from moelab.errors import UserError

LENGTH, NUM_TOKENS, FIRST = 8, 16, 5  # two sequences; the first changes from its token 5 on
ALL = [
    pytest.param(kind, *variant, id=f"{kind}-{i}")
    for kind in routers.KINDS
    for i, variant in enumerate(variants(kind))
]
CAUSAL = [
    case for case in ALL if make_router(case.values[0], case.values[1], **case.values[2]).causal
]


def problem(router, seed, train):
    """Tokens and inputs, and the same with the end of the first sequence changed in every way."""
    columns = router.num_columns if router.uses_previous_logits else None
    mask = np.arange(NUM_TOKENS) != 2
    inputs = make_inputs(
        NUM_TOKENS, length=LENGTH, mask=mask, train=train, seed=seed, num_columns=columns
    )
    x_TD, later = make_tokens(NUM_TOKENS, seed=seed), slice(FIRST, LENGTH)
    other_TD = x_TD.at[later].set(-4 * x_TD[later] + 1)
    other = inputs._replace(token_id_T=inputs.token_id_T.at[later].add(17))
    other = other._replace(mask_T=other.mask_T.at[LENGTH - 1].set(False))
    if columns:
        other = other._replace(previous_logit_TC=inputs.previous_logit_TC.at[later].multiply(-3))
    return (x_TD, inputs), (other_TD, other)


def bias_of(router, seed):
    if not router.takes_bias:
        return None
    return 0.2 * jax.random.normal(jax.random.key(seed + 7), (router.num_columns,))


def rows_that_differ(router, seed, train, route):
    """Tokens whose choice or weight differs between the two problems."""
    params, found = make_params(router, seed=seed), []
    for x_TD, inputs in problem(router, seed, train):
        found.append(dense(router, route(router, params, x_TD, inputs, bias_of(router, seed))))
    (chosen, weight), (other_chosen, other_weight) = found
    near = np.isclose(weight, other_weight, rtol=1e-6, atol=1e-7)
    return np.flatnonzero(~((chosen == other_chosen) & near).all(axis=1))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind, num_experts, fields", CAUSAL)
def test_causality_of_the_choice(kind, num_experts, fields, train):
    router = make_router(kind, num_experts, **fields)
    differ = set(rows_that_differ(router, 0, train, apply).tolist())
    assert differ <= set(range(FIRST, LENGTH)), "a token's choice depends on a later token"
    if router.slots == 1:  # first come, first served
        under = rows_that_differ(router, 0, train, apply_with_capacity)
        assert (under >= FIRST).all()


@pytest.mark.parametrize("kind", routers.KINDS)
def test_causality_is_declared_as_it_is(kind):
    router = make_router(kind)
    assert bool(router.reason) != router.causal, "a router that is not causal says why, others not"
    if router.causal:
        return
    earlier = (rows_that_differ(router, s, True, apply_with_capacity) < FIRST for s in range(20))
    assert any(e.any() for e in earlier), "declared as not causal, but no later token mattered"


@pytest.mark.parametrize("kind, num_experts, fields", ALL)
def test_causality_of_a_block_is_that_of_its_router_and_its_capacity(kind, num_experts, fields):
    router = make_router(kind, num_experts, **fields)

    def leak(factor):
        return moe.MoeConfig(
            router=router, mechanisms=(), expert_width=8, capacity_factor=factor
        ).leak

    assert (leak(0.0) == "") == router.causal
    assert (leak(1.0) == "") == (router.causal and router.slots == 1)


def test_causality_is_lost_under_a_capacity_with_two_choices():
    """Two experts take one token each. Token 0 wants 0, then 1. Its second choice is free or not as token 1 wants."""

    def weights_of_token_0(first, second):
        found = routing.Scores(*[jnp.zeros((2, 2))] * 3)
        column_TK = jnp.array([[0, 1], [first, second]])
        weight_TK = jnp.array([[0.75, 0.25], [0.75, 0.25]])
        routed = routing.from_token_choice(column_TK, weight_TK, found, make_inputs(2), 2)
        return np.asarray(capacity.drop(routed, 2, 2, limit=1).weight_N[:2])

    np.testing.assert_array_equal(weights_of_token_0(0, 1), [0.75, 0.25])
    np.testing.assert_array_equal(weights_of_token_0(1, 0), [0.75, 0.0])


@pytest.mark.parametrize("kind", routers.KINDS)
def test_causality_decides_whether_a_model_generates(kind):
    """A model on paper: generation refuses before it touches a parameter."""
    counts = tuple(range(1, VOCAB + 1))
    fields = {"kind": kind} | FIELDS.get(kind, {})
    factor = float(routers.module(kind).Router.by_score)
    config = make_config(router=fields, moe=dict(num_experts=4, capacity_factor=factor))
    transformer = model.from_config(config, VOCAB, token_counts=counts)
    assert bool(transformer.leak) != routers.module(kind).Router.causal
    if transformer.leak:
        with pytest.raises(UserError, match="looks at later tokens"):
            generate.model_step(transformer, {}, 16)
    else:
        assert callable(generate.model_step(transformer, {}, 16))


def test_causality_of_a_model_names_the_capacity():
    config = make_config(moe=dict(capacity_factor=1.0))
    transformer = model.from_config(config, VOCAB)
    assert "capacity" in transformer.leak
    with pytest.raises(UserError, match="capacity"):
        generate.model_step(transformer, {}, 16)
    single = make_config(moe=dict(capacity_factor=1.0), router=dict(k=1))
    assert model.from_config(single, VOCAB).leak == ""
    assert model.from_config(make_config(moe=dict(num_experts=0)), VOCAB).leak == ""
