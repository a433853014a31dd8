"""What every router declares and shares: the base class of the files in `routers/`.

T tokens, E experts, C columns of scores, K slots per token, D model width.
"""

from __future__ import annotations

import dataclasses
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp

from moelab import routing, scores, selection


class Router(nn.Module):
    """A linear router; subclasses define `__call__(x_TD, inputs, selection_bias_E) -> Routing`.

    Class attributes say what holds for a router; where it depends on the fields, they are properties.

    causal: no output depends on a later token of the sequence. Where it is False, `reason` says why.
    competes: tokens compete with the other tokens of their micro-batch on their device, with a capacity or without one,
      so that a choice depends on how the batch is cut. Under a capacity those of all routers do: `moe.MoeConfig.group`.
    takes_bias: a balancing bias steers its selection.
    learns: its choice depends on parameters, which a loss can move.
    scores_learn: its logits and scores do, whether they choose or only weigh.
    balanced: in training its load is equal by construction, so that no loss can even it out.
    ranked: it may be compared with others; bounds and controls may not.
    by_score: under a capacity, tokens with a higher first weight keep their place (V-MoE), not earlier ones.
    uses_previous_logits: it wants the logits of the MoE layer before.
    idle_experts: kinds of its experts without computation (zero, copy, constant), ids E+1, E+2, ...
    """

    num_experts: int
    k: int = 2  # experts per token
    init_scale: float = 1.0  # the kernel's standard deviation is init_scale / sqrt(D)

    causal = True
    reason = ""
    competes = False
    takes_bias = True
    learns = True
    scores_learn = True
    balanced = False
    ranked = True
    by_score = False
    uses_previous_logits = False
    idle_experts = ()

    def setup(self) -> None:
        """Refuses wrong fields before anything is computed, however the router was made."""
        refuse(self)

    @property
    def slots(self) -> int | None:
        """Assignments per token of token choice, used or not; None where experts choose."""
        return self.k

    @property
    def num_columns(self) -> int:
        """C, the width of the scores."""
        return self.num_experts + len(self.idle_experts)

    def kernel_logits(self, x_TD: jax.Array, name: str = "kernel") -> jax.Array:
        """Multiplies the tokens by a parameter (D, C); call it inside `nn.compact`."""
        width = x_TD.shape[1]
        init = nn.initializers.normal(self.init_scale * width**-0.5)
        return scores.logits(x_TD, self.param(name, init, (width, self.num_columns), jnp.float32))

    def choose(
        self, rank_TC: jax.Array, bias_C: jax.Array | None, inputs: routing.RouterInput
    ) -> jax.Array:
        """Returns the k best columns of rank + bias, or the replayed ones: (T, K) int32."""
        if inputs.replay_TK is not None:
            return inputs.replay_TK
        if bias_C is not None:
            rank_TC = rank_TC + bias_C[None, :]
        return selection.top_k(rank_TC, self.k)


class _NotKnown(Exception):
    """A check asked for more of a config than a router has."""


@dataclasses.dataclass(frozen=True)
class _Alone:
    """The part of a run's config that a router made from Python knows."""

    num_experts: int

    @property
    def moe(self) -> _Alone:
        return self

    def __getattr__(self, name: str):
        raise _NotKnown(name)


def refuse(router: Router) -> None:
    """Raises what a config's validation would say, for a router made from Python.

    A check that wants more of the config than moe.num_experts is left to that validation.

    Raises:
      ValueError: with every problem.
    """
    if router.num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {router.num_experts}")
    module = sys.modules.get(type(router).__module__)
    mine = getattr(module, "Router", None) is type(router)  # a notebook's validate may be anything
    validate = getattr(module, "validate", check_count) if mine else check_count
    linen = ("parent", "name", "num_experts")
    names = [f.name for f in dataclasses.fields(router) if f.name not in linen]
    fields = {name: getattr(router, name) for name in names}
    try:
        problems = validate(fields, _Alone(router.num_experts))
    except _NotKnown:
        problems = check_count(fields, _Alone(router.num_experts))
    if problems:
        kind = type(router).__module__.rpartition(".")[2] if mine else type(router).__name__
        text = "; ".join(f"{name} {message}" for name, message in problems)
        raise ValueError(f"router {kind}: {text}")


def check_count(fields: dict, config, *names: str) -> list[tuple[str, str]]:
    """Lists fields (k if none is named) that are not in 1..num_experts: (field, message)."""
    problems, num_experts = [], config.moe.num_experts
    for name in names or ("k",):
        if fields[name] < 1:
            problems.append((name, f"must be at least 1, got {fields[name]}"))
        elif 0 < num_experts < fields[name]:
            problems.append(
                (name, f"must be at most moe.num_experts={num_experts}, got {fields[name]}")
            )
    if fields.get("init_scale", 0) < 0:
        problems.append(("init_scale", f"must not be negative, got {fields['init_scale']}"))
    return problems


def check_choice(fields: dict, **choices: tuple[str, ...]) -> list[tuple[str, str]]:
    """Lists fields whose value is none of the given: (field, message)."""
    return [
        (name, f"must be one of {', '.join(known)}, got {fields[name]!r}")
        for name, known in choices.items()
        if fields[name] not in known
    ]


def check_positive(fields: dict, *names: str) -> list[tuple[str, str]]:
    """Lists fields that are not above 0: (field, message)."""
    return [(n, f"must be above 0, got {fields[n]}") for n in names if not fields[n] > 0]
