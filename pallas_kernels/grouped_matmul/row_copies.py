"""How kernels store a number of rows that is known when they run: copies of TMA have sizes that are known before."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu


def store_rows(
    buffer: Any, out: Any, first: jax.Array | int, to: jax.Array, rows: jax.Array, columns: Any
) -> None:
    """Stores rows of a buffer in shared memory, as one group of copies of 2^i rows: 128, 64, .. 1.

    Args:
      buffer: reference (R, C) to shared memory.
      out: reference (T, N) to global memory.
      first: row of the buffer to begin with.
      to: row of `out` that it goes to.
      rows: how many, 0 to R.
      columns: of `out`, C of them.
    """
    # No box of a copy may be larger than the array.
    size = 1 << (min(buffer.shape[0], out.shape[0]).bit_length() - 1)
    done = 0
    while size:

        @pl.when(rows & size != 0)
        def _(done=done, size=size):
            plgpu.copy_smem_to_gmem(
                buffer.at[pl.ds(first + done, size)],
                out.at[pl.ds(to + done, size), columns],
                commit_group=False,
            )

        done, size = done + (rows & size), size // 2
    plgpu.commit_smem_to_gmem_group()
