"""How the grouped matmul of data-centre Blackwell is cut into tiles, and what a tile costs of its small memories."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.formats import FORMATS

TILE_M = 128  # rows of one CTA's tile: what a block-scaled MMA takes, and of one tile of scales
SMEM_BYTES = 232_448  # of one CTA on sm_100, sm_103 and sm_107
TMEM_COLUMNS = 512
_ALIGNMENT = 1024  # of each buffer in shared memory
_TILE_K = 256  # 4-bit elements of a 128-byte row, which is what tiles are swizzled by


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """Tile sizes and depths of buffers. Hashable, so that it can be static.

    Attributes:
      tile_n: output columns of a tile, 128 or 256.
      tile_k: contraction steps of 256, or multiples.
      stages: k-steps of operands in flight.
      accumulators: 2: the next tile is multiplied while the last one is stored; 1: it waits, and needs half the TMEM.
      epilogue_n: columns that are stored at a time, from two buffers in turn; at most half of tile_n. They are a
        multiple of 128 bytes, since copies begin at any row and shared memory is copied from multiples of 128 bytes.
      swizzled_out: those buffers are swizzled, so that no bank of shared memory is written twice at once. Needs
        epilogue_n columns of 128 bytes. Copies then begin at any row of a swizzled buffer: the pattern goes by
        addresses, as the programming guide says, and nothing here can show it.
      collective: two CTAs share a tile of 256 rows: each loads half of the weights' rows. Cannot be interpreted.
      group_order: row tiles that are gone through together before the next columns. 1 reads a row tile once and the
        weights of an expert once per row tile; more read weights less often and rows more often. To keep L2 hits.

    Raises:
      ValueError: sizes that the instructions do not have. Budgets depend on the format: `check_budgets`.
    """

    tile_n: int = 128
    tile_k: int = _TILE_K
    stages: int = 5
    accumulators: int = 2
    epilogue_n: int = 64
    swizzled_out: bool = False
    collective: bool = False
    group_order: int = 1

    def __post_init__(self):
        if self.tile_n not in (128, 256):
            raise ValueError(f"tile_n must be 128 or 256, got {self.tile_n}")
        if self.tile_k < 1 or self.tile_k % _TILE_K:
            raise ValueError(f"tile_k must be a multiple of {_TILE_K}, got {self.tile_k}")
        if self.accumulators not in (1, 2):
            raise ValueError(f"accumulators must be 1 or 2, got {self.accumulators}")
        # Two buffers in turn: an even number of chunks, or a tile would begin with the buffer that was used last.
        if self.epilogue_n not in (16, 32, 64, 128) or self.tile_n % (2 * self.epilogue_n):
            raise ValueError(
                f"epilogue_n must be 16, 32, 64 or 128, and twice in tile_n, got {self.epilogue_n} of {self.tile_n}"
            )
        for name in ("stages", "group_order"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def tile_m(self) -> int:
        """Rows of a tile: of both CTAs, if two share it."""
        return TILE_M * self.num_ctas

    @property
    def num_ctas(self) -> int:
        """CTAs that share a tile."""
        return 2 if self.collective else 1

    @property
    def loaded_n(self) -> int:
        """Rows of weights that one CTA loads: an MMA of two CTAs reads both halves."""
        return self.tile_n // self.num_ctas

    def scale_columns(self, format: str) -> int:
        """Scales of a row in one k-step."""
        return self.tile_k // FORMATS[format].block

    def stage_bytes(self, format: str) -> int:
        """Bytes of one k-step in shared memory: codes and scales of both operands."""
        codes = (TILE_M + self.loaded_n) * self.tile_k // 2
        # Scales of all columns are needed by both CTAs.
        return codes + (TILE_M + self.tile_n) * self.scale_columns(format)

    def smem_bytes(self, format: str, out_dtype: jnp.dtype) -> int:
        """Bytes of shared memory, barriers included."""
        buffers = TILE_M * self.epilogue_n * jnp.dtype(out_dtype).itemsize * 2
        barriers = 8 * (2 * self.stages + 2 * self.accumulators)
        return self.stages * self.stage_bytes(format) + buffers + _up(barriers, _ALIGNMENT)

    def tmem_columns(self, format: str) -> int:
        """Columns of tensor memory: accumulators, then four per 128 rows and 4 scales."""
        rows = TILE_M + self.tile_n
        return self.accumulators * self.tile_n + rows // 128 * self.scale_columns(format)

    def storing(self, out_dtype: jnp.dtype) -> Tiling:
        """Returns the same with the columns that are stored at a time 128 bytes wide, the least, and swizzled."""
        width = 128 // jnp.dtype(out_dtype).itemsize
        return dataclasses.replace(self, epilogue_n=width, swizzled_out=True)

    def out_buffers(self, out_dtype: jnp.dtype) -> Any:
        """The two buffers that a tile is stored from: shared memory (2, 128, epilogue_n)."""
        transforms = ()
        if self.swizzled_out:
            transforms = (plgpu.TilingTransform((1, self.epilogue_n)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM((2, TILE_M, self.epilogue_n), out_dtype, transforms=transforms)

    def check_budgets(self, format: str, out_dtype: jnp.dtype) -> None:
        """Raises ValueError where shared or tensor memory does not suffice, or the output's rows do not fit copies."""
        row_bytes = self.epilogue_n * jnp.dtype(out_dtype).itemsize
        if row_bytes % 128:
            raise ValueError(
                f"epilogue_n columns must be a multiple of 128 bytes, got {self.epilogue_n} of {jnp.dtype(out_dtype)}"
            )
        if self.swizzled_out and row_bytes != 128:
            raise ValueError(
                f"swizzled_out needs epilogue_n columns of 128 bytes, got {self.epilogue_n} of {jnp.dtype(out_dtype)}"
            )
        smem, tmem = self.smem_bytes(format, out_dtype), self.tmem_columns(format)
        if smem > SMEM_BYTES:
            raise ValueError(
                f"{self} needs {smem} bytes of shared memory for {format} and {jnp.dtype(out_dtype)}, of {SMEM_BYTES}: "
                "fewer stages, or a smaller epilogue_n"
            )
        if tmem > TMEM_COLUMNS:
            raise ValueError(
                f"{self} needs {tmem} columns of tensor memory for {format}, of {TMEM_COLUMNS}: accumulators=1"
            )


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
