"""What a balancing mechanism may define; every part has a neutral default.

E experts, C columns of scores (C = E but for experts without computation), T tokens, N assignments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moelab.router import Router
from moelab.routing import Routing

State = dict[str, jax.Array]
SCOPES = ("micro_batch", "sequence", "global_batch")
COUNTS = ("first", "last_step")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism:
    """The neutral mechanism: no loss, no state, no bias. Subclasses' first field is their strength.

    Every method is pure and sees one layer. `state` does not change inside a step: `update` moves it once per
    optimizer step, given sums (`observe`) and concatenations (`rows`) over all micro-batches and devices.

    across_layers: the statistics of all MoE layers are added up, so that all layers have one state.
    steers: what it moves, so that a config can be refused where the router lets nothing be moved (`check_steers`):
      scores, choice, load or bias; empty: not checked.
    """

    across_layers = False
    steers = ""

    @property
    def strength(self) -> float:
        """The first field: the coefficient of a loss or the rate of a controller; 0 means off."""
        return getattr(self, dataclasses.fields(self)[0].name)

    @property
    def has_loss(self) -> bool:
        """Whether `loss` is overridden."""
        return type(self).loss is not Mechanism.loss

    @property
    def counts_first(self) -> bool:
        """Whether `update` must see the statistics of the whole step before the gradient is taken."""
        return False

    @property
    def invariant(self) -> bool:
        """Whether the step does not depend on how its batch is cut into micro-batches."""
        return True

    def uncut(self) -> Mechanism:
        """Returns the same mechanism for steps of one micro-batch, if that is cheaper."""
        return self

    def init(self, router: Router) -> State:
        """Returns the state before the first step: float32 arrays by name."""
        del router
        return {}

    def weight(self, state: State) -> jax.Array | float:
        """Returns the coefficient of the loss in force."""
        del state
        return self.strength

    def loss(self, routing: Routing, state: State, router: Router) -> jax.Array:
        """Returns the unweighted loss of one layer, a float32 scalar averaged over valid tokens."""
        del routing, state, router
        return jnp.zeros((), jnp.float32)

    def observe(self, routing: Routing, state: State, router: Router) -> dict[str, jax.Array]:
        """Returns statistics that are summed over micro-batches before `update`."""
        del routing, state, router
        return {}

    def rows(self, routing: Routing, state: State, router: Router) -> dict[str, jax.Array]:
        """Returns statistics with a leading token axis that are concatenated over micro-batches before `update`."""
        del routing, state, router
        return {}

    def update(self, state: State, total: dict[str, jax.Array], router: Router) -> State:
        """Returns the state after one optimizer step, given its statistics."""
        del total, router
        return state

    def selection_bias(self, state: State) -> jax.Array | None:
        """Returns a (C,) float32 bias for the router's selection, or None."""
        del state
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScopedLoss(Mechanism):
    """A loss that is a function of sums over tokens; the sums run over the scope.

    Subclasses define `sums` (what each token adds), `value` (the loss of the sums) and `balanced` (the sums of one
    token at perfect balance). The scope says over which tokens the sums run:

    micro_batch: the tokens of a forward pass, on all devices. Depends on how the batch is cut.
    sequence: each sequence; the losses are averaged, weighted by the sequences' valid tokens (DeepSeek-V3,
      arXiv:2412.19437, eq. 17-20).
    global_batch: all tokens of the optimizer step (arXiv:2501.11873). The gradient of a micro-batch is taken through
      its own share of the sums, so that the micro-batches' gradients add up to that of the loss of the whole batch.
    """

    steers = "choice"

    coefficient: float = 0.0  # factor of the loss; 0: off
    scope: str = (
        "micro_batch"  # tokens that are balanced together: micro_batch, sequence or global_batch
    )
    counts: str = "first"  # global_batch: count all micro-batches first (exact), or last_step

    def __post_init__(self):
        if self.scope not in SCOPES or self.counts not in COUNTS:
            raise ValueError(
                f"scope must be one of {SCOPES} and counts one of {COUNTS}, got {self.scope!r}, {self.counts!r}"
            )

    def sums(self, routing: Routing, router: Router) -> dict[str, jax.Array]:
        """Returns what each token adds, leading axis T, zero for padding; `token_T` (1 or 0) is added to them."""
        raise NotImplementedError

    def value(self, total: dict[str, jax.Array]) -> jax.Array:
        """Returns the loss of the sums (names as in `sums`, leading axis gone; `token_T` became a scalar)."""
        raise NotImplementedError

    def balanced(self, router: Router) -> dict[str, jax.Array]:
        """Returns the sums of one token at perfect balance."""
        raise NotImplementedError

    @property
    def counts_first(self) -> bool:
        """In the global batch, unless the last step's counts serve."""
        return self.scope == "global_batch" and self.counts == "first"

    @property
    def invariant(self) -> bool:
        """All scopes but the micro-batch."""
        return self.scope != "micro_batch"

    def uncut(self) -> ScopedLoss:
        """One micro-batch is the global batch: nothing has to be counted first."""
        return dataclasses.replace(self, scope="micro_batch") if self.counts_first else self

    def init(self, router: Router) -> State:
        """The sums of the step, for the global batch only."""
        if self.scope != "global_batch":
            return {}
        return self.balanced(router) | {"token_T": jnp.ones((), jnp.float32)}

    def loss(self, routing: Routing, state: State, router: Router) -> jax.Array:
        """The loss over the scope."""
        token_T = routing.aux.mask_T.astype(jnp.float32)
        added = self.sums(routing, router) | {"token_T": token_T}
        if self.scope == "sequence":
            return self._by_sequence(added, routing.aux.sequence_T)
        total = jax.tree.map(lambda a: jnp.sum(a, axis=0), added)
        if self.scope == "micro_batch":
            return self.value(total)
        value, slope = jax.value_and_grad(self.value)(jax.tree.map(jax.lax.stop_gradient, state))
        part = sum(jax.tree.leaves(jax.tree.map(lambda s, a: jnp.sum(s * a), slope, total)))
        share = total["token_T"] / jnp.maximum(state["token_T"], 1.0)
        return value + (part - jax.lax.stop_gradient(part)) / jnp.maximum(share, 1e-9)

    def _by_sequence(self, added: dict[str, jax.Array], sequence_T: jax.Array) -> jax.Array:
        """There are at most T sequences; those without tokens weigh nothing."""
        bound = sequence_T.shape[0]
        total = {n: jax.ops.segment_sum(a, sequence_T, bound) for n, a in added.items()}
        tokens_S = total["token_T"]
        # Sums of one balanced token stand in for empty sequences: no 0 / 0, in the gradient neither.
        used_S = tokens_S > 0
        safe = {n: jnp.where(_like(used_S, a), a, 1.0) for n, a in total.items()}
        loss_S = jnp.where(used_S, jax.vmap(self.value)(safe), 0.0)
        return jnp.sum(loss_S * tokens_S) / jnp.maximum(jnp.sum(tokens_S), 1.0)

    def observe(self, routing: Routing, state: State, router: Router) -> dict[str, jax.Array]:
        """The sums, where the scope is the global batch."""
        del state
        if self.scope != "global_batch":
            return {}
        token_T = routing.aux.mask_T.astype(jnp.float32)
        added = self.sums(routing, router) | {"token_T": token_T}
        return jax.tree.map(lambda a: jax.lax.stop_gradient(jnp.sum(a, axis=0)), added)

    def update(self, state: State, total: dict[str, jax.Array], router: Router) -> State:
        """Keeps the sums of the step."""
        del router
        return moved_if(total["token_T"] > 0, total, state) if state else state


