"""Weights that jump between two codes: how many change theirs in a step, and TetraJet-v2's reset of those that do.

Near a rounding threshold a weight that hardly moves may change its rounded value in every step. Over a window of steps,

    path(w) = sum |w_t - w_{t-1}|,   rounded path(w) = sum |Q(w_t) - Q(w_{t-1})|

and where the second is at least `ratio` times the first, w := Q(w), in the middle between two thresholds.

Weights are dicts (or other trees) of arrays [..., N, K]; each matrix has a global scale of its own.

Reference: arXiv:2510.27527 (OsciReset; every=200, start=8000, window=50, ratio=8). Differs from the authors' code: it
begins windows at multiples of `every` and resets one step later, to what the weights are rounded to by then.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import formats


class Distances(NamedTuple):
    """Paths of the window so far, float32 trees like the weights: of the weights, and of what they are rounded to."""

    weight: Any
    rounded: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reset:
    """When oscillation is watched, and from where on it is reset. Hashable, so it can be static.

    Attributes:
      every: optimizer steps from the begin of one window to that of the next.
      start: optimizer step after which the first window begins.
      window: optimizer steps of a window; a reset happens after its last one.
      ratio: rounded path over path from which on a weight is reset.
      format: of the weights, a key of formats.FORMATS.
      rule: its scale rule; None is the format's default.

    Raises:
      ValueError: a number out of its range, an unknown format or rule.
    """

    every: int
    start: int
    window: int
    ratio: float
    format: str
    rule: str | None = None

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")
        if not 1 <= self.window <= self.every:
            raise ValueError(f"window must be from 1 to every={self.every}, got {self.window}")
        if self.start < 0:
            raise ValueError(f"start must be at least 0, got {self.start}")
        if not self.ratio > 0:
            raise ValueError(f"ratio must be greater than 0, got {self.ratio}")
        if self.format not in formats.FORMATS:
            allowed = ", ".join(formats.FORMATS)
            raise ValueError(f"unknown format {self.format!r}; allowed: {allowed}")
        rules = formats.FORMATS[self.format].rules
        if self.rule is not None and self.rule not in rules:
            raise ValueError(
                f"unknown rule {self.rule!r} for format {self.format}; allowed: {', '.join(rules)}"
            )

    def init(self, weights: Any) -> Distances:
        """Returns distances of zero."""
        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
        return Distances(zeros, jax.tree.map(jnp.zeros_like, zeros))

    def update(
        self, distances: Distances, old: Any, new: Any, step: jax.Array
    ) -> tuple[Distances, Any, jax.Array]:
        """Adds one optimizer step to the distances; resets at the end of a window. Off windows it computes nothing.

        Args:
          distances: from `init` or the step before.
          old, new: master weights before and after the optimizer's update.
          step: int32 scalar, number of this optimizer step, from 1.

        Returns:
          The distances, the weights to go on with, and how many were reset, an int32 scalar.
        """
        place = (step - self.start - 1) % self.every  # of this step in its period, from 0
        watching = (step > self.start) & (place < self.window)
        ends = watching & (place == self.window - 1)
        stage = watching.astype(jnp.int32) + ends.astype(jnp.int32)
        branches = (_nothing, self._track, self._track_and_reset)
        return lax.switch(stage, branches, place == 0, distances, old, new)

    def _track(
        self, begins: jax.Array, distances: Distances, old: Any, new: Any
    ) -> tuple[Distances, Any, jax.Array]:
        further = self._further(begins, distances, old, new, self._rounded(new))
        return further, new, jnp.zeros((), jnp.int32)

    def _track_and_reset(
        self, begins: jax.Array, distances: Distances, old: Any, new: Any
    ) -> tuple[Distances, Any, jax.Array]:
        def oscillates(path, rounded_path, value):
            far = rounded_path >= jnp.float32(self.ratio) * path
            return far & (path > 0) & jnp.isfinite(value)

        rounded = self._rounded(new)
        full = self._further(begins, distances, old, new, rounded)
        hit = jax.tree.map(oscillates, full.weight, full.rounded, rounded)
        kept = jax.tree.map(lambda h, q, w: jnp.where(h, q.astype(w.dtype), w), hit, rounded, new)
        count = sum(jnp.sum(h, dtype=jnp.int32) for h in jax.tree.leaves(hit))
        return jax.tree.map(jnp.zeros_like, distances), kept, jnp.asarray(count, jnp.int32)

    def _further(
        self, begins: jax.Array, distances: Distances, old: Any, new: Any, rounded: Any
    ) -> Distances:
        # A window forgets the one before, whose end, with the reset, may have been a skipped step.
        clean = jax.tree.map(lambda d: jnp.where(begins, jnp.float32(0), d), distances)
        return Distances(
            jax.tree.map(_add_path, clean.weight, old, new),
            jax.tree.map(_add_path, clean.rounded, self._rounded(old), rounded),
        )

    def _rounded(self, weights: Any) -> Any:
        return jax.tree.map(
            lambda w: formats.dequantize(_quantize(w, self.format, self.rule)), weights
        )


def flip_rate(old: Any, new: Any, format: str, rule: str | None = None) -> jax.Array:
    """Returns the share of all weights whose code differs between two steps, a float32 scalar; 0 and -0 are the same.

    A block whose scale changes may keep its codes, and then counts as not flipped: this is about codes, not values. A
    block with a NaN or an infinity has zero codes.

    Args:
      old, new: trees of weights [..., N, K].
      format: key of formats.FORMATS.
      rule: scale rule.
    """
    flips = jax.tree.map(functools.partial(_flips, format=format, rule=rule), old, new)
    count = sum(jax.tree.leaves(flips), jnp.zeros((), jnp.float32))
    size = sum(w.size for w in jax.tree.leaves(old))
    return count / jnp.float32(max(size, 1))


def _flips(old: jax.Array, new: jax.Array, *, format: str, rule: str | None) -> jax.Array:
    a, b = (_codes(_quantize(w, format, rule)) for w in (old, new))
    # Counted as integers: float32 stops at 2^24 when ones are added to it.
    return jnp.sum(a != b, dtype=jnp.int32).astype(jnp.float32)


def _codes(q: formats.BlockScaled) -> jax.Array:
    """One code per weight, zero without its sign."""
    element = formats.FORMATS[q.format].element
    code = formats.unpack(q.codes) if element.bits == 4 else q.codes
    minus_zero = 1 << (element.bits - 1)
    if isinstance(
        element, formats.Integer
    ):  # two's complement has no -0, and never writes this code
        return code
    return jnp.where(code == minus_zero, jnp.uint8(0), code)


def _quantize(w: jax.Array, format: str, rule: str | None) -> formats.BlockScaled:
    return formats.quantize(w, format, rule=rule, num_batch_axes=w.ndim - 2)


def _add_path(total: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    return total + jnp.abs(new.astype(jnp.float32) - old.astype(jnp.float32))


def _nothing(
    begins: jax.Array, distances: Distances, old: Any, new: Any
) -> tuple[Distances, Any, jax.Array]:
    del begins, old
    return distances, new, jnp.zeros((), jnp.int32)
