"""Run by model_test in a process with 8 virtual devices: one train step on 1 and on 8, accumulated and not."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny import VOCAB, make_config

from moelab import data, model, optimizer, parallel, step

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def run(num_devices, accumulation_steps):
    config = make_config(
        train=dict(batch_size=16, length=8, accumulation_steps=accumulation_steps, head_chunk=8),
        balance=dict(
            switch_loss=dict(coefficient=0.01 if accumulation_steps == 1 else 0.0),
            z_loss=dict(coefficient=0.001),
            loss_free_bias=dict(rate=0.01),
        ),
    )
    mesh = parallel.make_mesh(num_devices)
    transformer = model.from_config(config, VOCAB, mesh)
    shapes = jax.eval_shape(lambda: model.init(transformer, jax.random.key(0)))["params"]
    tx = optimizer.make(config, shapes)
    state = jax.device_put(step.init_state(transformer, tx, 0), parallel.replicated(mesh))
    token = np.random.default_rng(0).integers(0, VOCAB, (16, 9)).astype(np.int32)
    mask = np.ones((16, 8), bool)
    mask[3, 5:] = False
    batch = data.Batch(token[:, :-1], token[:, 1:], mask, np.zeros(16, np.int32), token[:, 1:])
    batch = jax.tree.map(lambda a: jax.device_put(a, parallel.batch_sharding(mesh)), batch)
    train_step = jax.jit(step.make_train_step(config, transformer, tx))
    return jax.device_get(train_step(state, batch, jnp.float32(1.0)))


def compare(one, other):
    (state, report), (state_8, report_8) = one, other
    np.testing.assert_allclose(report.loss, report_8.loss, rtol=1e-5)
    np.testing.assert_allclose(report.gradient_norm, report_8.gradient_norm, rtol=1e-4)
    np.testing.assert_array_equal(report.load_ME, report_8.load_ME)
    for name in report.balance:
        np.testing.assert_allclose(report.balance[name], report_8.balance[name], rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, state.router_state, state_8.router_state)
    # The first Adam step is near lr * sign(g): a gradient near zero may flip, so moments are compared.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6)  # noqa: E731
    jax.tree.map(close, state.opt_state[0].mu, state_8.opt_state[0].mu)


whole, sharded = run(1, 1), run(8, 1)
compare(whole, sharded)
# z-loss and bias are linear in tokens: two micro-batches give what one batch gives.
compare(run(1, 2), run(8, 2))
print("equal on 1 and 8 devices")
