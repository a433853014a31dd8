"""Routing values: selection, capacity in slot-major priority, scores; hand-worked numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routing_cases import make_inputs

from moelab import balance, capacity, routers, routing, scores
from moelab.routers import gshard, top_k


def route(kind, logit_TE, *, mask=None, bias=None, **fields):
    """Routes tokens whose logits are given: identity tokens make the kernel the logits."""
    logit_TE = np.asarray(logit_TE, np.float32)
    router = routers.make(kind, num_experts=logit_TE.shape[1], **fields)
    params = {"params": {"kernel": jnp.asarray(logit_TE)}}
    x_TD = jnp.eye(logit_TE.shape[0], dtype=jnp.float32)
    return router.apply(params, x_TD, make_inputs(logit_TE.shape[0], mask=mask), bias)


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
    # Three tokens, first choices 0 0 0, second choices 1 1 1; one expert takes ceil(.5 * 6 / 2) = 2.
    # Slot-major queues: tokens 0, 1, 2 of either expert; the third has no place.
    expert_TK = jnp.array([[0, 1], [0, 1], [0, 1]])
    found = routing.Scores(*[jnp.zeros((3, 2))] * 3)
    routed = routing.from_token_choice(expert_TK, jnp.ones((3, 2)), found, make_inputs(3), 2)
    limit = capacity.limit(6, 2, 0.5)
    assert limit == 2
    r = capacity.drop(routed, 2, 2, limit)
    np.testing.assert_array_equal(r.expert_N, [0, 1, 0, 1, 2, 2])
    np.testing.assert_array_equal(r.weight_N, [1, 1, 1, 1, 0, 0])


def test_select_reads_and_its_gradient_is_dense():
    value = jnp.arange(6.0).reshape(2, 3)
    index = jnp.array([[2, 0], [1, 1]])
    np.testing.assert_array_equal(scores.select(value, index), [[2, 0], [4, 4]])
    grad = jax.grad(lambda v: jnp.sum(scores.select(v, index)))(value)
    np.testing.assert_array_equal(grad, [[1, 0, 1], [0, 2, 0]])


def test_router_computes_in_float32_for_bfloat16_tokens():
    x = jax.random.normal(jax.random.key(0), (8, 16)).astype(jnp.bfloat16)
    kernel = jax.random.normal(jax.random.key(1), (16, 4))
    wanted = np.asarray(x.astype(jnp.float32), np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(scores.logits(x, kernel), wanted, rtol=0, atol=1e-5)


def test_scores_of_sigmoid_normalise_without_an_epsilon():
    # Logits so low that sigmoid underflows in float32: the normalised scores still sum to one.
    _, prob = scores.score(jnp.full((1, 4), -200.0), "sigmoid")
    np.testing.assert_allclose(prob, np.full((1, 4), 0.25), rtol=1e-6)


def test_unknown_kind_lists_the_kinds():
    with pytest.raises(ValueError, match="unknown router kind 'topk'; choose from .*top_k"):
        routers.make("topk")


@pytest.mark.parametrize(
    "kind, fields, words",
    [
        ("top_k", dict(k=9), "k must be at most moe.num_experts=8, got 9"),
        ("top_k", dict(k=0), "k must be at least 1, got 0"),
        ("top_k", dict(num_experts=0), "num_experts must be at least 1, got 0"),
        ("top_k", dict(score="tanh"), "score must be one of softmax"),
        ("group_limited", dict(num_groups=3), "num_groups must divide moe.num_experts=8, got 3"),
        ("group_limited", dict(groups_per_token=3), "groups_per_token must be in 1..num_groups=2"),
        # One group of four has two experts: the third would come from a group that is closed.
        ("group_limited", dict(num_groups=4, k=3), "k must be at most 2, the experts of 1 groups"),
        ("gshard", dict(k=3), "k must be 2"),
        ("base", dict(k=2), "k must be 1"),
        ("batch_priority", dict(k=9), "k must be at most"),
        ("sinkhorn", dict(tolerance=0.0, max_iterations=0), "tolerance .*; max_iterations"),
    ],
)
def test_fields_that_a_config_may_not_have_are_refused_from_python(kind, fields, words):
    fields = dict(num_experts=8) | fields
    with pytest.raises(ValueError, match=words):
        routers.make(kind, **fields)
    assert routers.declare(kind, **fields).num_experts == fields["num_experts"]


def test_a_router_that_was_not_made_refuses_to_route():
    class Mine(top_k.Router):
        """Of no file in the folder: its k is checked nevertheless."""

    x_TD, inputs = jnp.zeros((4, 8)), make_inputs(4)
    for router in (gshard.Router(num_experts=8, k=3), Mine(num_experts=2, k=3)):
        with pytest.raises(ValueError, match="k must be"):
            router.init(jax.random.key(0), x_TD, inputs, None)
    Mine(num_experts=4, k=3).init(jax.random.key(0), x_TD, inputs, None)


def test_checks_that_want_a_whole_config_are_left_to_its_validation(monkeypatch):
    def validate(fields, config):
        return [("k", "is one too many")] if config.train.num_steps > 9 else []

    monkeypatch.setattr(top_k, "validate", validate)
    assert routers.make("top_k", num_experts=8, k=3).k == 3
    with pytest.raises(ValueError, match="k must be at most"):
        routers.make("top_k", num_experts=2, k=3)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(estimator="ema"), "must be one of exact, histogram, local_mean .*, got 'ema'"),
        (dict(bins=1), "bins must be at least 2"),
        (dict(span=0.0), "span must be above 0"),
        (dict(rate=1.5), "rate must be in 0..1"),
    ],
)
def test_quantile_bias_does_what_it_is_told_or_refuses(fields, words):
    with pytest.raises(ValueError, match=words):
        balance.make("quantile_bias", **fields)
