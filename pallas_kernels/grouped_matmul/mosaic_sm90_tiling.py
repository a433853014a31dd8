"""How the weight-only grouped matmul of Hopper is cut into tiles, and what a tile costs of shared memory."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from pallas_kernels.formats import FORMATS

SMEM_BYTES = 232_448  # of one CTA on sm_90
ROWS = 64  # weight rows of one warpgroup: what `wgmma` takes from registers
_ALIGNMENT = 1024  # of each buffer in shared memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """Tile sizes and the depth of the ring. Hashable, so that it can be static.

    Attributes:
      tile_m: weight rows (output columns) of a tile: 64 for each of one or two warpgroups that compute.
      tile_n: rows of x of a tile, all of one expert: 8, 16, 24, .. 256.
      tile_k: contraction elements of a step: 64, 128 or 256. Wider ones decode scales more cheaply.
      stages: steps whose operands are in flight, at least 2.

    Raises:
      ValueError: sizes that the instructions do not have. The budget depends on the format: `check_budget`.
    """

    tile_m: int = 128
    tile_n: int = 64
    tile_k: int = 128
    stages: int = 4

    def __post_init__(self):
        if self.tile_m not in (ROWS, 2 * ROWS):
            raise ValueError(f"tile_m must be 64 or 128, got {self.tile_m}")
        if not 8 <= self.tile_n <= 256 or self.tile_n % 8:
            raise ValueError(f"tile_n must be a multiple of 8 up to 256, got {self.tile_n}")
        if self.tile_k not in (64, 128, 256):
            raise ValueError(f"tile_k must be 64, 128 or 256, got {self.tile_k}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2, got {self.stages}")

    @property
    def warpgroups(self) -> int:
        """Warpgroups that compute; one more loads."""
        return self.tile_m // ROWS

    @property
    def words(self) -> int:
        """16-bit words of a weight row in one step, four codes each."""
        return self.tile_k // 4

    def scale_rows(self, format: str) -> int:
        """Blocks of a weight row in one step."""
        return self.tile_k // FORMATS[format].block

    def smem_bytes(self, format: str, out_dtype: jnp.dtype) -> int:
        """Bytes of shared memory, barriers included."""
        buffers = (
            self.stages * self.tile_m * self.tile_k // 2,
            self.stages * self.tile_m * self.scale_rows(format),
            self.stages * self.tile_n * self.tile_k * 2,
            self.tile_m * self.tile_n * jnp.dtype(out_dtype).itemsize,
            8 * 2 * self.stages,
        )
        return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in buffers)

    def check_budget(self, format: str, out_dtype: jnp.dtype) -> None:
        """Raises ValueError where shared memory does not suffice."""
        smem = self.smem_bytes(format, out_dtype)
        if smem > SMEM_BYTES:
            raise ValueError(
                f"{self} needs {smem} bytes of shared memory for {format} and {jnp.dtype(out_dtype)}, of {SMEM_BYTES}: "
                "fewer stages, or smaller tiles"
            )


def default_tiling(
    rows_per_expert: float, N: int, K: int, format: str, out_dtype: jnp.dtype
) -> Tiling:
    """Returns a tiling for a shape. A guess by counting, not measured.

    Weights are decoded once per tile of rows, which costs more than multiplying up to about 64 rows: so tiles are twice
    as high as the mean group, and few groups need a second one.

    Args:
      rows_per_expert: T / E, or the mean over the experts that have rows.
      N: outputs, a multiple of 64.
      K: inputs, a multiple of 64.
      format: of the weights.
      out_dtype: of the result.

    Raises:
      ValueError: N or K is no multiple of 64.
    """
    if N % ROWS or K % 64 or not K:
        raise ValueError(f"N and K must be multiples of 64, got N={N} and K={K}")
    tile_n = 8
    while tile_n < min(2 * rows_per_expert, 128):
        tile_n *= 2
    widest = 256 if tile_n <= 32 else 128
    tile_k = next(size for size in (256, 128, 64) if size <= widest and K % size == 0)
    tiling = Tiling(tile_m=64 if N % 128 else 128, tile_n=tile_n, tile_k=tile_k, stages=2)
    deeper = tiling
    while deeper.stages <= 6 and deeper.smem_bytes(format, out_dtype) <= SMEM_BYTES:
        tiling, deeper = deeper, dataclasses.replace(deeper, stages=deeper.stages + 1)
    return tiling
