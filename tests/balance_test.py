"""Balancing mechanisms: hand-worked losses, exact balance, the bias controller."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routing_test import route

from moelab import balance


def loss(kind, logit, state=None, **fields):
    mechanism = balance.make(kind, coefficient=1.0)
    return float(mechanism.loss(route("top_k", logit, **fields), state or {}))


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
    total = {"count_E": jnp.array([4.0, 1.0, 1.0])}
    bias = mechanism.update(mechanism.init(3), total)["bias_E"]
    # Zero mean subtracts (.1 + .1 - .1) / 3 = .1 / 3 from each step.
    wanted = wanted or [-0.1 - 0.1 / 3, 0.1 - 0.1 / 3, 0.1 - 0.1 / 3]
    np.testing.assert_allclose(bias, wanted, rtol=1e-6)


def test_bias_rests_at_balance():
    mechanism = balance.make("loss_free_bias", rate=0.1)
    bias = mechanism.update(mechanism.init(2), {"count_E": jnp.array([3.0, 3.0])})["bias_E"]
    np.testing.assert_array_equal(bias, [0, 0])


def test_bias_balances_a_skewed_router():
    logit = np.random.default_rng(0).normal(size=(64, 4)) + np.array([2.0, 0, 0, 0])
    mechanism = balance.make("loss_free_bias", rate=0.02)
    state = mechanism.init(4)
    first = None
    for _ in range(60):
        routing = route("top_k", logit, k=1, bias=mechanism.selection_bias(state))
        total = mechanism.observe(routing)
        first = first if first is not None else total["count_E"]
        state = mechanism.update(state, total)
    assert first.max() > 40  # 16 would be balanced
    assert total["count_E"].max() <= 20


@pytest.mark.parametrize("kind", balance.KINDS)
def test_contract(kind):
    """Off by default, finite loss with finite gradient, statistics that add up, state unchanged in shape."""
    assert balance.make(kind).strength == 0
    first = dataclasses.fields(balance.module(kind).Mechanism)[0].name
    mechanism = balance.make(kind, **{first: 0.5})
    assert mechanism.strength == 0.5
    state = mechanism.init(4)

    def total_loss(logit):
        return mechanism.loss(route_traced(logit), state)

    logit = jax.random.normal(jax.random.key(0), (8, 4))
    value, grad = jax.value_and_grad(total_loss)(logit)
    assert np.isfinite(value) and np.isfinite(grad).all()
    assert (np.abs(grad).max() > 0) == mechanism.has_loss
    whole = mechanism.observe(route_traced(logit))
    parts = [mechanism.observe(route_traced(part)) for part in (logit[:3], logit[3:])]
    jax.tree.map(lambda w, a, b: np.testing.assert_allclose(w, a + b, rtol=1e-6), whole, *parts)
    new = mechanism.update(state, whole)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(new))


def route_traced(logit):
    from routing_test import make_inputs

    from moelab import routers

    router = routers.make("top_k", num_experts=logit.shape[1], k=2)
    x = jnp.eye(logit.shape[0])
    return router.apply({"params": {"kernel": logit}}, x, make_inputs(logit.shape[0]), None)
