"""The fused FP4 feed-forward of data-centre Blackwell in interpret mode, with races: hardware layouts are not seen.

T rows sorted by expert, D model width, F expert width, E experts.
"""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import formats, private_jax
from pallas_kernels.grouped_matmul import mosaic_sm100_mlp as mlp
from pallas_kernels.grouped_matmul import reference, row_copies
from pallas_kernels.grouped_matmul.activation import SWIGLU, SwiGLU
from tests.mutants import mosaic_sm100_mlp as mutants
from tests.mutants import mutated, parameters

# Few pseudo-threads stand for asynchronous copies: where two share one, a race between them goes unseen.
_HOW = {
    "num_sms": 1,
    "interpret": plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=32),
}
_TILING = mlp.Tiling(tile_n=256, accumulators=1, stages=2)
_DOWN = mlp.Tiling(stages=2, epilogue_n=64)
_AMAX = (9.0, 1.0, 30.0)  # of act for each expert: some blocks saturate
# NVFP4 as gpt-oss would have it, with a limit that many exceed, and biases; MXFP4 as most models have it.
_CLAMPED = SwiGLU(alpha=1.702, limit=2.0, offset=1.0)


@functools.cache
def _problem(format, sizes=(19, 0, 14), num_rows=40, hidden=256, depth=256):
    """Operands, what the epilogue does with sums, and act in float32 as the reference has it."""
    rng = np.random.default_rng(0)
    x_TD = jnp.asarray(rng.normal(size=(num_rows, depth)), jnp.float32).at[3, 7].set(jnp.nan)
    w_EGD = jnp.asarray(rng.normal(size=(len(sizes), 2 * hidden, depth)) / 8, jnp.float32)
    x, w = formats.quantize(x_TD, format, num_batch_axes=1), formats.quantize(w_EGD, format)
    scale_E = formats.global_scale(w)
    clamped = format == "nvfp4"
    bias_EG = jnp.asarray(rng.normal(size=w.shape[:2]), jnp.bfloat16) if clamped else None
    scales = {
        "expert_scale_E": jnp.ones(len(sizes)) if scale_E is None else scale_E,
        "row_scale_T": formats.global_scale(x),
        "bias_EG": bias_EG,
        "activation": _CLAMPED if clamped else SWIGLU,
    }
    sizes_E = jnp.asarray(sizes, jnp.int32)
    operands = (formats.dequantize(x), w, sizes_E, bias_EG, None, jnp.float32)
    hidden_TG = reference.grouped_matmul(*operands)
    return (x, w, sizes_E), scales, np.asarray(scales["activation"](hidden_TG))


@functools.cache
def _act(format, out_dtype=jnp.float32, weighted=False, **problem):
    operands, scales, expected = _problem(format, **problem)
    weight_T = jnp.linspace(0.25, 1.5, len(expected)) if weighted else None
    call = functools.partial(mlp.gate_up_swiglu_codes, out_dtype=out_dtype, tiling=_TILING, **_HOW)
    got = jax.jit(lambda operands, weight_T: call(*operands, row_weight_T=weight_T, **scales))(
        operands, weight_T
    )
    if weighted:
        expected = expected * np.asarray(weight_T)[:, None]
    return got, expected


def _amax(format):
    return jnp.asarray(_AMAX) if format == "nvfp4" else None


@functools.cache
def _compiled(format, rule=None, module=mlp, **problem):
    operands, scales, _ = _problem(format, **problem)
    activation = scales["activation"]
    scales = {name: value for name, value in scales.items() if name != "activation"}

    def call(operands, scales, amax_E):
        return module.gate_up_swiglu_quantized(
            *operands,
            format=format,
            rule=rule,
            act_amax_E=amax_E,
            activation=activation,
            tiling=_TILING,
            **scales,
            **_HOW,
        )

    arguments = operands, scales, _amax(format)
    compiled = jax.jit(call).lower(*arguments).compile()
    return lambda: compiled(*arguments)


@pytest.mark.parametrize(
    "format, out_dtype, weighted, tolerance",
    [
        # Sums of 256 products in another order, and an exponential: a few units in the last place.
        ("nvfp4", jnp.float32, False, 4e-6),
        # Half a unit in the last place of bfloat16.
        ("mxfp4", jnp.bfloat16, True, 2**-8),
    ],
)
def test_act(format, out_dtype, weighted, tolerance):
    got, expected = _act(format, out_dtype, weighted)
    got = np.asarray(got, np.float32)
    assert np.isnan(got[3]).all() and np.isnan(expected[3]).all()
    got, expected = (np.delete(a, 3, axis=0) for a in (got, expected))
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()
    assert not got[32:].any() and got[:32].any(axis=1).all()


