"""ReMoE's adaptive L1 penalty: it steers how many ReLU gates are open (arXiv:2412.14711).

    loss = mean over tokens of sum_i f_i ReLU(z_i),   f_i = C / (k T) * number of tokens with z_i > 0
    c <- c * multiplier^sign((1 - k/C) - sparsity),   sparsity = mean share of closed gates over all layers

With f the penalty also balances: experts that are open too often pay more. The coefficient is one for all layers,
starts tiny, and grows until k of C gates are open on average; then it hovers. Gates count as open whether or not
`router.max_experts` leaves them out.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moelab import balancing
from moelab.router import Router
from moelab.routing import Routing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism(balancing.Mechanism):
    """Closes gates until a token has k experts on average."""

    across_layers = True

    coefficient: float = 0.0  # of the first step; 0: off; 1e-8 in the paper
    multiplier: float = 1.2  # factor per step
    balanced: bool = True  # weigh each gate by how often it is open

    @property
    def invariant(self) -> bool:
        """The weights f are the micro-batch's."""
        return not self.balanced

    def init(self, router: Router) -> balancing.State:
        """The coefficient, () float32."""
        del router
        return {"coefficient": jnp.asarray(self.coefficient, jnp.float32)}

    def weight(self, state: balancing.State) -> jax.Array:
        """The coefficient in force."""
        return state["coefficient"]

    def loss(self, routing: Routing, state: balancing.State, router: Router) -> jax.Array:
        """Weighted L1 norm of the gates, mean over the valid tokens."""
        del state
        gate_TC = _gates(routing)
        tokens = jnp.maximum(jnp.sum(routing.aux.mask_T), 1).astype(jnp.float32)
        weight_C = jnp.ones_like(gate_TC[0])
        if self.balanced:
            open_C = jnp.sum(gate_TC > 0, axis=0).astype(jnp.float32)
            weight_C = open_C * (router.num_columns / router.k) / tokens
        return jnp.sum(gate_TC * weight_C[None]) / tokens

    def observe(
        self, routing: Routing, state: balancing.State, router: Router
    ) -> dict[str, jax.Array]:
        """Open gates, and all of them."""
        del state
        opened = jnp.sum(_gates(routing) > 0).astype(jnp.float32)
        tokens = jnp.sum(routing.aux.mask_T).astype(jnp.float32)
        return {"open": opened, "gates": tokens * router.num_columns}

    def update(
        self, state: balancing.State, total: dict[str, jax.Array], router: Router
    ) -> balancing.State:
        """Moves the coefficient by one factor."""
        opened = total["open"] / jnp.maximum(total["gates"], 1.0)
        wanted = router.k / router.num_columns
        factor = self.multiplier ** jnp.sign(opened - wanted)
        moved = {"coefficient": state["coefficient"] * factor}
        return balancing.moved_if(total["gates"] > 0, moved, state)


def _gates(routing: Routing) -> jax.Array:
    return jnp.where(routing.aux.mask_T[:, None], jax.nn.relu(routing.aux.logit_TC), 0)


def validate(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields: (field, message)."""
    problems = balancing.check_strength(fields, "coefficient")
    if not fields["multiplier"] > 1:
        problems.append(("multiplier", f"must be above 1, got {fields['multiplier']}"))
    if config.router.kind != "remoe":
        problems.append(("coefficient", "penalises the gates of router.kind=remoe; set it to 0"))
    return problems
