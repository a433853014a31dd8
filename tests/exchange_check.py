"""Run by exchange_test in a process with 8 virtual devices: experts split over them against experts on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from moelab import exchange, experts, parallel, routing

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
E, T, D, F, K = 16, 64, 8, 4, 2
WEIGHTS = experts.init_swiglu(jax.random.key(0), (E,), D, F, 1.0)
X = jax.random.normal(jax.random.key(1), (T, D))
WEIGHT_N = jax.random.uniform(jax.random.key(2), (T * K,))
TOKEN_N = jnp.repeat(jnp.arange(T, dtype=jnp.int32), K)


def of_choice(x_TD, expert_N, weight_N, weights, devices, factor):
    """Output and which assignments were computed, with the experts split over `devices` (None: not split)."""

    def local(x_TD, expert_N, weight_N, weights):
        count = x_TD.shape[0]
        token_N = jnp.repeat(jnp.arange(count, dtype=jnp.int32), K)
        routed = routing.Routing(token_N, expert_N, weight_N, None)
        if devices is None:
            y_TD = experts.apply(weights, x_TD, routed, assignments_per_token=K)
            return y_TD, jnp.ones_like(expert_N, bool)
        options = dict(assignments_per_token=K, axis=parallel.DATA, receive_factor=factor)
        return experts.apply_parallel(weights, x_TD, routed, **options)

    mesh = parallel.make_mesh(devices or 1)
    specs = (P(parallel.DATA),) * 4
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(parallel.DATA))
    return mapped(x_TD, expert_N, weight_N, weights)


@functools.partial(jax.jit, static_argnums=(1, 2))
def run(expert_N, devices, factor):
    """Output, kept, and gradients of x, weights of assignments and experts."""

    def loss(x_TD, weight_N, weights):
        y_TD, kept_N = of_choice(x_TD, expert_N, weight_N, weights, devices, factor)
        return jnp.sum(jnp.sin(y_TD)), (y_TD, kept_N)

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, (y_TD, kept_N)), gradients = gradient(X, WEIGHT_N, WEIGHTS)
    return y_TD, kept_N, gradients


def check_equal(expert_N, devices):
    whole, split = run(expert_N, None, 0.0), run(expert_N, devices, 0.0)
    assert np.asarray(split[1]).all()
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(near, (whole[0], whole[2]), (split[0], split[2]))


choices = {
    "random": jax.random.randint(jax.random.key(3), (T * K,), 0, E),
    "some of nobody": jax.random.randint(jax.random.key(4), (T * K,), 0, E + 1),
    "all to one": jnp.full((T * K,), 5, jnp.int32),
    "all to the last": jnp.full((T * K,), E - 1, jnp.int32),
    "nobody": jnp.full((T * K,), E, jnp.int32),
}
for name, expert_N in choices.items():
    for devices in (1, 2, 8):
        check_equal(expert_N.astype(jnp.int32), devices)
        print("equal:", name, devices)

# Room for the N = 16 rows that a device has: of 8 * 16 rows to expert 5, on device 2, the first sender's are computed.
y_TD, kept_N, _ = run(choices["all to one"], 8, 1.0)
assert np.flatnonzero(kept_N).tolist() == list(range(16)), kept_N
whole = run(choices["all to one"], None, 0.0)[0]
np.testing.assert_allclose(y_TD[:8], whole[:8], rtol=1e-5, atol=1e-6)
assert (np.asarray(y_TD[8:]) == 0).all()
# Some room is missing: what is kept is what a plan by hand keeps, and the rest contributes nothing.
y_TD, kept_N, _ = run(choices["random"].astype(jnp.int32), 8, 1.25)
left, wanted = dict.fromkeys(range(8), 20), np.asarray(choices["random"])
for sender in range(8):
    mine = range(sender * 16, sender * 16 + 16)
    for n in sorted(mine, key=lambda n: (wanted[n], n)):  # by expert, then in order
        owner = wanted[n] // 2
        assert bool(kept_N[n]) == (left[owner] > 0), n
        left[owner] -= 1
assert not np.asarray(kept_N).all()
some = jnp.asarray(np.where(kept_N, wanted, E).astype(np.int32))
np.testing.assert_allclose(y_TD, run(some, None, 0.0)[0], rtol=1e-5, atol=1e-6)
assert exchange.room(16, 8, 0) == 128 and exchange.room(16, 8, 1.25) == 20
assert exchange.room(16, 2, 9.0) == 32
print("experts split over devices: equal")
