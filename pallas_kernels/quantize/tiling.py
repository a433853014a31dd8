"""How the quantize kernel divides its work: rows over warps, lines over lanes, steps over slots of shared memory.

N rows of the output, K contraction axis, C lines of a row.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.formats import FORMATS
from pallas_kernels.quantize.blocks import LINES

ATOM_ROWS = 128  # of the tiles in which tensor cores read scales, four to a row and line
_QUARTERS = 4
_WARP = 32
_SHARED_BYTES = 227 * 1024 - 4096  # of an SM, less barriers and what the system keeps
_SWIZZLE = 128  # bytes
_MOST_CTAS = 4  # of an SM: registers, at up to 128 a thread


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes that change the speed and not the result.

    Attributes:
      lanes: lanes that share a row, 8, 16 or 32: a warp holds 32 / lanes rows.
      slots: steps that shared memory holds, loaded ahead. Where the kernel finds the maxima of rows itself, at least
        the steps of a row, so that a row is read from memory once.
      ctas_per_sm: blocks of 128 threads on a multiprocessor at a time.
    """

    lanes: int
    slots: int
    ctas_per_sm: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one call; sizes that follow from it.

    A line is four blocks: they have one 32-bit word of scales. A step is `lanes` lines of each of 128 / lanes rows. In
    every tile of 128 rows, these are the same `32 / lanes` rows of each quarter, whose scales lie side by side.

    Attributes:
      format, rule: what to quantize to.
      num_rows, num_tokens, depth: N, rows of x, and K.
      dtype: of x.
      gathers: whether rows are taken from x by index.
      finds_amax: whether the kernel finds each row's global amax.
      hadamard: whether blocks of 16 are transformed first.
      draws: whether it rounds stochastically.
      tiling: sizes.
    """

    format: str
    rule: str
    num_rows: int
    num_tokens: int
    depth: int
    dtype: jnp.dtype
    gathers: bool
    finds_amax: bool
    hadamard: bool
    draws: bool
    tiling: Tiling

    @property
    def block(self) -> int:
        """Elements that share a scale."""
        return FORMATS[self.format].block

    @property
    def has_global(self) -> bool:
        """Whether a row has a global scale: NVFP4."""
        return FORMATS[self.format].scale == "e4m3"

    @property
    def line(self) -> int:
        """Elements of a line."""
        return 4 * self.block

    @property
    def lines(self) -> int:
        """Lines of a row, C."""
        return self.depth // self.line

    @property
    def piece(self) -> int:
        """Elements of a line that are loaded at a time: 128 bytes, so that lanes meet different banks."""
        return _SWIZZLE // self.dtype.itemsize

    @property
    def pieces(self) -> int:
        """Pieces of a line."""
        return self.line // self.piece

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return LINES // self.tiling.lanes

    @property
    def rows_per_quarter(self) -> int:
        """Rows of a step in each quarter of a tile of 128 rows."""
        return _WARP // self.tiling.lanes

    @property
    def all_groups(self) -> int:
        """Groups of `rows` rows, those that only pad the last tile included."""
        return -(-self.num_rows // ATOM_ROWS) * self.tiling.lanes

    @property
    def groups(self) -> int:
        """Groups that have any row: the first ones."""
        tiles, rest = divmod(self.num_rows, ATOM_ROWS)
        return tiles * self.tiling.lanes + -(-min(rest, _WARP) // self.rows_per_quarter)

    @property
    def steps(self) -> int:
        """Steps of a group."""
        return -(-self.lines // self.tiling.lanes)

    @property
    def last_lanes(self) -> int:
        """Lines of a row in its last step."""
        return self.lines - (self.steps - 1) * self.tiling.lanes

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block of threads."""
        slot = LINES * self.line * (self.dtype.itemsize + (2 if self.draws else 0))
        codes = 2 * LINES * self.line // 2
        words = 2 * 4 * LINES * self.steps + 4 * LINES
        return self.tiling.slots * (slot + 8) + codes + words

    def row(self, group: jax.Array | int, place: jax.Array | int) -> jax.Array:
        """Returns the row of the output that a group has in one of its places; it may be beyond the last."""
        part, per = lax.rem(group, self.tiling.lanes), self.rows_per_quarter
        first = lax.div(group, self.tiling.lanes) * ATOM_ROWS + part * per
        return first + lax.div(place, per) * _WARP + lax.rem(place, per)

    def check(self) -> None:
        """Raises ValueError for a tiling that does not fit."""
        tiling = self.tiling
        if tiling.lanes not in (8, 16, 32) or tiling.slots < 1 or tiling.ctas_per_sm < 1:
            raise ValueError(
                f"lanes must be 8, 16 or 32, slots and ctas_per_sm at least 1, got {tiling}"
            )
        if self.finds_amax and tiling.slots < self.steps:
            raise ValueError(
                f"rows of {self.steps} steps must stay in shared memory: slots must be at least as many, got {tiling}"
            )
        if self.shared_bytes > _SHARED_BYTES:
            raise ValueError(
                f"{tiling} needs {self.shared_bytes} bytes of shared memory for K = {self.depth}; "
                f"there are {_SHARED_BYTES}"
            )


def fitted(plan: Plan) -> Plan:
    """Returns the plan with a tiling that leaves few lanes idle and as many blocks of threads as fit.

    Raises:
      ValueError: rows are too long to stay in shared memory, which they must where the kernel finds their maxima.
    """

    # Few rows at a time take little memory, so that several blocks of threads fit, unless lanes would idle.
    busy = [lanes for lanes in (32, 16, 8) if -plan.lines % lanes <= plan.lines // 4]
    lanes = busy[0] if busy else min((32, 16, 8), key=lambda lanes: -plan.lines % lanes)
    steps = -(-plan.lines // lanes)
    slots = steps if plan.finds_amax else 2
    plan = dataclasses.replace(plan, tiling=Tiling(lanes, slots, 1))
    plan.check()
    more = dataclasses.replace(plan, tiling=Tiling(lanes, slots + 1, 1))
    if more.shared_bytes <= _SHARED_BYTES // 2:  # leaves room for a second block of threads
        plan = more
    ctas = min(_SHARED_BYTES // (plan.shared_bytes + 1024), _MOST_CTAS)
    return dataclasses.replace(
        plan, tiling=dataclasses.replace(plan.tiling, ctas_per_sm=max(ctas, 1))
    )
