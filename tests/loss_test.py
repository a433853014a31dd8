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


def kl_by_hand(hidden, head, teacher, teacher_head, tau):
    """KL(teacher || student) of every token in float64, times tau^2."""
    q, p = (
        np.asarray(h, np.float64) @ np.asarray(w, np.float64).T / tau
        for h, w in ((hidden, head), (teacher, teacher_head))
    )
    log_q, log_p = (a - np.log(np.exp(a).sum(axis=1, keepdims=True)) for a in (q, p))
    return tau**2 * np.sum(np.exp(log_p) * (log_p - log_q), axis=1)


@pytest.fixture(scope="module")
def teacher():
    keys = jax.random.split(jax.random.key(1), 2)
    return jax.random.normal(keys[0], (12, 6)), jax.random.normal(keys[1], (20, 6))


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [0, 4, 5])
def test_divergence_matches_the_plain_formula(case, teacher, chunk, tau):
    hidden, head, _, weight = case
    want = kl_by_hand(hidden, head, *teacher, tau)

    def run(hidden, head, teacher_hidden, teacher_head):
        total, _ = loss.divergence(hidden, head, teacher_hidden, teacher_head, weight, chunk, tau)
        return 3.0 * total

    got, grads = jax.jit(jax.value_and_grad(run, (0, 1, 2, 3)))(hidden, head, *teacher)
    np.testing.assert_allclose(got, 3 * np.sum(want * np.asarray(weight)), rtol=1e-5)
    _, nats = loss.divergence(hidden, head, *teacher, weight, chunk, tau)
    np.testing.assert_allclose(nats, want, rtol=1e-4, atol=1e-6)

    def plain_kl(hidden, head):
        log_q, log_p = (jax.nn.log_softmax(h @ w.T / tau) for h, w in ((hidden, head), teacher))
        return 3.0 * tau**2 * jnp.sum(weight[:, None] * jnp.exp(log_p) * (log_p - log_q))

    for a, b in zip(grads[:2], jax.grad(plain_kl, (0, 1))(hidden, head), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert not np.any(grads[2]) and not np.any(grads[3])  # the teacher learns nothing


def test_nothing_diverges_from_itself(case):
    hidden, head, _, weight = case
    _, nats = loss.divergence(hidden, head, hidden, head, weight, 4, 1.0)
    np.testing.assert_allclose(nats, 0, atol=1e-6)


def test_divergence_by_hand():
    # Two words. Teacher: logits (ln 3, 0), p = (3/4, 1/4). Student: (0, 0), q = (1/2, 1/2).
    # KL = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.304098831 - 0.173286795 = 0.130812036.
    head = jnp.array([[1.0], [0.0]])
    student, wise = jnp.zeros((1, 1)), jnp.log(jnp.array([[3.0]]))
    total, _ = loss.divergence(student, head, wise, head, jnp.ones(1), 0, 1.0)
    np.testing.assert_allclose(total, 0.130812036, rtol=1e-6)


def test_divergence_ignores_padding_with_nan(case, teacher):
    hidden, head, _, weight = case
    broken = hidden.at[3].set(jnp.nan)  # weight 0
    run = jax.value_and_grad(
        lambda h, w: loss.divergence(h, w, *teacher, weight, 4, 1.0)[0], (0, 1)
    )
    value, grads = run(broken, head)
    wanted, wanted_grads = run(hidden, head)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    assert np.isfinite(grads[0]).all() and not np.any(grads[0][3])
