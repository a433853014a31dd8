"""The fused expert feed-forward and the routed one, against loops by hand and the reference."""

import functools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import pallas_kernels
from pallas_kernels import MatmulPrecision, formats
from pallas_kernels.grouped_matmul import dispatch, windows

E, D, F, T = 5, 32, 32, 24
CLOSE = dict(rtol=1e-4, atol=1e-5)  # float32 sums of 32 products, twice, in another order


@pytest.fixture(autouse=True)
def low_windows(monkeypatch):
    """Two window heights instead of four: groups take several windows, and compiling takes half as long."""
    monkeypatch.setattr(windows, "_SMALL", (8, 16))


def draw(seed, *shape, scale=1.0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, dtype)


X, GATE_UP, DOWN = draw(0, T, D), draw(1, E, 2 * F, D, scale=0.2), draw(2, E, D, F, scale=0.2)


def mlp_by_hand(x, gate_up, down):
    """SwiGLU of one row by one expert, float64."""
    x, gate_up, down = (np.asarray(a, np.float64) for a in (x, gate_up, down))
    gate, up = np.split(gate_up @ x, 2)
    return down @ (gate / (1 + np.exp(-gate)) * up)


def routed_by_hand(x, token, expert, weight, gate_up, down):
    y = np.zeros(x.shape)
    for t, e, w in zip(token, expert, weight, strict=True):
        if e < gate_up.shape[0]:
            y[t] += w * mlp_by_hand(x[t], gate_up[e], down[e])
    return y


@functools.cache
def sorted_mlp(implementation, precision=None):
    """y, dx, dgate_up, ddown for a cotangent; group sizes traced."""

    @jax.jit
    def run(x, gate_up, down, sizes, dy):
        def mlp(*args):
            return pallas_kernels.expert_mlp(
                *args, sizes, precision=precision, implementation=implementation
            )

        y, pull = jax.vjp(mlp, x, gate_up, down)
        return y, *pull(dy)

    return run


@functools.cache
def routed_mlp(implementation, per_token, precision=None):
    """y and the gradients of x, weight, gate_up, down."""

    @jax.jit
    def run(x, token, expert, weight, gate_up, down, dy):
        def mlp(x, weight, gate_up, down):
            return pallas_kernels.routed_expert_mlp(
                *(x, token, expert, weight, gate_up, down),
                assignments_per_token=per_token,
                precision=precision,
                implementation=implementation,
            )

        y, pull = jax.vjp(mlp, x, weight, gate_up, down)
        return y, *pull(dy)

    return run


def assert_all_close(got, want, **tolerance):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, **(tolerance or CLOSE))


def test_one_row_by_hand():
    # gate = 2*1 = 2, up = 3*1 = 3, silu(2) = 2 / (1 + e^-2) = 1.7615942, times 3 times down 10 = 52.847825
    one = jnp.ones((1, 1))
    y = pallas_kernels.expert_mlp(
        one, jnp.array([[[2.0], [3.0]]]), jnp.array([[[10.0]]]), jnp.array([1])
    )
    np.testing.assert_allclose(y, [[52.847825]], rtol=1e-6)


@pytest.mark.parametrize("implementation", ["xla_windows", "ragged_dot"])
@pytest.mark.parametrize(
    "sizes",
    [(3, 0, 9, 1, 11), (0, 0, 24, 0, 0), (0, 0, 0, 0, 0), (1, 1, 1, 1, 1), (0, 20, 0, 2, 0)],
)
def test_sorted_rows_against_the_reference(implementation, sizes):
    dy, sizes = draw(3, T, D), jnp.array(sizes)
    got = sorted_mlp(implementation)(X, GATE_UP, DOWN, sizes, dy)
    assert_all_close(got, sorted_mlp("reference")(X, GATE_UP, DOWN, sizes, dy))
    y, dx, dgate_up, ddown = got
    assert not np.any(y[sizes.sum() :]) and not np.any(dx[sizes.sum() :])
    assert not np.any(dgate_up[sizes == 0]) and not np.any(ddown[sizes == 0])


