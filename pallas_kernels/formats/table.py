"""The table of formats: what each name stands for."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from pallas_kernels.formats.elements import (
    E2M1,
    E4M3,
    E5M2,
    E8M0_RULES,
    INT4,
    INT8,
    Element,
    Integer,
)


@dataclasses.dataclass(frozen=True)
class Format:
    """What a format's name stands for.

    Attributes:
      element: format of the codes.
      scale: "e4m3" (below a global float32 scale), "e8m0", or float: "tile", "channel", "tensor".
      block: elements of the last axis that share a scale; None where the whole axis does.
      rules: allowed scale rules, the default first.
      block_rows: rows that share a scale. E4M3 bytes are repeated for each row, so that storage is as for 1; float
        scales are stored once.
      scale_bound: largest block scale that the global scale aims at (NVFP4 only).
      scale_dtype: of float scales.
      exact_division: of float scales: divisions, or products with reciprocals.
      partial: whether the last tiles may be smaller than a whole one.
    """

    element: Element | Integer
    scale: str
    block: int | None
    rules: tuple[str, ...]
    block_rows: int = 1
    scale_bound: float = E4M3.max_value
    scale_dtype: type = jnp.float32
    exact_division: bool = False
    partial: bool = False

    @property
    def float_scales(self) -> bool:
        """Whether scales are floats, not bytes."""
        return self.scale in ("tile", "channel", "tensor")

    @property
    def tile(self) -> tuple[int, int] | None:
        """Rows and columns of a block; None where a whole axis shares a scale."""
        return None if self.block is None else (self.block_rows, self.block)


FORMATS: dict[str, Format] = {
    "nvfp4": Format(E2M1, "e4m3", 16, ("amax",)),
    "nvfp4_2d": Format(E2M1, "e4m3", 16, ("amax",), block_rows=16),
    # Four Over Six: 256 leaves room for a scale 1.5 times larger, which maps the block's largest value to 4, not 6.
    "nvfp4_46": Format(E2M1, "e4m3", 16, ("mse", "mae"), scale_bound=256.0),
    "nvfp4_46_2d": Format(E2M1, "e4m3", 16, ("mse", "mae"), block_rows=16, scale_bound=256.0),
    # rceil is what gpt-oss and NVIDIA's kernels use: nothing clips. `even` has the lowest error on Gaussian data.
    "mxfp4": Format(E2M1, "e8m0", 32, E8M0_RULES),
    "mxfp8_e4m3": Format(E4M3, "e8m0", 32, E8M0_RULES),
    "mxfp8_e5m2": Format(E5M2, "e8m0", 32, E8M0_RULES),
    # DeepSeek-V3: weights in tiles, activations in rows of tiles. Small models have partial tiles.
    "fp8_block": Format(
        E4M3, "tile", 128, ("amax",), block_rows=128, exact_division=True, partial=True
    ),
    "fp8_row128": Format(E4M3, "tile", 128, ("amax",), exact_division=True, partial=True),
    "fp8_channel": Format(E4M3, "channel", None, ("amax",)),
    "fp8_tensor": Format(E4M3, "tensor", None, ("amax",)),
    # Controls. A bfloat16 scale per 32 makes 4.5 bits a value, as many as NVFP4.
    "int8_channel": Format(INT8, "channel", None, ("amax",), exact_division=True),
    "int4_group": Format(
        INT4, "tile", 32, ("amax",), scale_dtype=jnp.bfloat16, exact_division=True
    ),
}
