"""Few rows per expert: products from the left with plain and packed weights, piece by piece, against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import packed_run
import pytest
import tiny
from jax.sharding import Mesh, PartitionSpec

import pallas_kernels
from moelab import generate, model
from pallas_kernels import MatmulPrecision, formats
from pallas_kernels.grouped_matmul import few_rows, windows

E, N, K, F = 6, 48, 64, 32
FORMATS = ("nvfp4", "nvfp4_2d", "nvfp4_46", "nvfp4_46_2d", "mxfp4")
# float32 sums of 64 products of order 1, in another order, also of two such products after each other.
CLOSE = dict(rtol=1e-5, atol=2e-5)
# Rows of each expert: single rows, an empty expert, more rows than the smallest height, and a tail of 2.
SIZES = (1, 0, 9, 1, 3, 1)
ROWS = 17


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Pieces of 20 output rows, so that the last of three overlaps; two heights, which halves the compilation."""
    monkeypatch.setattr(few_rows, "_PIECE_BYTES", dict.fromkeys((True, False), 20 * 4 * K))
    monkeypatch.setattr(few_rows, "_PIECE_SHARE", 1.0)
    monkeypatch.setattr(few_rows, "_FEWEST", 1)
    monkeypatch.setattr(windows, "_SMALL", (8,))


