"""Chunked cross-entropy and divergence against the plain formulas: values, gradients, one device and several."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moelab import loss, parallel


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


def test_gradients_are_slopes(case, teacher):
    """Along random directions, of the divergence in float64."""
    hidden, head, _, weight = case
    start = [np.asarray(a, np.float64) for a in (hidden, head)]

    def total(hidden, head):
        return np.sum(kl_by_hand(hidden, head, *teacher, 2.0) * np.asarray(weight))

    run = jax.grad(lambda h, w: loss.divergence(h, w, *teacher, weight, 4, 2.0)[0], (0, 1))
    for i, grad in enumerate(run(hidden, head)):
        for seed in range(3):
            way = np.random.default_rng(seed).normal(size=grad.shape)
            ahead, behind = ([*start] for _ in range(2))
            ahead[i], behind[i] = start[i] + 1e-5 * way, start[i] - 1e-5 * way
            slope = (total(*ahead) - total(*behind)) / 2e-5
            np.testing.assert_allclose(np.sum(grad * way), slope, rtol=2e-5)


def test_nothing_diverges_from_itself(case):
    hidden, head, _, weight = case
    run = jax.value_and_grad(lambda h: loss.divergence(h, head, hidden, head, weight, 4, 1.0)[0])
    value, grads = run(hidden)
    assert value == 0 and not np.any(grads)


@pytest.mark.parametrize("noise", [1e-4, 1e-3, 1e-2])
def test_a_close_student_has_a_small_divergence(noise):
    # About noise^2 / 2 nats, down to 5e-9: less than float32 resolves in a log-probability of -9 (1e-6).
    keys = jax.random.split(jax.random.key(2), 3)
    wise = jax.random.normal(keys[0], (32, 64)) / 8
    head = jax.random.normal(keys[1], (8192, 64))
    hidden = wise + noise / 8 * jax.random.normal(keys[2], wise.shape)
    _, nats = loss.divergence(hidden, head, wise, head, jnp.ones(32), 8, 1.0)
    want = kl_by_hand(hidden, head, wise, head, 1.0)
    np.testing.assert_allclose(nats, want, rtol=1e-4, atol=2e-8)
    assert np.all(nats > -2e-8)


def test_divergence_by_hand():
    # Two words. Teacher: logits (ln 3, 0), p = (3/4, 1/4). Student: (0, 0), q = (1/2, 1/2).
    # KL = 3/4 ln(3/2) + 1/4 ln(1/2) = 0.304098831 - 0.173286795 = 0.130812036.
    head = jnp.array([[1.0], [0.0]])
    student, wise = jnp.zeros((1, 1)), jnp.log(jnp.array([[3.0]]))
    total, _ = loss.divergence(student, head, wise, head, jnp.ones(1), 0, 1.0)
    np.testing.assert_allclose(total, 0.130812036, rtol=1e-6)


def test_temperature_by_hand():
    # tau = 2, logits (2 ln 3, 0): again p = (3/4, 1/4), q = (1/2, 1/2), and KL = 4 * 0.130812036.
    # Slope of the student's first logit: tau * (q - p) = 2 * (1/2 - 3/4) = -1/2; of the second +1/2.
    head = jnp.array([[1.0], [0.0]])
    student, wise = jnp.ones((1, 1)), 2 * jnp.log(jnp.array([[3.0]]))
    run = jax.value_and_grad(
        lambda w: loss.divergence(student, w, wise, head, jnp.ones(1), 0, 2.0)[0]
    )
    value, grad = run(jnp.zeros((2, 1)))
    np.testing.assert_allclose(value, 4 * 0.130812036, rtol=1e-6)
    np.testing.assert_allclose(grad, [[-0.5], [0.5]], rtol=1e-6)


def test_divergence_ignores_padding_with_nan(case, teacher):
    hidden, head, _, weight = case
    wise, wise_head = teacher
    run = jax.value_and_grad(
        lambda h, w, t: loss.divergence(h, w, t, wise_head, weight, 4, 1.0)[0], (0, 1)
    )
    wanted, wanted_grads = run(hidden, head, wise)
    # Token 3 has weight 0, token 7 too.
    value, grads = run(hidden.at[3].set(jnp.nan), head, wise.at[7].set(jnp.inf))
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    for a, b in zip(grads, wanted_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    assert not np.any(grads[0][jnp.array([3, 7])])


def test_divergence_does_not_hide_a_nan(case, teacher):
    hidden, head, _, weight = case
    value, _ = loss.divergence(hidden.at[0].set(jnp.nan), head, *teacher, weight, 4, 1.0)
    assert np.isnan(value)


def test_large_logits_do_not_overflow_the_divergence(case, teacher):
    hidden, head, _, weight = case
    run = jax.value_and_grad(lambda h: loss.divergence(h, head, *teacher, weight, 4, 1.0)[0])
    value, grads = run(hidden * 1e4)
    want = hidden * 1e4 @ head.T
    want = jax.nn.softmax(teacher[0] @ teacher[1].T) * (want.max(1, keepdims=True) - want)
    # The student is one-hot: the divergence is how far below its best word the teacher's words are, and small change.
    np.testing.assert_allclose(value, jnp.sum(want * weight[:, None]), rtol=1e-4)
    assert np.isfinite(grads).all()


def test_divergence_of_bfloat16_states_is_near(case, teacher):
    hidden, head, _, weight = case
    wise, wise_head = teacher
    run = jax.value_and_grad(
        lambda h, w, t: loss.divergence(h, w, t, wise_head, weight, 4, 1.0)[0], (0, 1)
    )
    value, grads = run(hidden.astype(jnp.bfloat16), head, wise.astype(jnp.bfloat16))
    wanted, wanted_grads = run(hidden, head, wise)
    assert value.dtype == grads[1].dtype == jnp.float32 and grads[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(value, wanted, rtol=2e-2)
    for a, b in zip(grads, wanted_grads, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.05 * np.abs(b).max())


def test_bad_input_of_distillation_is_one_error(case, teacher):
    hidden, head, _, weight = case
    mesh = parallel.make_mesh(1)

    def run(head, temperature):
        return loss.sharded_kl(
            hidden, head, *teacher, weight, chunk=4, mesh=mesh, temperature=temperature
        )

    with pytest.raises(ValueError, match="same vocabulary, got 19 words, and 20 of the teacher"):
        run(head[:19], 1.0)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be above 0, got"):
            run(head, temperature)


def test_several_devices_give_the_same():
    """A process of its own has 8 virtual devices."""
    code = os.path.join(os.path.dirname(__file__), "loss_devices_check.py")
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, code],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "equal on 1, 2 and 8 devices" in done.stdout
