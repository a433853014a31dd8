"""What a balancing mechanism may define; every part has a neutral default.

E experts, T tokens, N assignments.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moelab.routing import Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism:
    """The neutral mechanism: no loss, no state, no bias. Subclasses' first field is their strength."""

    @property
    def strength(self) -> float:
        """The first field: the coefficient of a loss or the rate of a controller; 0 means off."""
        return getattr(self, dataclasses.fields(self)[0].name)

    @property
    def has_loss(self) -> bool:
        """Whether `loss` is overridden: then strength is its coefficient."""
        return type(self).loss is not Mechanism.loss

    def init(self, num_experts: int) -> dict[str, jax.Array]:
        """Returns the state before the first step: float32 arrays by name."""
        del num_experts
        return {}

    def loss(self, routing: Routing, state: dict[str, jax.Array]) -> jax.Array:
        """Returns the unweighted loss of one layer, a float32 scalar averaged over valid tokens."""
        del routing, state
        return jnp.zeros((), jnp.float32)

    def observe(self, routing: Routing) -> dict[str, jax.Array]:
        """Returns statistics that are summed over micro-batches and devices before `update`."""
        del routing
        return {}

    def update(
        self, state: dict[str, jax.Array], total: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Returns the state after one optimizer step, given the step's summed statistics."""
        del total
        return state

    def selection_bias(self, state: dict[str, jax.Array]) -> jax.Array | None:
        """Returns an (E,) float32 bias for the router's selection, or None."""
        del state
        return None
