"""Run by loss_test in a process with 8 virtual devices: both losses and their gradients, sharded and not."""

import jax
import jax.numpy as jnp
import numpy as np

from moelab import loss, parallel

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

keys = jax.random.split(jax.random.key(0), 5)
hidden, wise = jax.random.normal(keys[0], (48, 8)), jax.random.normal(keys[1], (48, 6))
head, wise_head = jax.random.normal(keys[2], (20, 8)), jax.random.normal(keys[3], (20, 6))
target = jax.random.randint(keys[4], (48,), 0, 20)
weight = jnp.where(jnp.arange(48) % 5 == 3, 0.0, 1 / 48)


def entropy(hidden, head, mesh):
    return loss.sharded_cross_entropy(hidden, head, target, weight, chunk=3, mesh=mesh)


def divergence(hidden, head, mesh):
    return loss.sharded_kl(
        hidden, head, wise, wise_head, weight, chunk=3, mesh=mesh, temperature=1.5
    )


def run(function, num_devices):
    """((loss, nats of the tokens), gradients) on so many devices; the loss is scaled, so that its cotangent counts."""
    mesh = parallel.make_mesh(num_devices)

    def scaled(hidden, head):
        value, nats_T = function(hidden, head, mesh)
        return 3.0 * value, nats_T

    return jax.jit(jax.value_and_grad(scaled, (0, 1), has_aux=True))(hidden, head)


alone = {
    entropy: lambda h, w: loss.cross_entropy(h, w, target, weight, 0),
    divergence: lambda h, w: loss.divergence(h, w, wise, wise_head, weight, 0, 1.5),
}
for function, plain in alone.items():
    (total, nats_T), pull = jax.value_and_grad(plain, (0, 1), has_aux=True)(hidden, head)
    wanted = (3 * total, nats_T), tuple(3 * g for g in pull)
    for num_devices in (1, 2, 8):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
            run(function, num_devices),
            wanted,
        )
print("equal on 1, 2 and 8 devices")