def test_the_reference_is_the_loop_by_hand():
    sizes = (3, 0, 9, 1, 8)
    y = sorted_mlp("reference")(X, GATE_UP, DOWN, jnp.array(sizes), X)[0]
    expert = np.repeat(np.arange(E), sizes)
    want = [mlp_by_hand(X[t], GATE_UP[e], DOWN[e]) for t, e in enumerate(expert)]
    np.testing.assert_allclose(y[:21], want, **CLOSE)


def test_nan_beyond_the_groups_stays_there():
    sizes, dy = jnp.array([3, 0, 9, 1, 2]), draw(3, T, D)
    run = sorted_mlp("xla_windows")
    clean = run(X.at[15:].set(0), GATE_UP, DOWN, sizes, dy.at[15:].set(0))
    dirty = run(X.at[15:].set(jnp.nan), GATE_UP, DOWN, sizes, dy.at[15:].set(jnp.nan))
    for a, b in zip(dirty, clean, strict=True):
        np.testing.assert_array_equal(a, b)


def test_bfloat16():
    args = [a.astype(jnp.bfloat16) for a in (X, GATE_UP, DOWN)]
    sizes, dy = jnp.array([3, 0, 9, 1, 8]), draw(3, T, D, dtype=jnp.bfloat16)
    got, want = (sorted_mlp(name)(*args, sizes, dy) for name in ("xla_windows", "reference"))
    assert all(a.dtype == jnp.bfloat16 for a in got)
    # The stored hidden layer is bfloat16 (relative 2^-9), and so are the results.
    for a, b in zip(got, want, strict=True):
        error = np.linalg.norm((a - b).astype(jnp.float32)) / np.linalg.norm(b.astype(jnp.float32))
        assert error < 0.01


def routing(seed, k):
    """Random routing, one in six assignments dropped, one expert without any."""
    rng = np.random.default_rng(seed)
    share = np.append(rng.dirichlet(np.full(E, 0.5)), 0.2)
    share[rng.integers(E)] = 0
    expert = rng.choice(E + 1, size=T * k, p=share / share.sum()).astype(np.int32)
    return np.repeat(np.arange(T, dtype=np.int32), k), expert, rng.random(T * k, np.float32)


@pytest.mark.parametrize("per_token", [3, None])
def test_random_routings_against_a_loop_by_hand(per_token):
    run = routed_mlp(None, per_token)
    for seed in range(12):
        token, expert, weight = routing(seed, 3)
        y = run(X, token, expert, weight, GATE_UP, DOWN, X)[0]
        want = routed_by_hand(X, token, expert, weight, GATE_UP, DOWN)
        np.testing.assert_allclose(y, want, **CLOSE)


@pytest.mark.parametrize(
    ("per_token", "precision"),
    [
        (3, None),
        (None, None),
        (3, MatmulPrecision(w="fp8_channel")),  # one loop
        (None, MatmulPrecision(x="fp8_channel", w="fp8_channel")),  # grouped matmuls
    ],
    ids=["regular", "irregular", "weights", "weights and activations"],
)
def test_routed_gradients_against_the_reference(per_token, precision):
    token, expert, weight = routing(1, 3)
    args = (X, token, expert, weight, GATE_UP, DOWN, draw(4, T, D))
    got = routed_mlp("xla_windows", per_token, precision)(*args)
    assert_all_close(got, routed_mlp("reference", per_token, precision)(*args))
    dweight = got[2]
    assert np.all((dweight == 0) == (expert == E))


def test_irregular_assignments_in_any_order():
    rng = np.random.default_rng(7)
    # Expert choice: token 3 is chosen by nobody, token 5 by all and twice by expert 0; order by expert.
    token = np.concatenate([rng.permutation(np.delete(np.arange(T), 3))[:7] for _ in range(E)])
    token = np.append(token, np.full(E + 1, 5)).astype(np.int32)
    expert = np.append(np.repeat(np.arange(E), 7), [*range(E), 0]).astype(np.int32)
    weight = rng.random(token.size, np.float32)
    args = (X, token, expert, weight, GATE_UP, DOWN, draw(4, T, D))
    got = routed_mlp("xla_windows", None)(*args)
    np.testing.assert_allclose(got[0], routed_by_hand(*args[:-1]), **CLOSE)
    assert_all_close(got, routed_mlp("reference", None)(*args))
    assert not np.any(got[0][3]) and not np.any(got[1][3])