def draw(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def packed(seed, *shape, format="nvfp4"):
    return formats.quantize(draw(seed, *shape) * 0.3, format)


def weight(kind, seed, *shape):
    if kind in formats.FORMATS:
        return packed(seed, *shape, format=kind)
    return draw(seed, *shape).astype(kind) * jnp.asarray(0.3, kind)


@functools.partial(
    jax.jit, static_argnums=3
)  # every test cuts pieces alike, so they share programs
def multiply(x, w, sizes, implementation):
    named = dict(implementation=implementation)
    if isinstance(w, formats.BlockScaled):
        return pallas_kernels.quantized_grouped_matmul(x, w, sizes, MatmulPrecision(), **named)
    return pallas_kernels.grouped_matmul(x, w, sizes, **named)


def product(x, w, sizes=SIZES, implementation="xla_windows"):
    return np.array(multiply(x, w, jnp.array(sizes), implementation))


@pytest.mark.parametrize(
    "kind", [*FORMATS, "float32", "bfloat16", "mxfp8_e4m3", "fp8_channel", "int4_group"]
)
def test_every_format_against_the_reference(kind):
    x, w = draw(0, ROWS, K), weight(kind, 1, E, N, K)
    got, want = product(x, w), product(x, w, implementation="reference")
    np.testing.assert_allclose(got, want, **CLOSE)
    assert not np.any(got[sum(SIZES) :])


def test_scales_in_the_tiles_of_tensor_cores():
    x, w = draw(0, ROWS, K), packed(1, E, N, K)
    tiled = formats.arranged(w, "tcgen05")
    np.testing.assert_allclose(product(x, tiled), product(x, w), **CLOSE)


@pytest.mark.parametrize("format", FORMATS)
def test_integers_come_out_exact(format):
    # Codes of whole values and scales of one, so every product is an integer, and every sum below 2^24.
    w = packed(1, E, N, K, format=format)
    one = 0x38 if formats.FORMATS[format].scale == "e4m3" else 127
    whole = np.array(
        [0, 2, 4, 5, 6, 7, 10, 12, 13, 14, 15], np.uint8
    )  # 0, 1, 2, 3, 4, 6 and negative ones
    codes = np.random.default_rng(2).choice(whole, (E, N, K))
    bound = formats.FORMATS[format].scale_bound * 6
    amax = None if w.global_amax is None else jnp.full(E, bound, jnp.float32)
    w = formats.BlockScaled(formats.pack(codes), jnp.full_like(w.scales, one), amax, format, w.rule)
    x = jnp.asarray(np.random.default_rng(3).integers(-8, 9, (ROWS, K)), jnp.float32)
    got = product(x, w)
    # 1/bound is rounded, so the global scale is one to a part in 2^24.
    values = np.asarray(formats.dequantize(w), np.float64).round()
    expert_T = np.repeat(np.arange(E), SIZES)
    want = np.einsum("tk,tnk->tn", np.asarray(x, np.float64)[: len(expert_T)], values[expert_T])
    assert np.abs(want).max() > 100
    np.testing.assert_allclose(got[: len(expert_T)], want, rtol=2**-23, atol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_decoding_is_exact_for_every_code_and_scale(format):
    """The product with the identity is the transposed weight, to the bit."""
    scale = formats.FORMATS[format].scale
    # 2^125 * 6 is the last that is finite for every code; E4M3 has 0 to 448, subnormals among them.
    bytes_S = (
        np.arange(0, 253, dtype=np.uint8) if scale == "e8m0" else np.arange(127, dtype=np.uint8)
    )
    block = formats.FORMATS[format].block
    code = np.tile(np.arange(16, dtype=np.uint8), (1, len(bytes_S), 4))
    amax = None if scale == "e8m0" else jnp.full(1, 3.0, jnp.float32)
    scales = np.repeat(bytes_S[None, :, None], 64 // block, axis=2)
    rule = formats.FORMATS[format].rules[0]
    w = formats.BlockScaled(
        formats.pack(jnp.asarray(code)), jnp.asarray(scales), amax, format, rule
    )
    got = jax.jit(few_rows.times)(jnp.eye(64), w, jnp.int32(0))
    want = np.asarray(formats.dequantize(w))[0]
    np.testing.assert_array_equal(np.asarray(got).T, want)
    # The smallest scales are not flushed: 2^-127 * 6 is no subnormal.
    assert (np.abs(want).max(axis=1) > 0)[1:].all()
    assert scale == "e4m3" or want[0].max() == 6 * 2.0**-127
    # And so for a single row, which is multiplied while the weight is decoded.
    single = jax.jit(few_rows.times)
    for k in (0, 1, 17, 62):
        got = single(jnp.eye(64)[k : k + 1], w, jnp.int32(0))
        np.testing.assert_array_equal(np.asarray(got)[0], want[:, k])


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_a_nan_scale_gives_nan_in_its_output_and_nowhere_else(format):
    x, w = draw(0, ROWS, K), packed(1, E, N, K, format=format)
    nan = 0x7F if format == "nvfp4" else 0xFF
    codes = w.codes.at[2, 5].set(0)
    bad = formats.BlockScaled(codes, w.scales.at[2, 5, 1].set(nan), w.global_amax, w.format, w.rule)
    got, clean = product(x, bad), product(x, w)
    rows = np.repeat(np.arange(E), SIZES) == 2
    assert np.isnan(got[: len(rows)][rows, 5]).all()
    got[: len(rows)][rows, 5] = clean[: len(rows)][rows, 5]
    np.testing.assert_array_equal(got, clean)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4", "float32"])
def test_a_row_does_not_see_the_others(kind):
    x, w = draw(0, ROWS, K), weight(kind, 1, E, N, K)
    whole = product(x, w)
    for row in (0, 5, sum(SIZES) - 1):
        others = jnp.full_like(x, jnp.nan).at[row].set(x[row])
        np.testing.assert_array_equal(product(others, w)[row], whole[row])
        # Alone: the sums may be in another order, since a single row is a product of another shape.
        expert = np.repeat(np.arange(E), SIZES)[row]
        alone = product(x[row : row + 1], w, np.int32(np.arange(E) == expert))
        np.testing.assert_allclose(alone[0], whole[row], **CLOSE)
    assert not np.any(product(jnp.full_like(x, jnp.nan), w)[sum(SIZES) :])


def test_the_gradient_of_x_is_that_of_the_reference():
    x, w, dy = draw(0, ROWS, K), packed(1, E, N, K), draw(2, ROWS, N)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, x, w, dy):
        def call(x):
            return pallas_kernels.quantized_grouped_matmul(
                x, w, jnp.array(SIZES), MatmulPrecision(), implementation=implementation
            )

        y, pull = jax.vjp(call, x)
        return y, *pull(dy)

    for got, want in zip(run("xla_windows", x, w, dy), run("reference", x, w, dy), strict=True):
        np.testing.assert_allclose(got, want, **CLOSE)


@pytest.mark.parametrize("rows", [ROWS, 300])
@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4", "bfloat16"])
def test_feed_forward_with_few_rows_and_with_many(kind, rows):
    experts = E if rows == ROWS else 2
    assert windows.few(rows, experts) == (rows == ROWS)
    sizes = jnp.array(SIZES if rows == ROWS else (170, 129))
    x = draw(0, rows, K, dtype=jnp.bfloat16 if kind == "bfloat16" else jnp.float32)
    gate_up, down = weight(kind, 1, experts, 2 * F, K), weight(kind, 2, experts, K, F)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, x, gate_up, down):
        return pallas_kernels.expert_mlp(
            x, gate_up, down, sizes, out_dtype=jnp.float32, implementation=implementation
        )

    got, want = (run(name, x, gate_up, down) for name in ("xla_windows", "reference"))
    # bfloat16 activations between the layers: a sum in another order may round one of them the other way.
    close = dict(rtol=1e-2, atol=3e-2) if kind == "bfloat16" else CLOSE
    np.testing.assert_allclose(got, want, **close)
    assert not np.any(got[int(sizes.sum()) :])


@pytest.mark.parametrize("per_token", [2, None])
def test_one_token(per_token):
    """What generation does: one token, its experts, one row each."""
    x, weight_N = draw(0, 1, K), draw(3, 2)
    gate_up, down = packed(1, E, 2 * F, K), packed(2, E, K, F)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, x, expert_N):
        return pallas_kernels.routed_expert_mlp(
            x,
            jnp.zeros(2, jnp.int32),
            expert_N,
            weight_N,
            gate_up,
            down,
            assignments_per_token=per_token,
            implementation=implementation,
        )

    for chosen in ([4, 1], [3, 3], [E, 2], [E, E]):
        expert_N = jnp.array(chosen, jnp.int32)
        got, want = (run(name, x, expert_N) for name in ("xla_windows", "reference"))
        np.testing.assert_allclose(got, want, **CLOSE)


