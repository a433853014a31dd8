"""The sparse feed-forward of a transformer block: router, experts, shared experts, balancing.

B sequences, L tokens each, T = B*L tokens, D model width, E experts, N assignments.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import pallas_kernels
from moelab import balancing, experts, parallel
from moelab import routing as routing_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """A sparse feed-forward: hashable, so that blocks of one kind share one compiled program.

    Attributes:
      router: an unbound linen router; each block applies it to parameters of its own.
      mechanisms: (name, mechanism) of the balancing mechanisms that are on.
      expert_width: F.
      shared_width: hidden width of the shared experts together; 0: none.
      capacity_factor: 0 for dropless.
      precision: formats of the expert matmuls; None computes in the block's dtype.
      implementation: grouped matmul backend; None picks.
    """

    router: nn.Module
    mechanisms: tuple[tuple[str, balancing.Mechanism], ...]
    expert_width: int
    shared_width: int = 0
    capacity_factor: float = 0.0
    precision: pallas_kernels.MatmulPrecision | None = None
    implementation: str | None = None


class LayerReport(NamedTuple):
    """What leaves a MoE layer besides its output, reduced over tokens.

    Attributes:
      loss: unweighted balancing losses by mechanism, float32 scalars.
      observation: statistics by mechanism, to be summed over micro-batches before `update`.
      load_E: float32 number of assignments that each expert computed.
      dropped: float32 number of assignments that a capacity removed.
      logit_norm: float32 mean over valid tokens of the router logits' Euclidean norm.
      trace: the Routing itself where asked for, else None.
    """

    loss: dict[str, jax.Array]
    observation: dict[str, dict[str, jax.Array]]
    load_E: jax.Array
    dropped: jax.Array
    logit_norm: jax.Array
    trace: Any


class MoeBlock(nn.Module):
    """Routes, computes the experts inside shard_map, and reports the load."""

    config: MoeConfig
    mesh: jax.sharding.Mesh
    output_scale: float = 1.0

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, inputs: routing_lib.RouterInput, trace: bool = False
    ) -> tuple[jax.Array, LayerReport]:
        config, width = self.config, x_BLD.shape[-1]
        x_TD = x_BLD.reshape(-1, width)
        router_params = self.param("router", _init_router(config.router, width))
        weights = self._expert_weights(width)
        states = {
            name: self._mechanism_state(name, mechanism) for name, mechanism in config.mechanisms
        }
        local = parallel.shard_tokens(
            _local_forward(config, inputs.train), self.mesh, (True, True, False, False, False)
        )
        y_TD, routing = local(
            x_TD, inputs._replace(train=None), router_params, _bias(config, states), weights
        )
        if config.shared_width:
            shared = self.param(
                "shared",
                lambda key: experts.init_swiglu(
                    key, (), width, config.shared_width, self.output_scale
                ),
            )
            y_TD = y_TD + experts.swiglu(x_TD, shared)
        return y_TD.reshape(x_BLD.shape), _report(config, routing, states, trace)

    def _mechanism_state(self, name: str, mechanism: balancing.Mechanism) -> dict[str, jax.Array]:
        """The mechanism's state, read-only in here; `update` moves it once per optimizer step."""
        initial = mechanism.init(self.config.router.num_experts)
        return self.variable("router_state", name, lambda: initial).value if initial else {}

    def _expert_weights(self, width: int) -> experts.Weights:
        """The packed weights where a quantized collection came along, else the parameters."""
        if self.has_variable("quantized", "experts"):
            return self.get_variable("quantized", "experts")
        return self.param(
            "experts",
            lambda key: experts.init_swiglu(
                key,
                (self.config.router.num_experts,),
                width,
                self.config.expert_width,
                self.output_scale,
            ),
        )


def _init_router(router: nn.Module, width: int):
    """Returns an initializer that draws the router's parameters from two tokens of zeros."""

    def init(key: jax.Array):
        zeros_T = jnp.zeros((router.num_experts,), jnp.int32)
        inputs = routing_lib.RouterInput(
            zeros_T, zeros_T, zeros_T, zeros_T == 0, zeros_T, jnp.zeros((), jnp.int32)
        )
        x_TD = jnp.zeros((router.num_experts, width), jnp.float32)
        variables = router.init(key, x_TD, inputs, None)
        return variables["params"] if "params" in variables else {}

    return init


def _bias(config: MoeConfig, states: dict) -> jax.Array | None:
    """Sums the selection biases of the mechanisms, or None where there are none."""
    biases = [mechanism.selection_bias(states[name]) for name, mechanism in config.mechanisms]
    biases = [bias for bias in biases if bias is not None]
    return sum(biases[1:], biases[0]) if biases else None


def _local_forward(config: MoeConfig, train: bool):
    """Returns router and experts as a function of one device's tokens."""
    router = config.router
    per_token = router.k if router.token_choice else None

    def forward(x_TD, inputs, router_params, bias_E, weights):
        inputs = inputs._replace(train=train)
        routing = router.apply({"params": router_params}, x_TD, inputs, bias_E)
        if config.capacity_factor and per_token:
            limit = routing_lib.capacity(
                routing.expert_N.size, router.num_experts, config.capacity_factor
            )
            routing = routing_lib.drop_over_capacity(routing, router.num_experts, per_token, limit)
        y_TD = experts.apply(
            weights,
            x_TD,
            routing,
            assignments_per_token=per_token,
            precision=config.precision,
            implementation=config.implementation,
        )
        first = jax.lax.axis_index(parallel.DATA) * x_TD.shape[0]
        return y_TD, routing._replace(token_N=routing.token_N + first)

    return forward


def _report(
    config: MoeConfig, routing: routing_lib.Routing, states: dict, trace: bool
) -> LayerReport:
    num_experts, aux = config.router.num_experts, routing.aux
    load_E = routing_lib.load(routing.expert_N, num_experts)
    chosen = jnp.sum(aux.choice_N < num_experts).astype(jnp.float32)
    norm_T = jnp.sqrt(jnp.sum(jnp.square(jax.lax.stop_gradient(aux.logit_TE)), axis=-1))
    valid = jnp.maximum(jnp.sum(aux.mask_T), 1).astype(jnp.float32)
    return LayerReport(
        loss={n: m.loss(routing, states[n]) for n, m in config.mechanisms if m.has_loss},
        observation={n: m.observe(routing) for n, m in config.mechanisms},
        load_E=load_E,
        dropped=chosen - jnp.sum(load_E),
        logit_norm=jnp.sum(jnp.where(aux.mask_T, norm_T, 0)) / valid,
        trace=routing if trace else None,
    )
