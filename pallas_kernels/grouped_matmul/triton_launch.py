"""What the Triton backends share: tilings, checks, the schedule with its tail, and the call through jax-triton.

T rows sorted by expert, K contraction axis, N output axis, E experts, I tiles.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import formats, private_jax
from pallas_kernels.grouped_matmul import tiles

_PACKAGES = ("triton", "jax_triton")
_OUTPUTS = (jnp.float32, jnp.bfloat16, jnp.float16)
# Tiles that go through all columns of the output together, so that the second-level cache serves them.
_GROUP = 8


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a kernel divides its work.

    Attributes:
      block_m: rows of a tile; a power of two, at least 16.
      block_n: outputs of a tile; likewise.
      block_k: contraction of one step; a power of two, at least 64.
      num_warps: of a program.
      num_stages: steps whose loads are in flight.

    Raises:
      ValueError: a number that is not allowed.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def __post_init__(self):
        least = {"block_m": 16, "block_n": 16, "block_k": 64, "num_warps": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value < smallest or value & (value - 1):
                raise ValueError(
                    f"{name} must be a power of two of at least {smallest}, got {value}"
                )
        if self.num_stages < 1:
            raise ValueError(f"num_stages must be at least 1, got {self.num_stages}")


@dataclasses.dataclass(frozen=True)
class Call:
    """Everything that one launch of a kernel takes.

    Attributes:
      operands: arrays by parameter, in the kernel's order; None for those that it does without.
      constants: compile-time parameters.
      programs: how many are launched.
      out: shape and dtype of the output, the parameter after the operands.
    """

    operands: dict[str, jax.Array | None]
    constants: dict[str, int | bool]
    programs: int
    out: jax.ShapeDtypeStruct


def kernels(module: str) -> types.ModuleType:
    """Imports a module of Triton kernels of this package.

    Raises:
      NotImplementedError: Triton or jax-triton is not installed.
    """
    absent = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise NotImplementedError(
            f"{module} needs {' and '.join(absent)}, not installed here: pip install 'moelab[aot]'"
        )
    return importlib.import_module(f"pallas_kernels.grouped_matmul.{module}")


def schedule(group_sizes_E: jax.Array, num_rows: int, tile_rows: int) -> jax.Array:
    """Returns the tiles of `tiles.schedule`, and after them tiles of expert E that cover the rows beyond the groups.

    Args:
      group_sizes_E: int32.
      num_rows: T.
      tile_rows: rows of a block.

    Returns:
      int32 (4, I): expert, block, first row in the block, number of rows of each tile. Tiles of expert E may have no
      rows, and then lie anywhere.
    """
    found = tiles.schedule(group_sizes_E, num_rows, tile_rows)
    # One more than the groups can need: their last block may also be the first one that has rows of nobody.
    tile = jnp.arange(found.expert_I.shape[0] + 1, dtype=jnp.int32)
    beyond = tile >= found.count
    total = jnp.minimum(jnp.sum(group_sizes_E, dtype=jnp.int32), num_rows)
    block = total // tile_rows + tile - found.count
    first = jnp.maximum(total - block * tile_rows, 0)
    stop = jnp.minimum(num_rows - block * tile_rows, tile_rows)
    nobody = jnp.full_like(tile, group_sizes_E.shape[0])
    tail = (nobody, block, first, jnp.maximum(stop - first, 0))
    fields = (jnp.pad(field, (0, 1)) for field in found[:4])
    return jnp.stack([jnp.where(beyond, t, f) for t, f in zip(tail, fields, strict=True)])


def prepare(
    activations: dict[str, jax.Array],
    w: formats.BlockScaled,
    group_sizes_E: jax.Array,
    *,
    num_rows: int,
    expert_scale_E: jax.Array | None,
    row_scale_T: jax.Array | None,
    bias_EN: jax.Array | None,
    out_dtype: jnp.dtype,
    tiling: Tiling,
) -> Call:
    """Lays out the operands of a kernel; `activations` come first."""
    num_experts, width, inputs = w.shape
    spec = formats.FORMATS[w.format]
    where = schedule(group_sizes_E.astype(jnp.int32), num_rows, tiling.block_m)
    return Call(
        operands={
            **activations,
            "codes": w.codes,
            "scales": w.scales,
            "expert_scale": _expert_scale(w, expert_scale_E),
            "row_scale": None if row_scale_T is None else row_scale_T.astype(jnp.float32),
            "bias": bias_EN,
            "schedule": where,
        },
        constants={
            "E": num_experts,
            "N": width,
            "K": inputs,
            "NUM_TILES": where.shape[1],
            "BLOCK": spec.block,
            "E4M3": spec.scale == "e4m3",
            "BLOCK_M": tiling.block_m,
            "BLOCK_N": tiling.block_n,
            "BLOCK_K": tiling.block_k,
            "GROUP": _GROUP,
        },
        programs=where.shape[1] * -(-width // tiling.block_n),
        out=jax.ShapeDtypeStruct((num_rows, width), jnp.dtype(out_dtype)),
    )


def _expert_scale(w: formats.BlockScaled, given_E: jax.Array | None) -> jax.Array:
    found = formats.global_scale(w) if given_E is None else given_E.astype(jnp.float32)
    if found is None:
        found = jnp.ones((), jnp.float32)
    return jnp.broadcast_to(found, w.shape[:1])


def launch(
    kernel: Callable, call: Call, tiling: Tiling, capability: tuple[int, int], name: str
) -> jax.Array:
    """Calls a kernel. Its products and sums are not contracted: y is rounded as the reference rounds it."""
    import jax_triton

    private_jax.eliminate_dead_triton_calls()
    if 0 in call.out.shape:
        return jnp.zeros(call.out.shape, call.out.dtype)
    return jax_triton.triton_call(
        *call.operands.values(),
        kernel=kernel,
        out_type=call.out,
        grid=(call.programs,),
        name=name,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        compute_capability=10 * capability[0] + capability[1],
        backend_options={"enable_fp_fusion": False},
        INTERPRET=False,
        **call.constants,
    )


def check(
    w: formats.BlockScaled,
    x_shape: tuple[int, ...],
    group_sizes_E: jax.Array,
    expert_scale_E: jax.Array | None,
    row_scale_T: jax.Array | None,
    bias_EN: jax.Array | None,
    out_dtype: jnp.dtype,
) -> None:
    """Raises unless shapes and dtypes fit together.

    Raises:
      ValueError: shapes or dtypes that do not fit, with what came and what was wanted.
      NotImplementedError: a format of weights that has no 4-bit floats with a scale byte per block.
    """
    spec = formats.FORMATS[w.format]
    if spec.element is not formats.E2M1:
        raise NotImplementedError(f"the kernel takes weights in NVFP4 or MXFP4, got {w.format}")
    if w.ndim != 3 or w.layout != "linear" or w.codes.dtype != jnp.uint8:
        raise ValueError(
            f"w must be uint8 codes (E, N, K / 2) with linear scales, got {w.codes.dtype} of shape {w.codes.shape} "
            f"and {w.layout} scales"
        )
    num_experts, width, inputs = w.shape
    if w.scales.shape != (num_experts, width, inputs // spec.block) or inputs % spec.block:
        raise ValueError(
            f"w of shape {w.shape} must have scales (E, N, K / {spec.block}), got {w.scales.shape}"
        )
    if len(x_shape) != 2 or x_shape[1] != inputs:
        raise ValueError(f"x must be (T, K = {inputs}) for w of shape {w.shape}, got {x_shape}")
    wanted = (
        ("group_sizes_E", group_sizes_E, (num_experts,)),
        ("expert_scale_E", expert_scale_E, (num_experts,)),
        ("row_scale_T", row_scale_T, x_shape[:1]),
        ("bias_EN", bias_EN, (num_experts, width)),
    )
    for name, value, shape in wanted:
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {value.shape}")
    if jnp.dtype(out_dtype) not in map(jnp.dtype, _OUTPUTS):
        raise ValueError(f"out_dtype must be float32, bfloat16 or float16, got {out_dtype}")