@pytest.mark.parametrize("format, depth", [("nvfp4", 16), ("nvfp4", 48), ("mxfp4", 96)])
def test_a_single_row_of_few_blocks(format, depth):
    x, w = draw(0, 1, depth), packed(1, 3, N, depth, format=format)
    got, want = (product(x, w, (0, 1, 0), name) for name in ("xla_windows", "reference"))
    np.testing.assert_allclose(got, want, **CLOSE)


def test_inside_shard_map():
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    x, w = draw(0, ROWS, K), packed(1, E, N, K)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec("data"),
    )
    def run(x, w, sizes):
        return pallas_kernels.quantized_grouped_matmul(x, w, sizes, MatmulPrecision())

    np.testing.assert_array_equal(run(x, w, jnp.array(SIZES)), product(x, w))


@pytest.mark.parametrize("tokens, experts, k", [(1, 64, 8), (64, 64, 8), (1, 8, 2)])
def test_memory_is_a_fifth_of_float32_weights(tokens, experts, k, monkeypatch):
    monkeypatch.undo()
    width, hidden = 256, 256
    shapes = (experts, 2 * hidden, width), (experts, width, hidden)
    arrays = [jax.ShapeDtypeStruct((tokens, width), jnp.float32)]
    arrays += [jax.eval_shape(lambda s=s: formats.quantize(jnp.zeros(s), "nvfp4")) for s in shapes]
    arrays.append(jax.ShapeDtypeStruct((tokens * k,), jnp.int32))

    def layer(x, gate_up, down, expert_N):
        token_N, weight_N = jnp.repeat(jnp.arange(tokens), k), jnp.ones(tokens * k)
        return pallas_kernels.routed_expert_mlp(
            x, token_N, expert_N, weight_N, gate_up, down, assignments_per_token=k
        )

    temporary = jax.jit(layer).lower(*arrays).compile().memory_analysis().temp_size_in_bytes
    stored = sum(formats.nbytes(a) for a in arrays[1:3])
    plain = sum(4 * np.prod(s) for s in shapes)
    assert 0.14 * plain < stored and stored + temporary <= 0.2 * plain
    if tokens == 1:  # a float32 expert, and the indices of 64 experts
        assert temporary <= 1.1 * plain / experts


@pytest.mark.slow
def test_generation_from_packed_experts():
    """Token by token, the logits and so the tokens of the reference, which multiplies dequantized experts."""
    _, _, _, run = packed_run.make("nvfp4", model=dict(num_layers=2))
    given = {"params": run.rest, "quantized": run.quantized, "router_state": run.router_state}

    def greedy(implementation):
        sections = {name: dict(values) for name, values in packed_run.SECTIONS.items()}
        sections["moe"]["implementation"] = implementation
        sections["model"]["num_layers"] = 2
        transformer = model.from_config(tiny.make_config(**sections), tiny.VOCAB)
        step = jax.jit(generate.model_step(transformer, given, 8))
        cache, token_BL, found = {}, jnp.array([[1]], jnp.int32), []
        for _ in range(8):
            logit_BV, cache = step(cache, token_BL)
            token_BL = generate.sample(logit_BV, jax.random.key(0), temperature=0.0)[:, None]
            found.append((int(token_BL[0, 0]), logit_BV))
        return zip(*found, strict=True)

    (got, got_logits), (want, want_logits) = map(greedy, ("xla_windows", "reference"))
    # Sums in another order through two layers; logits are of order 1.
    np.testing.assert_allclose(got_logits, want_logits, rtol=1e-4, atol=1e-4)
    assert got == want and len(set(got)) > 1
