"""One optimizer step: skipping, accumulation, the bias controller, decay and orthogonalisation by path, schedules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import VOCAB, make_config

from moelab import data, micro_batches, model, optimizer, step

BALANCE = dict(z_loss=dict(coefficient=0.001), loss_free_bias=dict(rate=0.01))


def make_batch(config, seed=0):
    shape = (config.train.batch_size, config.train.length)
    token = (
        np.random.default_rng(seed).integers(0, VOCAB, (shape[0], shape[1] + 1)).astype(np.int32)
    )
    mask = np.ones(shape, bool)
    mask[1, 9:] = False
    zeros = np.zeros(shape, np.int32)
    return data.Batch(token[:, :-1], token[:, 1:], mask, zeros[:, 0], zeros)


@functools.cache
def setup(**train):
    config = make_config(train=train, balance=BALANCE)
    transformer = model.from_config(config, VOCAB)
    shapes = jax.eval_shape(lambda: model.init(transformer, jax.random.key(0)))["params"]
    tx = optimizer.make(config, shapes)
    state = jax.jit(lambda: step.init_state(transformer, tx, 0))()
    return config, state, jax.jit(step.make_train_step(config, transformer, tx))


def bias_of(state):
    return state.router_state["segment_0"]["block_0"]["moe"]["loss_free_bias"]["bias_C"]


def test_a_step_moves_everything_once():
    config, state, train_step = setup()
    new, report = train_step(state, make_batch(config), np.float32(1))
    new, report = train_step(new, make_batch(config, 1), np.float32(1))  # the first rate is 0
    assert int(new.step) == 2 and int(new.skipped) == 0 and bool(report.finite)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), new.params, state.params)
    assert min(jax.tree.leaves(moved)) > 0
    # Two layers, two steps of 0.01 up or down.
    bias = np.abs(np.asarray(bias_of(new), np.float64)).round(4)
    assert set(bias.ravel()) <= {0.0, 0.01, 0.02} and bias.max() > 0
    valid = 4 * 16 - 7
    np.testing.assert_array_equal(report.load_ME.sum(1), [2 * valid] * 2)
    # The language-model loss is reported without the balancing losses.
    wanted = report.loss + 0.001 * report.balance["z_loss"]
    np.testing.assert_allclose(report.total_loss, wanted, rtol=1e-6)


def test_a_nonfinite_loss_leaves_all_but_data_and_counters_untouched():
    config, state, train_step = setup()
    state, _ = train_step(state, make_batch(config), np.float32(1))
    new, report = train_step(state, make_batch(config, 1), np.float32("nan"))
    for name in ("params", "opt_state", "router_state", "key"):
        old, now = getattr(state, name), getattr(new, name)
        jax.tree.map(np.testing.assert_array_equal, now, old)
    assert int(new.step) == 2 and not bool(report.finite)
    assert int(new.skipped) == int(new.skipped_in_row) == 1
    again, _ = train_step(new, make_batch(config, 2), np.float32(1))
    assert int(again.skipped) == 1 and int(again.skipped_in_row) == 0


def test_micro_batches_add_up_to_the_batch():
    """Padding is spread unevenly over the micro-batches: dividing by their own counts would show."""
    config, state, whole = setup()
    _, _, parts = setup(accumulation_steps=2)
    batch = make_batch(config)
    (one, report), (two, report_2) = (f(state, batch, np.float32(1)) for f in (whole, parts))
    np.testing.assert_allclose(report.loss, report_2.loss, rtol=1e-6)
    np.testing.assert_allclose(report.balance["z_loss"], report_2.balance["z_loss"], rtol=1e-6)
    np.testing.assert_allclose(report.gradient_norm, report_2.gradient_norm, rtol=1e-5)
    np.testing.assert_allclose(report.logit_norm_M, report_2.logit_norm_M, rtol=1e-6)
    np.testing.assert_array_equal(report.load_ME, report_2.load_ME)
    np.testing.assert_array_equal(bias_of(one), bias_of(two))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7)  # noqa: E731
    jax.tree.map(close, one.opt_state[0].mu, two.opt_state[0].mu)


def test_clipping_bounds_the_gradient_not_the_report():
    _, state, _ = setup()
    config, _, train_step = setup(clip_norm=0.01)
    new, report = train_step(state, make_batch(config), np.float32(1))
    assert float(report.gradient_norm) > 0.1
    # The first Adam moment is (1 - b1) times the clipped gradient: norm 0.1 * 0.01.
    norm = np.sqrt(sum(float(jnp.sum(m**2)) for m in jax.tree.leaves(new.opt_state[0].mu)))
    np.testing.assert_allclose(norm, 0.001, rtol=1e-3)


def test_only_matrices_decay_and_only_they_are_orthogonalised():
    config = make_config(optimizer=dict(kind="muon"), model=dict(tied_head=False))
    transformer = model.from_config(config, VOCAB)
    params = model.init(transformer, jax.random.key(0))["params"]
    zeros = jax.tree.map(jnp.zeros_like, params)
    adamw = make_config(schedule=dict(warmup_steps=0), model=dict(tied_head=False))
    tx = optimizer.make(adamw, params)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(zeros, tx.init(params), params)
    decayed = {
        path[-1].key
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
        if float(jnp.abs(leaf).max()) > 0
    }
    assert decayed == set(optimizer.MATRICES)
    muon = optimizer.make(config, params)
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), params)
    with jax.numpy_dtype_promotion("standard"):
        state = muon.init(params)
        _, state = muon.update(grads, state, params)  # the first rate is 0
        updates, _ = muon.update(grads, state, params)
    update = updates["segment_0"]["block_0"]["moe"]["experts"]["down"]
    assert update.shape == (2, 4, 32, 32)
    # Newton-Schulz pulls each expert's singular values towards one size; scan's layer axis and E are a batch. Spread is
    # the standard deviation over the mean: .5 for a square Gaussian matrix.
    spread = lambda a: (s := np.linalg.svd(a, compute_uv=False)).std(-1) / s.mean(-1)  # noqa: E731
    gradient = np.asarray(grads["segment_0"]["block_0"]["moe"]["experts"]["down"])
    assert spread(gradient).min() > 0.4
    assert spread(np.asarray(update)).max() < 0.3


@pytest.mark.parametrize(
    "fields, wanted",
    [
        # Warmup 0 to 1 in 2 steps; then half a cosine over 8 steps to 0.1: at step 6 halfway, .55.
        (
            dict(kind="warmup_cosine", warmup_steps=2, final_scale=0.1),
            {0: 0, 1: 0.5, 2: 1, 6: 0.55},
        ),
        # Plateau until step 8, then linear to 0 in 2 steps (a fifth of 10).
        (
            dict(kind="warmup_stable_decay", warmup_steps=2, decay_share=0.2, final_scale=0.0),
            {0: 0, 1: 0.5, 2: 1, 7: 1, 8: 1, 9: 0.5, 10: 0},
        ),
    ],
)
def test_schedules_by_hand(fields, wanted):
    config = make_config(schedule=fields, train=dict(num_steps=10))
    rate = optimizer.schedule(config, 1.0)
    for at, value in wanted.items():
        np.testing.assert_allclose(float(rate(at)), value, atol=1e-6)


def test_split_batch_gives_every_device_its_share_of_each_micro_batch():
    # Eight sequences on two devices (0-3, 4-7), two micro-batches: each takes two from either device.
    parts = micro_batches.split_batch(jnp.arange(8), 2, 2)
    np.testing.assert_array_equal(parts, [[0, 1, 4, 5], [2, 3, 6, 7]])
