"""What passes between the main loop of data-centre Blackwell's grouped matmuls and the epilogues written for it.

T rows, K contraction axis, N weight rows, E experts, C = scales of a row / 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Operands(NamedTuple):
    """What is multiplied, as tensor cores take it; in the kernel, references to it.

    Attributes:
      x_TK: float4_e2m1fn, T a multiple of 8 and at least tile_m.
      x_scales: float8_e4m3fn or float8_e8m0fnu (R, C, 32, 16), those of R * 128 rows, a multiple of tile_m.
      w_ENK: float4_e2m1fn.
      w_scales: as x_scales, (E, ceil(N / 128), C, 32, 16).
    """

    x_TK: Any
    x_scales: Any
    w_ENK: Any
    w_scales: Any


class Tile(NamedTuple):
    """One CTA's part of an output tile, int32 scalars.

    Attributes:
      expert: whose rows they are.
      block: rows block * 128 and the following 127 are in the accumulator.
      first_row: where among them the expert's rows begin.
      rows: how many they are; may be 0 where two CTAs share a tile.
      column: index of the tile along the output's columns.
      index: of the row tile in the schedule.
    """

    expert: Any
    block: Any
    first_row: Any
    rows: Any
    column: Any
    index: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Epilogue:
    """What becomes of accumulators.

    Attributes:
      inputs: arrays it reads.
      out_type: pytree (tuple) of ShapeDtypeStruct.
      scratch: its own scratch buffers, by name.
      num_columns: tiles along N.
      boxes: column -> the first weight row of each box that makes up a tile's tile_n rows, in order. All boxes have
        tile_n / len rows, a multiple of 128. Their number does not depend on the column.
      store: (tile, acc, release, inputs, outputs, scratch): reads acc, a float32 (128, tile_n) reference to tensor
        memory, calls release() once after its last load was issued, and writes the outputs.
      finish: (index of the CTA's share, number of shares, inputs, outputs, scratch): runs after the last tile.
    """

    inputs: tuple[jax.Array, ...]
    out_type: tuple[jax.ShapeDtypeStruct, ...]
    scratch: dict[str, Any]
    num_columns: int
    boxes: Callable[[Any], tuple[Any, ...]]
    store: Callable[..., None]
    finish: Callable[..., None]
