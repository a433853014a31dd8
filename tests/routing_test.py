"""Routing values: selection, capacity in k-major priority, loads; hand-worked numbers and a loop oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelab import routers, routing
from moelab.routers import top_k


def make_inputs(num_tokens, mask=None):
    zeros = jnp.zeros((num_tokens,), jnp.int32)
    mask = jnp.ones((num_tokens,), bool) if mask is None else jnp.asarray(mask)
    return routing.RouterInput(zeros, zeros, zeros, mask, zeros, jnp.zeros((), jnp.int32))


def route(kind, logit_TE, *, mask=None, bias=None, **fields):
    """Routes tokens whose logits are given: identity tokens make the kernel the logits."""
    logit_TE = np.asarray(logit_TE, np.float32)
    router = routers.make(kind, num_experts=logit_TE.shape[1], **fields)
    params = {"params": {"kernel": jnp.asarray(logit_TE)}}
    x_TD = jnp.eye(logit_TE.shape[0], dtype=jnp.float32)
    return router.apply(params, x_TD, make_inputs(logit_TE.shape[0], mask), bias)


LOGIT = np.log(np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], np.float32))


@pytest.mark.parametrize(
    "fields, wanted",
    [
        # Token 0: softmax (.5, .3, .2), top two .5 and .3; token 1: .7 and .2.
        (dict(renormalise=False), [0.5, 0.3, 0.7, 0.2]),
        # Divided by their sums .8 and .9.
        (dict(), [0.5 / 0.8, 0.3 / 0.8, 0.7 / 0.9, 0.2 / 0.9]),
        # Softmax over the two selected logits gives the same ratio.
        (dict(score_before_selection=False, renormalise=False), [5 / 8, 3 / 8, 7 / 9, 2 / 9]),
        # sigmoid(log p) = p / (1 + p): 1/3, 3/13, 7/17, 1/6.
        (dict(score="sigmoid", renormalise=False), [1 / 3, 3 / 13, 7 / 17, 1 / 6]),
        (dict(renormalise=False, scale=2.5), [1.25, 0.75, 1.75, 0.5]),
    ],
)
def test_top_k_weights_by_hand(fields, wanted):
    r = route("top_k", LOGIT, k=2, **fields)
    np.testing.assert_array_equal(r.token_N, [0, 0, 1, 1])
    np.testing.assert_array_equal(r.expert_N, [0, 1, 2, 1])
    np.testing.assert_allclose(r.weight_N, wanted, rtol=1e-6)


def test_bias_selects_and_does_not_enter_the_weight():
    # Token 0 has scores .5 .3 .2; the bias lifts expert 2 to .2 + .4 = .6, above both.
    r = route("top_k", LOGIT, k=1, bias=jnp.array([0.0, 0.0, 0.4]), renormalise=False)
    np.testing.assert_array_equal(r.expert_N, [2, 2])
    np.testing.assert_allclose(r.weight_N, [0.2, 0.7], rtol=1e-6)


def test_ties_go_to_the_lowest_expert():
    r = route("top_k", np.zeros((2, 5)), k=3)
    np.testing.assert_array_equal(r.expert_N, [0, 1, 2, 0, 1, 2])


def test_one_expert_keeps_its_score_so_that_the_router_learns():
    # Divided by its own sum, the weight of k=1 would be the constant 1.
    r = route("top_k", LOGIT, k=1, renormalise=True)
    np.testing.assert_allclose(r.weight_N, [0.5, 0.7], rtol=1e-6)


def test_padding_goes_nowhere():
    r = route("top_k", LOGIT, k=2, mask=[True, False])
    np.testing.assert_array_equal(r.expert_N, [0, 1, 3, 3])
    np.testing.assert_array_equal(np.asarray(r.weight_N[2:]), [0, 0])
    np.testing.assert_array_equal(r.aux.choice_N, [0, 1, 3, 3])


def test_nan_tokens_reach_the_weights_and_stay_in_their_row():
    x_TD = jnp.array([[1.0, 0.0], [jnp.nan, 1.0]])
    for fields in (dict(), dict(score="sigmoid"), dict(score_before_selection=False)):
        router = routers.make("top_k", num_experts=3, k=2, **fields)
        r = router.apply({"params": {"kernel": jnp.asarray(LOGIT)}}, x_TD, make_inputs(2), None)
        weight = np.asarray(r.weight_N)
        assert np.isfinite(weight[:2]).all() and np.isnan(weight[2:]).all()


def test_expert_choice_by_hand():
    # Two experts, three tokens, k=2: C = ceil(3 * 2 / 2) = 3; with k=1 C = ceil(3 / 2) = 2.
    prob = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], np.float32)
    r = route("expert_choice", np.log(prob), k=1)
    # Expert 0 prefers tokens 0 (.9) and 1 (.6); expert 1 tokens 2 (.8) and 1 (.4).
    np.testing.assert_array_equal(r.expert_N, [0, 0, 1, 1])
    np.testing.assert_array_equal(r.token_N, [0, 1, 2, 1])
    np.testing.assert_allclose(r.weight_N, [0.9, 0.6, 0.8, 0.4], rtol=1e-6)


def test_expert_choice_takes_no_padding():
    r = route("expert_choice", np.zeros((4, 2)), k=1, mask=[True, False, False, False])
    valid = np.asarray(r.expert_N) < 2
    assert (np.asarray(r.token_N)[valid] == 0).all() and valid.sum() == 2
    assert (np.asarray(r.weight_N)[~valid] == 0).all()


def test_capacity_by_hand():
    # Three tokens, first choices 0 0 0, second choices 1 1 0; one expert takes ceil(.5 * 6 / 2) = 2.
    # k-major queue of expert 0: tokens 0, 1, 2 (first), then token 2's second... of expert 1: 0, 1.
    expert_TK = jnp.array([[0, 1], [0, 1], [0, 1]])
    aux = routing.from_token_choice(
        expert_TK, jnp.ones((3, 2)), jnp.zeros((3, 2)), jnp.zeros((3, 2)), make_inputs(3)
    )
    limit = routing.capacity(6, 2, 0.5)
    assert limit == 2
    r = routing.drop_over_capacity(aux, 2, 2, limit)
    np.testing.assert_array_equal(r.expert_N, [0, 1, 0, 1, 2, 2])
    np.testing.assert_array_equal(r.weight_N, [1, 1, 1, 1, 0, 0])


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_capacity_against_a_loop(draw):
    num_tokens = draw.draw(st.integers(0, 9))
    k, num_experts, limit = 2, 4, draw.draw(st.integers(1, 4))
    choice = draw.draw(
        st.lists(st.permutations(range(num_experts)), min_size=num_tokens, max_size=num_tokens)
    )
    expert_TK = np.array([c[:k] for c in choice], np.int32).reshape(num_tokens, k)
    r = routing.from_token_choice(
        jnp.asarray(expert_TK),
        jnp.ones((num_tokens, k)),
        jnp.zeros((num_tokens, num_experts)),
        jnp.zeros((num_tokens, num_experts)),
        make_inputs(num_tokens),
    )
    got = routing.drop_over_capacity(r, num_experts, k, limit)
    wanted, used = expert_TK.copy(), [0] * num_experts
    for slot in range(k):
        for token in range(num_tokens):
            expert = expert_TK[token, slot]
            used[expert] += 1
            if used[expert] > limit:
                wanted[token, slot] = num_experts
    np.testing.assert_array_equal(np.asarray(got.expert_N).reshape(num_tokens, k), wanted)
    np.testing.assert_array_equal(np.asarray(got.weight_N) > 0, wanted.reshape(-1) < num_experts)
    np.testing.assert_array_equal(
        routing.load(got.expert_N, num_experts), np.bincount(wanted.ravel(), minlength=5)[:4]
    )


def test_select_reads_and_its_gradient_is_dense():
    value = jnp.arange(6.0).reshape(2, 3)
    index = jnp.array([[2, 0], [1, 1]])
    np.testing.assert_array_equal(routing.select(value, index), [[2, 0], [4, 4]])
    grad = jax.grad(lambda v: jnp.sum(routing.select(v, index)))(value)
    np.testing.assert_array_equal(grad, [[1, 0, 1], [0, 2, 0]])


def test_router_computes_in_float32_for_bfloat16_tokens():
    x = jax.random.normal(jax.random.key(0), (8, 16)).astype(jnp.bfloat16)
    kernel = jax.random.normal(jax.random.key(1), (16, 4))
    wanted = np.asarray(x.astype(jnp.float32), np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(routing.logits(x, kernel), wanted, rtol=0, atol=1e-5)


def test_scores_of_sigmoid_normalise_without_an_epsilon():
    # Logits so low that sigmoid underflows in float32: the normalised scores still sum to one.
    _, prob = top_k.scores(jnp.full((1, 4), -200.0), "sigmoid")
    np.testing.assert_allclose(prob, np.full((1, 4), 0.25), rtol=1e-6)


def test_unknown_kind_lists_the_kinds():
    with pytest.raises(ValueError, match="unknown router kind 'topk'; choose from .*top_k"):
        routers.make("topk")