def test_all_experts_for_every_token():
    token = np.repeat(np.arange(T, dtype=np.int32), E)
    expert = np.tile(np.arange(E, dtype=np.int32), T)
    weight = np.random.default_rng(8).random(T * E, np.float32)
    y = routed_mlp(None, E)(X, token, expert, weight, GATE_UP, DOWN, X)[0]
    want = routed_by_hand(X, token, expert, weight, GATE_UP, DOWN)
    np.testing.assert_allclose(y, want, **CLOSE)


@pytest.mark.parametrize("implementation", ["xla_windows", "reference"])
def test_dropped_assignments_cost_nothing_whatever_they_hold(implementation):
    token, expert, weight = routing(2, 3)
    expert = np.where(token == 9, E, expert)  # token 9 goes nowhere
    dy = draw(4, T, D)
    run = routed_mlp(implementation, 3)
    clean = run(X.at[9].set(0), token, expert, weight, GATE_UP, DOWN, dy.at[9].set(0))
    dirty_weight = np.where(expert == E, np.nan, weight)
    dirty = run(
        X.at[9].set(jnp.nan), token, expert, dirty_weight, GATE_UP, DOWN, dy.at[9].set(jnp.nan)
    )
    for a, b in zip(dirty, clean, strict=True):
        np.testing.assert_array_equal(a, b)
    nobody = run(X, token, np.full_like(expert, E), weight, GATE_UP, DOWN, dy)
    assert not any(np.any(a) for a in nobody)


def test_a_token_does_not_depend_on_the_others():
    token, expert, weight = routing(3, 3)
    other = np.where(token < 12, expert, (expert + 1) % (E + 1))
    run = routed_mlp(None, 3)
    a = run(X, token, expert, weight, GATE_UP, DOWN, X)[0]
    b = run(X, token, other, weight, GATE_UP, DOWN, X)[0]
    np.testing.assert_allclose(a[:12], b[:12], rtol=1e-6, atol=1e-6)
    assert np.any(a[12:] != b[12:])


def test_check_grads_on_a_tiny_layer():
    x, gate_up, down = draw(5, 4, 2), draw(6, 2, 6, 2), draw(7, 2, 2, 3)
    weight = jnp.array([0.5, 1.0, -0.3, 0.7, 0.2, 0.9, 1.1, 0.4])
    token, expert = jnp.repeat(jnp.arange(4), 2), jnp.array([0, 1, 1, 1, 2, 0, 0, 2])

    @jax.jit
    def layer(x, weight, gate_up, down):
        return pallas_kernels.routed_expert_mlp(
            x, token, expert, weight, gate_up, down, assignments_per_token=2
        )

    check_grads(
        layer, (x, weight, gate_up, down), order=1, modes=["rev"], eps=1e-2, atol=3e-2, rtol=3e-2
    )


@pytest.mark.parametrize("activations", [None, "fp8_channel"])
def test_packed_weights(activations):
    token, expert, weight = routing(4, 3)
    packed = [formats.quantize(w, "mxfp4") for w in (GATE_UP, DOWN)]
    precision, dy = MatmulPrecision(x=activations, w="mxfp4"), draw(4, T, D)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, x, weight, gate_up, down):
        def layer(x, weight):
            return pallas_kernels.routed_expert_mlp(
                *(x, token, expert, weight, gate_up, down),
                assignments_per_token=3,
                precision=precision,
                implementation=implementation,
            )

        y, pull = jax.vjp(layer, x, weight)
        return y, *pull(dy)

    got = run("xla_windows", X, weight, *packed)
    assert_all_close(got, run("reference", X, weight, *packed))


def test_inside_scan_and_checkpoint():
    token, expert, weight = routing(5, 3)
    layers = (jnp.stack([GATE_UP, GATE_UP * 0.5]), jnp.stack([DOWN, DOWN * 2]))

    def layer(x, weights, implementation=None):
        y = pallas_kernels.routed_expert_mlp(
            *(x, token, expert, weight, *weights),
            assignments_per_token=3,
            implementation=implementation,
        )
        return x + y, None

    def scanned(layers):
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), X, layers)[0] ** 2)

    def unrolled(layers):
        x = X
        for i in range(2):
            x = layer(x, (layers[0][i], layers[1][i]), "reference")[0]
        return jnp.sum(x**2)

    got, want = (jax.jit(jax.value_and_grad(f))(layers) for f in (scanned, unrolled))
    assert_all_close(jax.tree.leaves(got), jax.tree.leaves(want), rtol=1e-4, atol=1e-3)