def moved_if(seen: jax.Array, moved: State, state: State) -> State:
    """Returns the moved state, or the state as it was after a step without a valid token: it taught nothing."""
    return jax.tree.map(lambda new, old: jnp.where(seen, new, old), moved, state)


def _like(flag_S: jax.Array, a: jax.Array) -> jax.Array:
    return flag_S.reshape(flag_S.shape + (1,) * (a.ndim - 1))


def check_scope(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields of a scoped loss: (field, message)."""
    problems = check_strength(fields, "coefficient")
    if fields["scope"] not in SCOPES:
        problems.append(("scope", f"must be one of {', '.join(SCOPES)}, got {fields['scope']!r}"))
    if fields["counts"] not in COUNTS:
        problems.append(("counts", f"must be first or last_step, got {fields['counts']!r}"))
    elif fields["counts"] == "last_step" and fields["scope"] != "global_batch":
        message = f"is read with scope=global_batch alone, and scope is {fields['scope']}; set it to first"
        problems.append(("counts", message))
    return problems


def check_strength(fields: dict, *names: str) -> list[tuple[str, str]]:
    """Lists fields that are negative: (field, message)."""
    return [(n, f"must be at least 0, got {fields[n]}") for n in names if fields[n] < 0]


def column_counts(routing: Routing, num_columns: int, slots: int | None = None) -> jax.Array:
    """Counts each token's choices before any capacity: (T, C) float32; padding adds nothing.

    Args:
      routing: N = T * K token-major, or experts' choice.
      num_columns: C.
      slots: count only this many of each token's first slots; None: all.
    """
    choice_N, token_N = routing.aux.choice_N, routing.token_N
    num_tokens = routing.aux.mask_T.shape[0]
    if slots is not None:
        choice_N = choice_N.reshape(num_tokens, -1)[:, :slots].reshape(-1)
        token_N = token_N.reshape(num_tokens, -1)[:, :slots].reshape(-1)
    count_TC = jnp.zeros((num_tokens, num_columns), jnp.float32)
    return count_TC.at[token_N, choice_N].add(1.0, mode="drop")


def column_weights(routing: Routing, num_experts: int, num_columns: int) -> jax.Array:
    """Spreads the combine weights over the columns: (T, C) float32, 0 where nothing was chosen."""
    expert_N = routing.expert_N
    column_N = jnp.where(expert_N > num_experts, expert_N - 1, expert_N)
    column_N = jnp.where(expert_N == num_experts, num_columns, column_N)
    weight_TC = jnp.zeros((routing.aux.mask_T.shape[0], num_columns), jnp.float32)
    return weight_TC.at[routing.token_N, column_N].add(routing.weight_N, mode="drop")


def squared_variation(sum_C: jax.Array) -> jax.Array:
    """Squared coefficient of variation: variance / mean^2, 0 at balance (arXiv:1701.06538, eq. 6-7)."""
    mean = jnp.mean(sum_C)
    return jnp.mean(jnp.square(sum_C - mean)) / jnp.maximum(jnp.square(mean), 1e-20)


def router_of(config) -> Router:
    """Builds the router of a config, for what it declares; its fields may still be wrong."""
    from moelab import routers

    fields = config.router.to_dict()
    return routers.declare(fields.pop("kind"), num_experts=max(1, config.moe.num_experts), **fields)


def check_steers(
    mechanism: type[Mechanism], values: Mapping[str, Any], config
) -> list[tuple[str, str]]:
    """Lists the strength of a mechanism that could move nothing in this config's router: (field, message).

    Args:
      mechanism: its class.
      values: its fields.
      config: a full config.
    """
    if not (mechanism.steers and config.moe.num_experts):
        return []
    router, soft = router_of(config), config.moe.slots_per_expert > 0
    missing = {
        "scores": (router.scores_learn, "has no scores that training moves"),
        "choice": (router.learns, "learns nothing in its choice"),
        "load": (router.learns, "learns nothing in its choice"),
        "bias": (router.takes_bias and not soft, "takes no selection bias"),
    }
    possible, reason = missing[mechanism.steers]
    # Equal over the batch, that is: sequences may still differ.
    equal = router.balanced and values.get("scope") != "sequence"
    if mechanism.steers == "load" and (equal or soft):
        possible, reason = False, "has an equal load by construction"
    if mechanism.steers in ("load", "bias") and router.slots == router.k == router.num_columns:
        possible, reason = False, "chooses every expert"
    if possible:
        return []
    what = "Soft MoE" if soft else f"router.kind={config.router.kind}"
    name = dataclasses.fields(mechanism)[0].name
    return [(name, f"steers nothing: {what} {reason}; set it to 0")]
