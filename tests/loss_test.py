"""Chunked cross-entropy against the plain formula, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moelab import loss


def plain(hidden, head, target, weight):
    logit = hidden @ head.T
    own = jnp.take_along_axis(logit, target[:, None], axis=1)[:, 0]
    return jnp.sum(weight * (jax.nn.logsumexp(logit, axis=1) - own))


@pytest.fixture(scope="module")
def case():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (12, 8))
    head = jax.random.normal(keys[1], (20, 8))
    target = jax.random.randint(keys[2], (12,), 0, 20)
    weight = jnp.where(jnp.arange(12) % 4 == 3, 0.0, 0.25)
    return hidden, head, target, weight


@pytest.mark.parametrize("chunk", [0, 4, 5, 12])  # 5 does not divide 12: all at once
def test_matches_the_plain_formula(case, chunk):
    hidden, head, target, weight = case
    wanted, wanted_grads = jax.value_and_grad(plain, (0, 1))(*case)
    run = lambda h, w: loss.cross_entropy(h, w, target, weight, chunk)[0] * 3.0  # noqa: E731
    got, grads = jax.jit(jax.value_and_grad(run, (0, 1)))(hidden, head)
    np.testing.assert_allclose(got, 3 * wanted, rtol=1e-6)
    for a, b in zip(grads, wanted_grads, strict=True):
        np.testing.assert_allclose(a, 3 * b, rtol=1e-5, atol=1e-6)
    _, nats = loss.cross_entropy(hidden, head, target, weight, chunk)
    np.testing.assert_allclose(jnp.sum(nats * weight), wanted, rtol=1e-6)


def test_uniform_logits_cost_log_v():
    # Zero hidden vectors: every token costs ln 20 nats.
    _, nats = loss.cross_entropy(
        jnp.zeros((4, 8)), jnp.ones((20, 8)), jnp.zeros((4,), jnp.int32), jnp.ones((4,)), 2
    )
    np.testing.assert_allclose(nats, np.full(4, np.log(20)), rtol=1e-6)


def test_large_logits_do_not_overflow(case):
    hidden, head, target, weight = case
    value, grads = jax.value_and_grad(lambda h: loss.cross_entropy(h, head, target, weight, 4)[0])(
        hidden * 1e4
    )
    assert np.isfinite(value) and np.isfinite(grads).all()


def test_padding_with_nan_does_not_leak(case):
    hidden, head, target, weight = case
    hidden = hidden.at[3].set(jnp.nan)  # weight 0
    assert np.isfinite(loss.cross_entropy(hidden, head, target, weight, 4)[0])
