"""What the rows that enter the experts of a layer say about their weights: sums over batches, and what they become.

    hessian[e] = sum over rows n of expert e of r[n] a[n] a[n]^T / sum of r[n]

with a the input of the matrix and r the row's weight, 1 or the router's combine weight squared.

T tokens, N assignments, W rows of a window, D model width, F expert width, G = 2F, E experts.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WINDOW = 128  # rows of one expert at a time
SOURCES = ("own", "siblings", "all_tokens", "none")


class InputSums(NamedTuple):
    """Sums over the rows that enter one matrix of each expert; K is that matrix's input width.

    Attributes:
      square_EKK: float32 weighted sum of a a^T.
      magnitude_EK: float32 weighted sum of |a|.
      largest_EK: float32 maximum of |a|, whatever the weights.
    """

    square_EKK: jax.Array
    magnitude_EK: jax.Array
    largest_EK: jax.Array


class Sums(NamedTuple):
    """Sums over one or more batches of a layer.

    Attributes:
      tokens_E: int32 rows.
      weight_E: float32 sum of their weights.
      gate_up, down: sums over the inputs of each matrix.
    """

    tokens_E: jax.Array
    weight_E: jax.Array
    gate_up: InputSums
    down: InputSums


@dataclasses.dataclass(frozen=True)
class InputStatistics:
    """Statistics of the rows that enter one matrix of each expert; K is that matrix's input width.

    Attributes:
      hessian_EKK: float32, mean of a a^T.
      mean_abs_EK: float32, mean of |a|: AWQ's.
      max_abs_EK: float32, maximum of |a|: SmoothQuant's.
      rank_E: numerical rank of each Hessian, K at most.
    """

    hessian_EKK: np.ndarray
    mean_abs_EK: np.ndarray
    max_abs_EK: np.ndarray
    rank_E: np.ndarray

    @property
    def amax_E(self) -> np.ndarray:
        """Largest magnitude that entered each expert, float32: for static activation scales. 0 without rows."""
        return self.max_abs_EK.max(axis=1)


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """What calibration knows of a layer's experts.

    Attributes:
      tokens_E: int64 assignments that each expert computed, fallbacks not counted.
      source_E: one of SOURCES per expert, where its statistics come from; "none" means there are none: all zeros.
      gate_up, down: of the inputs of each matrix.
    """

    tokens_E: np.ndarray
    source_E: tuple[str, ...]
    gate_up: InputStatistics
    down: InputStatistics


@functools.partial(jax.jit, static_argnames=("window",))
def collect(
    x_TD: jax.Array,
    token_N: jax.Array,
    expert_N: jax.Array,
    weight_N: jax.Array,
    gate_up_EGD: jax.Array,
    down_EDF: jax.Array,
    *,
    window: int = WINDOW,
) -> Sums:
    """Sums over the rows of each expert, in windows of rows sorted by expert: the cost follows N, not T * E.

    Args:
      x_TD: float, the rows that enter the layer.
      token_N: int32, row of each assignment.
      expert_N: int32; ids of E and above are left out.
      weight_N: float32 weight of each assignment's row in the means.
      gate_up_EGD: float32, gate rows first: they make the rows that enter `down`.
      down_EDF: for its shape.
      window: rows at a time.
    """
    num_experts, _, width = gate_up_EGD.shape
    expert_N = jnp.minimum(expert_N, num_experts)
    order_N = jnp.argsort(expert_N, stable=True).astype(jnp.int32)
    size_E = jnp.bincount(expert_N, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    end_E = jnp.cumsum(size_E)
    last_window_E = jnp.cumsum(-(-size_E // window))
    x_TD = x_TD.astype(jnp.float32)

    def add(index: jax.Array, sums: Sums) -> Sums:
        expert = jnp.searchsorted(last_window_E, index, side="right")
        windows = -(-size_E[expert] // window)
        nth = index - (last_window_E[expert] - windows)
        row_W = end_E[expert] - size_E[expert] + nth * window + jnp.arange(window, dtype=jnp.int32)
        valid_W = row_W < end_E[expert]
        chosen_W = order_N[jnp.where(valid_W, row_W, 0)]
        x_WD = jnp.where(valid_W[:, None], x_TD[token_N[chosen_W]], jnp.float32(0))
        weight_W = jnp.where(valid_W, weight_N[chosen_W], jnp.float32(0))
        return Sums(
            sums.tokens_E,
            sums.weight_E.at[expert].add(weight_W.sum()),
            _add(sums.gate_up, expert, x_WD, weight_W),
            _add(sums.down, expert, hidden(x_WD, gate_up_EGD[expert]), weight_W),
        )

    start = zeros(num_experts, width, down_EDF.shape[2])._replace(tokens_E=size_E)
    return lax.fori_loop(0, last_window_E[-1], add, start)


def hidden(x_WD: jax.Array, gate_up_GD: jax.Array) -> jax.Array:
    """silu(gate) * up, the rows that enter `down`: float32 (W, F)."""
    hidden_WG = jnp.matmul(x_WD, gate_up_GD.T, precision=lax.Precision.HIGHEST)
    gate_WF, up_WF = jnp.split(hidden_WG, 2, axis=1)
    return jax.nn.silu(gate_WF) * up_WF


def zeros(num_experts: int, width: int, hidden_width: int) -> Sums:
    """Returns the sums over no rows."""

    def inputs(size: int) -> InputSums:
        flat = jnp.zeros((num_experts, size), jnp.float32)
        return InputSums(jnp.zeros((num_experts, size, size), jnp.float32), flat, flat)

    count, weight = jnp.zeros(num_experts, jnp.int32), jnp.zeros(num_experts, jnp.float32)
    return Sums(count, weight, inputs(width), inputs(hidden_width))


def merge(a: Sums, b: Sums) -> Sums:
    """Adds the sums of two batches."""

    def both(x: InputSums, y: InputSums) -> InputSums:
        largest = jnp.maximum(x.largest_EK, y.largest_EK)
        square = x.square_EKK + y.square_EKK
        return InputSums(square, x.magnitude_EK + y.magnitude_EK, largest)

    return Sums(
        a.tokens_E + b.tokens_E,
        a.weight_E + b.weight_E,
        both(a.gate_up, b.gate_up),
        both(a.down, b.down),
    )


def _add(sums: InputSums, expert: jax.Array, x_WK: jax.Array, weight_W: jax.Array) -> InputSums:
    weighted_WK = x_WK * weight_W[:, None]
    square = jnp.matmul(weighted_WK.T, x_WK, precision=lax.Precision.HIGHEST)
    return InputSums(
        sums.square_EKK.at[expert].add(square),
        sums.magnitude_EK.at[expert].add(jnp.abs(weighted_WK).sum(axis=0)),
        sums.largest_EK.at[expert].max(jnp.abs(x_WK).max(axis=0)),
    )


def siblings(sums: Sums) -> Sums:
    """Returns for every expert what stands in for it: the rows of the whole layer, its own few included.

    Inputs of gate_up are the same channels for all experts, so their sums add up. Hidden channels of different experts
    have nothing to do with each other: for `down` only their mean is kept, a multiple of the identity, under which
    GPTQ rounds to nearest and AWQ scales nothing; and the maximum over experts and channels.
    """
    num_experts, size = sums.down.magnitude_EK.shape
    share = lambda x: jnp.broadcast_to(x[None], (num_experts, *x.shape))  # noqa: E731
    gate_up = InputSums(
        share(sums.gate_up.square_EKK.sum(axis=0)),
        share(sums.gate_up.magnitude_EK.sum(axis=0)),
        share(sums.gate_up.largest_EK.max(axis=0)),
    )
    mean = jnp.trace(sums.down.square_EKK.sum(axis=0)) / jnp.float32(size)
    flat = jnp.ones((num_experts, size), jnp.float32)
    down = InputSums(
        share(mean * jnp.eye(size, dtype=jnp.float32)),
        flat * (sums.down.magnitude_EK.sum() / jnp.float32(size)),
        flat * sums.down.largest_EK.max(),
    )
    return Sums(share(sums.tokens_E.sum()), share(sums.weight_E.sum()), gate_up, down)


def finish(own: Sums, stand_in: Sums | None, fallback: str, min_tokens: int) -> LayerStatistics:
    """Turns sums into means; experts below `min_tokens` take the stand-in's.

    Args:
      own: sums over each expert's rows.
      stand_in: sums to use instead; None where no expert needs them.
      fallback: the stand-in's name.
      min_tokens: fewest rows for an expert's own sums.
    """
    own = jax.tree.map(np.asarray, own)
    chosen, source = own, ["own"] * len(own.tokens_E)
    if stand_in is not None:
        few_E = own.tokens_E < min_tokens
        stand_in = jax.tree.map(np.asarray, stand_in)
        chosen = jax.tree.map(lambda a, b: _pick(few_E, b, a), own, stand_in)
        source = [fallback if few else "own" for few in few_E]
    source = tuple(
        name if weight > 0 else "none" for name, weight in zip(source, chosen.weight_E, strict=True)
    )
    gate_up, down = (_means(part, chosen.weight_E) for part in (chosen.gate_up, chosen.down))
    return LayerStatistics(own.tokens_E.astype(np.int64), source, gate_up, down)


def _pick(few_E: np.ndarray, yes: np.ndarray, no: np.ndarray) -> np.ndarray:
    return np.where(few_E.reshape(-1, *(1,) * (no.ndim - 1)), yes, no)


def _means(sums: InputSums, weight_E: np.ndarray) -> InputStatistics:
    divisor_E = np.where(weight_E > 0, weight_E, np.float32(1))
    hessian_EKK = sums.square_EKK / divisor_E[:, None, None]
    hessian_EKK = (hessian_EKK + hessian_EKK.swapaxes(1, 2)) * np.float32(0.5)
    rank_E = np.linalg.matrix_rank(hessian_EKK, hermitian=True)
    mean_EK = sums.magnitude_EK / divisor_E[:, None]
    return InputStatistics(hessian_EKK, mean_EK, sums.largest_EK, rank_E)
