"""What stands between the layers of an expert's feed-forward. Plain values, hashable, so they can be static.

N rows, F expert width, G = 2F.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwiGLU:
    """act = gate' * sigmoid(alpha * gate') * (up' + offset), with gate' = min(gate, limit), up' in -limit .. limit.

    >>> hidden_12 = jnp.array([[9.0, -9.0]])  # gate beyond the limit, up below it
    >>> float(SwiGLU(alpha=2.0, limit=1.0, offset=1.0)(hidden_12)[0, 0])  # 1 * sigmoid(2) * (-1 + 1)
    0.0

    Attributes:
      alpha: factor of the gate inside the sigmoid.
      limit: the most that a gate counts, and the magnitude that up does. Infinities count as the limit, but for a gate
        of minus infinity, which nothing limits: NaN. None: no limit.
      offset: added to up.

    Raises:
      ValueError: a value that is not finite, or a limit that is not positive.

    Reference: arXiv:2002.05202; `GPT_OSS`: arXiv:2508.10925, constants from the authors' code.
    """

    alpha: float = 1.0
    limit: float | None = None
    offset: float = 0.0

    def __post_init__(self):
        if not math.isfinite(self.alpha) or not math.isfinite(self.offset):
            raise ValueError(f"alpha and offset must be finite, got {self.alpha} and {self.offset}")
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise ValueError(f"limit must be a positive number or None, got {self.limit}")

    def __call__(self, hidden_NG: jax.Array) -> jax.Array:
        """Returns act, (N, F), of [gate, up]."""
        gate_NF, up_NF = jnp.split(hidden_NG, 2, axis=-1)
        gate_NF, up_NF = self.clamped(gate_NF, up_NF)
        inside_NF = gate_NF if self.alpha == 1 else self.alpha * gate_NF
        return gate_NF * jax.nn.sigmoid(inside_NF) * self.shifted(up_NF)

    def clamped(self, gate: jax.Array, up: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns gate' and up'. By comparisons, which a NaN passes: a minimum may drop it."""
        if self.limit is None:
            return gate, up
        limit = jnp.asarray(self.limit, gate.dtype)
        up = jnp.where(up > limit, limit, jnp.where(up < -limit, -limit, up))
        return jnp.where(gate > limit, limit, gate), up

    def shifted(self, up: jax.Array) -> jax.Array:
        """Returns up' + offset."""
        return up + jnp.asarray(self.offset, up.dtype) if self.offset else up


SWIGLU = SwiGLU()
GPT_OSS = SwiGLU(alpha=1.702, limit=7.0, offset=1.0)
ACTIVATIONS = {"swiglu": SWIGLU, "gpt_oss": GPT_OSS}