def test_keys_that_do_not_fit_with_their_numbers_are_sorted_without_overflow():
    # 2^16 keys below 2^16: key * count + number needs 32 bits and a sign.
    key = np.random.default_rng(9).integers(0, 2**16 + 1, 2**16).astype(np.int32)
    order, end = jax.jit(dispatch._sort, static_argnums=1)(key, 2**16)
    np.testing.assert_array_equal(order, np.argsort(key, stable=True))
    np.testing.assert_array_equal(end, np.cumsum(np.bincount(key, minlength=2**16 + 1))[:-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(down=DOWN[:, :, :7]), r"down \(E, D, F\), got \(5, 64, 32\) and \(5, 32, 7\)"),
        (dict(expert=jnp.full(2 * T, E + 1)), r"expert_N must be in 0\.\.5, got 6\.\.6"),
        (dict(token=jnp.full(2 * T, -1)), r"token_N must be in 0\.\.23, got -1\.\.-1"),
        (dict(token=jnp.tile(jnp.arange(T), 2)), "not each token 2 times in order; pass None"),
        (dict(weight=jnp.ones(T)), r"must all be \(N,\), got \[\(48,\), \(48,\), \(24,\)\]"),
        (dict(expert=jnp.zeros(2 * T)), "expert_N must be integers, got float32"),
        (dict(weight=jnp.ones(2 * T, jnp.int32)), "weight_N must be floating point, got int32"),
        (dict(per_token=3), "3 assignments per token of 24 tokens need N = 72, got 48"),
        (dict(implementation="ragged"), "unknown implementation 'ragged'"),
    ],
)
def test_errors_say_what_came_and_what_was_wanted(change, message):
    arguments = dict(
        token=jnp.repeat(jnp.arange(T), 2),
        expert=jnp.zeros(2 * T, jnp.int32),
        weight=jnp.ones(2 * T),
        down=DOWN,
        per_token=2,
        implementation=None,
    )
    arguments |= change
    with pytest.raises(ValueError, match=message):
        pallas_kernels.routed_expert_mlp(
            *(X, arguments["token"], arguments["expert"], arguments["weight"]),
            *(GATE_UP, arguments["down"]),
            assignments_per_token=arguments["per_token"],
            implementation=arguments["implementation"],
        )


SHARDED = """
    import functools, jax, jax.numpy as jnp, numpy as np, pallas_kernels
    from jax.sharding import PartitionSpec as P

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    assert len(jax.devices()) == 8
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    T, E, D, F, K = 32, 3, 4, 6, 2
    x, gate_up, down, dy = draw(T, D), draw(E, 2 * F, D), draw(E, D, F), draw(T, D)
    expert = jnp.asarray(rng.integers(0, E + 1, T * K), jnp.int32)
    weight = jnp.asarray(rng.random(T * K), jnp.float32)

    def layer(regular, implementation, x, expert, weight, gate_up, down):
        token = jnp.repeat(jnp.arange(x.shape[0], dtype=jnp.int32), K)
        return pallas_kernels.routed_expert_mlp(
            x, token, expert, weight, gate_up, down,
            assignments_per_token=K if regular else None, implementation=implementation)

    def run(function):
        loss = lambda x, weight, gate_up, down: jnp.vdot(
            function(x, expert, weight, gate_up, down), dy)
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(x, weight, gate_up, down)

    want = jax.tree.leaves(run(functools.partial(layer, True, "reference")))
    for devices, regular, name in ((8, True, None), (8, False, None), (1, True, None)):
        mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices],
                             axis_types=(jax.sharding.AxisType.Auto,))
        specs = (P("data"), P("data"), P("data"), P(), P())
        sharded = jax.shard_map(functools.partial(layer, regular, name), mesh=mesh,
                                in_specs=specs, out_specs=P("data"), check_vma=True)
        for a, b in zip(jax.tree.leaves(run(sharded)), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    print("same")
"""


def test_inside_shard_map_on_one_and_eight_devices():
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    }
    root = Path(pallas_kernels.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(SHARDED)],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["same"]