# A block of 128 rows that two experts share; and one that three do, one of them without rows.
_WIDE = dict(sizes=(127, 0, 4), num_rows=137, hidden=128)


@pytest.mark.parametrize(
    "format, rule, problem", [("nvfp4", None, {}), ("mxfp4", "floor", {}), ("mxfp4", None, _WIDE)]
)
def test_codes_are_those_of_the_format(format, rule, problem):
    """Bit for bit what `formats` makes of the act that the kernel computes, NaN included."""
    problem = {k: tuple(v) if isinstance(v, tuple) else v for k, v in problem.items()}
    act_TF, _ = _act(format, **problem)
    q = _compiled(format, rule, **problem)()
    sizes = np.asarray(_problem(format, **problem)[0][2])
    inside_T = np.arange(len(act_TF)) < sizes.sum()
    amax_T = None
    if format == "nvfp4":
        amax_T = np.zeros(len(act_TF), np.float32)
        amax_T[inside_T] = np.repeat(_AMAX, sizes)
    wanted = formats.quantize(act_TF, format, rule=rule, num_batch_axes=1, global_amax=amax_T)
    wanted = formats.arranged(wanted, "tcgen05")
    assert (q.shape, q.format, q.rule, q.layout) == (act_TF.shape, format, wanted.rule, "tcgen05")
    for got, want in zip(jax.tree.leaves(q), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(got, want)
    assert len(np.unique(formats.unpack(q.codes))) > 12


def _quantized_by_hand(act_F, amax):
    """NVFP4 of one row with a calibrated amax, by its definition: float32, in the order of `formats`' docstring."""
    f32 = np.float32
    blocks = act_F.astype(f32).reshape(-1, 16)
    encode = f32(2688) / f32(amax)
    ideal = np.abs(blocks).max(axis=1) * (encode * f32(1 / 6))
    scale = np.minimum(ideal, f32(448)).astype(ml_dtypes.float8_e4m3fn).astype(f32)[:, None]
    scaled = np.clip(blocks * (1 / (scale * (1 / encode))), -6, 6)
    codes = scaled.astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    return (codes * scale * (amax / 2688)).reshape(-1)


def _experts_by_hand(x, gate_up, down, bias_EG, weight_T, sizes):
    """y in float64, row by row, from the numbers that operands stand for: without the kernels and the reference."""
    x, gate_up, down = (np.asarray(formats.dequantize(q), np.float64) for q in (x, gate_up, down))
    bias_EG = np.asarray(bias_EG, np.float64)
    y_TD, row = np.zeros((len(x), down.shape[1])), 0
    for expert, size in enumerate(sizes):
        for t in range(row, row + size):
            gate, up = np.split(gate_up[expert] @ x[t] + bias_EG[expert], 2)
            gate, up = np.minimum(gate, 2.0), np.clip(up, -2.0, 2.0)
            act = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
            y_TD[t] = down[expert] @ _quantized_by_hand(act, _AMAX[expert]) * float(weight_T[t])
        row += size
    return y_TD


def test_expert_mlp():
    """y = weight * down(act), cast once. Codes of act are made from float32; the library casts it to x.dtype first."""
    (x, gate_up, sizes_E), scales, _ = _problem("nvfp4")
    num_rows, hidden = x.shape[0], gate_up.shape[1] // 2
    down = formats.quantize(jax.random.normal(jax.random.key(1), (3, 128, hidden)), "nvfp4")
    weight_T = jnp.linspace(0.25, 1.5, num_rows)
    how = dict(out_dtype=jnp.bfloat16, tiling=(_TILING, _DOWN), activation=_CLAMPED, **_HOW)
    got = jax.jit(functools.partial(mlp.expert_mlp_codes, **how))(
        *(x, gate_up, down, sizes_E),
        gate_up_scale_E=scales["expert_scale_E"],
        down_scale_E=formats.global_scale(down),
        row_scale_T=scales["row_scale_T"],
        row_weight_T=weight_T,
        bias_EG=scales["bias_EG"],
        act_amax_E=_amax("nvfp4"),
    )
    assert np.isnan(np.asarray(got[3], np.float32)).all()
    with np.errstate(invalid="ignore"):
        y_TD = _experts_by_hand(x, gate_up, down, scales["bias_EG"], weight_T, (19, 0, 14))
    got, y_TD = (np.delete(np.asarray(a, np.float64), 3, axis=0) for a in (got, y_TD))
    # One rounding to bfloat16; where act lies on the edge of two codes, an exponential in float32 may take the other.
    close = np.abs(got - y_TD) <= 2**-8 * np.abs(y_TD) + 4e-6 * np.abs(y_TD).max()
    assert close.mean() > 0.9, close.mean()
    assert np.linalg.norm(got - y_TD) < 0.01 * np.linalg.norm(y_TD)
    assert not got[32:].any() and got[:32].any(axis=1).all()


@pytest.mark.parametrize("mutant", parameters(mutants.MUTANTS))
def test_mutants(mutant, monkeypatch):
    right = _compiled("nvfp4")
    wanted = jax.tree.leaves(right())

    def same(q):
        return all(map(np.array_equal, jax.tree.leaves(q), wanted))

    try:
        module = mlp
        if mutant in mutants.EPILOGUE:
            monkeypatch.setattr(mlp, "epilogue", mutated(mlp.epilogue.__name__, mutant))
        elif mutant in mutants.COPIES:
            copies = mutated(row_copies.__name__, mutant)
            monkeypatch.setattr(mlp.epilogue, "row_copies", copies)
        else:
            module = mutated(mlp.__name__, mutant)
        caught = None if same(_compiled.__wrapped__("nvfp4", module=module)()) else "numerics"
    except Exception as error:
        private_jax.reset_interpreter()
        assert "RACE DETECTED" in str(error) or "arrier" in str(error), error
        caught = "race"
    assert caught is not None
    assert mutant.caught_by in (caught, "either")
    assert same(right())


def test_refuses():
    operands, scales, _ = _problem("nvfp4")
    options = {"format": "nvfp4", "act_amax_E": _amax("nvfp4"), "tiling": _TILING} | scales | _HOW

    def refused(message, **changed):
        with pytest.raises(ValueError, match=message):
            mlp.gate_up_swiglu_quantized(*operands, **options | changed)

    refused("tile_n = 256", tiling=mlp.Tiling())
    refused("collective", tiling=mlp.Tiling(tile_n=256, accumulators=1, collective=True))
    refused("not to 'nvfp4_46'", format="nvfp4_46")
    refused("unknown rule", rule="floor")
    refused("act_amax_E is for NVFP4", act_amax_E=None)
    refused("act_amax_E is for NVFP4", format="mxfp4")
    refused("act_amax_E must be float32", act_amax_E=jnp.ones(2))
    refused("row_scale_T must be", row_weight_T=jnp.ones(2))
    x, gate_up, sizes_E = operands
    odd = jax.tree.map(lambda leaf: leaf[:, :384] if leaf.ndim > 1 else leaf, gate_up)
    with pytest.raises(ValueError, match="F must be a multiple"):
        mlp.gate_up_swiglu_quantized(x, odd, sizes_E, **options)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_default_tiling_fits(format):
    mlp.default_tiling(format).check_budgets(format, jnp.float32)


@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
def test_swizzled_rows_are_stored_whole(out_dtype, monkeypatch):
    """Interpret mode knows no swizzle. On a GPU a part of a swizzled row would be stored where no copy looks for it."""
    stored, store = [], plgpu.store

    def watched(ref, *arguments, **options):
        for transform in ref.transforms:
            if hasattr(transform, "indices"):
                last = transform.indices[-1]
                stored.append(last.start == 0 and last.size == transform.shape[-1])
        swizzles = [t.swizzle for t in ref.transforms if hasattr(t, "swizzle")]
        assert swizzles == [ref.ref.shape[-1] * jnp.dtype(out_dtype).itemsize]
        store(ref, *arguments, **options)

    operands, scales, _ = _problem("mxfp4")
    options = dict(out_dtype=out_dtype, tiling=_TILING, num_sms=1, **scales)
    monkeypatch.setattr(plgpu, "store", watched)
    jax.eval_shape(lambda x: mlp.gate_up_swiglu_codes(x, *operands[1:], **options), operands[0])
    assert stored and all(stored)
