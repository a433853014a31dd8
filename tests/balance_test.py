"""Balancing mechanisms: hand-worked losses, exact balance, the bias controller."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routing_cases import apply, make_inputs, make_params, make_router, make_tokens
from routing_test import route
from tiny import make_config

from moelab import balance, config, routers


def loss(kind, logit, state=None, **fields):
    mechanism = balance.make(kind, coefficient=1.0)
    router = router_of(len(logit[0]))
    return float(mechanism.loss(route("top_k", logit, **fields), state or {}, router))


def router_of(num_experts):
    return routers.make("top_k", num_experts=num_experts)


def test_switch_loss_by_hand():
    # Softmax rows (.5 .3 .2) and (.1 .2 .7); first choices 0 and 2: f = (1/2, 0, 1/2), P = (.3, .25, .45).
    # E * sum f P = 3 * (.15 + .225) = 1.125.
    logit = np.log([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    assert loss("switch_loss", logit, k=1) == pytest.approx(1.125, rel=1e-6)
    # k=2: choices 0 1 2 1, f = (1/4, 1/2, 1/4): 3 * (.075 + .125 + .1125) = .9375.
    assert loss("switch_loss", logit, k=2) == pytest.approx(0.9375, rel=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_switch_loss_is_one_at_balance(k):
    logit = np.stack([np.roll([3.0, 2.0, 1.0, 0.0], i) for i in range(4)])
    for score in ("softmax", "sigmoid"):
        assert loss("switch_loss", logit, k=k, score=score) == pytest.approx(1.0, abs=1e-6)


def test_z_loss_by_hand_leaves_padding_out():
    # logsumexp(0, 0) = ln 2; the padded row would add (ln 2 + 5)^2.
    logit = np.array([[0.0, 0.0], [5.0, 5.0]])
    assert loss("z_loss", logit, k=1, mask=[True, False]) == pytest.approx(np.log(2) ** 2, rel=1e-6)


@pytest.mark.parametrize("zero_mean, wanted", [(False, [-0.1, 0.1, 0.1]), (True, None)])
def test_bias_moves_by_the_sign_of_the_load_error(zero_mean, wanted):
    # Counts 4 1 1, mean 2: the first is above, the others below.
    mechanism = balance.make("loss_free_bias", rate=0.1, zero_mean=zero_mean)
    total = {"count_C": jnp.array([4.0, 1.0, 1.0])}
    bias = mechanism.update(mechanism.init(router_of(3)), total, router_of(3))["bias_C"]
    # Zero mean subtracts (.1 + .1 - .1) / 3 = .1 / 3 from each step.
    wanted = wanted or [-0.1 - 0.1 / 3, 0.1 - 0.1 / 3, 0.1 - 0.1 / 3]
    np.testing.assert_allclose(bias, wanted, rtol=1e-6)


def test_bias_rests_at_balance():
    mechanism = balance.make("loss_free_bias", rate=0.1)
    router, total = router_of(2), {"count_C": jnp.array([3.0, 3.0])}
    bias = mechanism.update(mechanism.init(router), total, router)["bias_C"]
    np.testing.assert_array_equal(bias, [0, 0])


def test_bias_balances_a_skewed_router():
    logit = np.random.default_rng(0).normal(size=(64, 4)) + np.array([2.0, 0, 0, 0])
    mechanism = balance.make("loss_free_bias", rate=0.02)
    router = router_of(4)
    state = mechanism.init(router)
    first = None
    for _ in range(60):
        routing = route("top_k", logit, k=1, bias=mechanism.selection_bias(state))
        total = mechanism.observe(routing, state, router)
        first = first if first is not None else total["count_C"]
        state = mechanism.update(state, total, router)
    assert first.max() > 40  # 16 would be balanced
    assert total["count_C"].max() <= 20


@pytest.mark.parametrize("kind", balance.KINDS)
def test_the_first_field_is_the_strength_and_off_by_default(kind):
    assert balance.make(kind).strength == 0
    first = dataclasses.fields(balance.module(kind).Mechanism)[0].name
    assert balance.make(kind, **{first: 0.5}).strength == 0.5


@pytest.mark.parametrize("kind", ["entropy_loss", "mutual_information"])
def test_entropy_has_a_gradient_where_a_probability_is_zero(kind):
    # ReMoE's closed gates are exactly 0, and the slope of p log p there is infinite.
    router = make_router("remoe", 4)
    mechanism = balance.make(kind, coefficient=1.0)
    x_TD, inputs = make_tokens(6), make_inputs(6)

    def loss(params):
        return mechanism.loss(apply(router, params, x_TD, inputs), {}, router)

    params = make_params(router)
    assert (apply(router, params, x_TD, inputs).aux.prob_TC == 0).any()
    value, grads = jax.value_and_grad(loss)(params)
    assert np.isfinite(value) and np.isfinite(grads["kernel"]).all()
    assert np.abs(grads["kernel"]).max() > 0


@pytest.mark.parametrize("estimator", ["exact", "histogram", "local_mean"])
def test_a_step_of_padding_alone_leaves_the_quantile_bias_finite(estimator):
    router = make_router("top_k", 4, k=2)
    mechanism = balance.make("quantile_bias", rate=1.0, estimator=estimator)
    state = {"bias_C": jnp.array([0.1, -0.1, 0.2, -0.2])}
    routed = apply(router, make_params(router), make_tokens(5), make_inputs(5, mask=[False] * 5))
    total = mechanism.observe(routed, state, router) | mechanism.rows(routed, state, router)
    bias_C = mechanism.update(state, total, router)["bias_C"]
    assert np.isfinite(bias_C).all()
    if estimator == "exact":
        np.testing.assert_allclose(bias_C, state["bias_C"], atol=1e-6)


def test_a_histogram_that_covers_the_scores_balances_unbounded_ones():
    # Logits select: margins reach far beyond 1.
    router = make_router("top_k", 4, k=1, score_before_selection=False, renormalise=False)
    params = {"kernel": jnp.eye(4)}
    x_TD = 3 * make_tokens(256, width=4) + jnp.array([[6.0, 0.0, 0.0, -3.0]])
    mechanism = balance.make("quantile_bias", rate=1.0, estimator="histogram", span=30.0)
    state = mechanism.init(router)
    for _ in range(30):
        routed = apply(router, params, x_TD, make_inputs(256), mechanism.selection_bias(state))
        state = mechanism.update(state, mechanism.observe(routed, state, router), router)
    count = np.bincount(routed.aux.choice_N, minlength=4)
    assert count.max() <= 1.15 * 64, count


@pytest.mark.parametrize(
    "sections, path",
    [
        (dict(router=dict(kind="hash")), "balance.loss_free_bias.rate"),
        (dict(router=dict(kind="uniform")), "balance.switch_loss.coefficient"),
        (dict(router=dict(k=4)), "balance.quantile_bias.rate"),
        (dict(router=dict(score="sqrt_softplus")), "balance.quantile_bias.span"),
        (dict(moe=dict(slots_per_expert=2)), "balance.loss_free_bias.rate"),
        (dict(), "balance.load_loss.coefficient"),
    ],
)
def test_what_would_do_nothing_is_refused(sections, path):
    switched_on = dict(
        loss_free_bias=dict(rate=0.1),
        switch_loss=dict(coefficient=0.1),
        quantile_bias=dict(rate=0.5, estimator="histogram"),
        load_loss=dict(coefficient=0.1),
    )
    found = config.validate(make_config(**sections, balance=switched_on))
    assert path in {problem.path for problem in found}


def test_a_misspelt_scope_is_refused_in_python_too():
    with pytest.raises(ValueError, match="scope must be one of .*global_batch"):
        balance.make("switch_loss", scope="batch")
