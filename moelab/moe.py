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
from moelab import balancing, capacity, experts, idle, parallel
from moelab import routing as routing_lib
from moelab.quant import linear
from moelab.router import Router


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """A sparse feed-forward: hashable, so that blocks of one kind share one compiled program.

    Attributes:
      router: an unbound linen router; each block applies it to parameters of its own.
      mechanisms: (name, mechanism) of the balancing mechanisms that are on.
      expert_width: F.
      shared_width: hidden width of the shared experts together; 0: none.
      capacity_factor: 0 for dropless.
      slots_per_expert: 0, or the slots per expert and sequence of Soft MoE, which then replaces the router.
      activation: of the routed experts; shared ones have SwiGLU.
      precision: formats of the expert matmuls; None computes in the block's dtype.
      shared_precision: of the shared experts.
      router_precision: formats of the router's parameters and input, whose product stays float32.
      implementation: grouped matmul backend; None picks.
      parallel: each device holds its share of the experts, and rows travel to them.
      receive_factor: see `experts.apply_parallel`.
    """

    router: Router
    mechanisms: tuple[tuple[str, balancing.Mechanism], ...]
    expert_width: int
    shared_width: int = 0
    capacity_factor: float = 0.0
    slots_per_expert: int = 0
    activation: pallas_kernels.SwiGLU = pallas_kernels.SWIGLU
    precision: pallas_kernels.MlpPrecision | None = None
    shared_precision: pallas_kernels.MatmulPrecision | None = None
    router_precision: pallas_kernels.MatmulPrecision | None = None
    implementation: str | None = None
    parallel: bool = False
    receive_factor: float = 0.0

    @property
    def leak(self) -> str:
        """Why outputs depend on later tokens; empty where they do not."""
        if self.slots_per_expert:
            return "every slot of Soft MoE mixes all tokens of its sequence, later ones included"
        if not self.router.causal:
            return self.router.reason
        if self.capacity_factor and self.router.slots != 1:
            return "under a capacity, first choices of later tokens drop second choices of earlier ones"
        if self.parallel and self.receive_factor:
            return "where a device has no room for a row, later tokens' rows may take it from earlier ones"
        return ""

    @property
    def group(self) -> str:
        """Among which tokens choices depend on one another, so that results vary with its cut; empty: none."""
        if self.slots_per_expert:
            return "sequence"
        limited = self.capacity_factor and self.router.slots
        if self.router.competes or limited or (self.parallel and self.receive_factor):
            return "micro-batch of a device"
        return ""


class LayerReport(NamedTuple):
    """What leaves a MoE layer besides its output, reduced over tokens but for `rows` and `trace`.

    Attributes:
      loss: unweighted balancing losses by mechanism, float32 scalars.
      weight: their coefficients in force.
      observation: statistics by mechanism, to be summed over micro-batches before `update`.
      rows: statistics by mechanism with a token axis, to be concatenated before `update`.
      load_E: float32 number of assignments that each expert computed.
      idle: float32 number of assignments to experts without computation.
      dropped: float32 number of assignments that a capacity removed.
      logit_norm: float32 mean over valid tokens of the router logits' Euclidean norm.
      log_sum_exp: float32 mean over valid tokens of the router logits' log-sum-exp, whose square the z-loss penalises.
      trace: the Routing itself where asked for, else None.
    """

    loss: dict[str, jax.Array]
    weight: dict[str, jax.Array]
    observation: dict[str, dict[str, jax.Array]]
    rows: dict[str, dict[str, jax.Array]]
    load_E: jax.Array
    idle: jax.Array
    dropped: jax.Array
    logit_norm: jax.Array
    log_sum_exp: jax.Array
    trace: Any


class MoeBlock(nn.Module):
    """Routes, computes the experts inside shard_map, and reports the load."""

    config: MoeConfig
    mesh: jax.sharding.Mesh
    output_scale: float = 1.0

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, inputs: routing_lib.RouterInput, trace: bool = False
    ) -> tuple[jax.Array, LayerReport, jax.Array]:
        """Returns the output, the report, and the router's logits (T, C)."""
        config, width = self.config, x_BLD.shape[-1]
        router = config.router
        x_TD = x_BLD.reshape(-1, width)
        # In this order: a parameter's random key depends on the ones before it.
        router_params = self.param("router", _init_router(router, width))
        weights, idle_weights = self._expert_weights(width), {}
        if router.idle_experts:
            idle_weights = self.param("idle", idle.init, router.idle_experts, width)
        states = {
            name: self._mechanism_state(name, mechanism) for name, mechanism in config.mechanisms
        }
        local = parallel.shard_tokens(
            _local_forward(config, inputs.train),
            self.mesh,
            (True, True, False, False, config.parallel),
        )
        self.sow("calibration", "x_TD", x_TD)  # kept only where the caller makes it mutable
        # The key is no token's: it goes in with the parameters.
        per_token, key = inputs._replace(train=None, key=None), inputs.key
        shared = {"router": router_params, "key": key, "idle": idle_weights}
        y_TD, routing = local(x_TD, per_token, shared, _bias(config, states), weights)
        if config.shared_width:
            y_TD = y_TD + self._shared_experts(x_TD, linear.fold(key, inputs.position_T[0]))
        found = report(config, routing, states, trace)
        return y_TD.reshape(x_BLD.shape), found, routing.aux.logit_TC

    def _mechanism_state(self, name: str, mechanism: balancing.Mechanism) -> dict[str, jax.Array]:
        """The mechanism's state, read-only in here; `update` moves it once per optimizer step."""
        initial = mechanism.init(self.config.router)
        return self.variable("router_state", name, lambda: initial).value if initial else {}

    def _shared_experts(self, x_TD: jax.Array, key: jax.Array) -> jax.Array:
        """The experts that every token passes, as one SwiGLU: (T, D)."""
        hidden = self.config.shared_width
        weights = self.param(
            "shared",
            lambda key: experts.init_swiglu(key, (), x_TD.shape[1], hidden, self.output_scale),
        )
        return experts.swiglu(x_TD, weights, self.config.shared_precision, linear.fold(key, 1))

    def _expert_weights(self, width: int) -> experts.Weights:
        """The packed weights where a quantized collection came along, and the parameters."""
        if self.has_variable("quantized", "experts"):
            plain = self.has_variable("params", "experts")
            rest = self.get_variable("params", "experts") if plain else {}
            return rest | self.get_variable("quantized", "experts")
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


def _init_router(router: Router, width: int):
    """Returns an initializer that draws the router's parameters from tokens of zeros."""

    def init(key: jax.Array):
        inputs = routing_lib.plain_inputs(router.num_experts)
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
    router, factor = config.router, config.capacity_factor

    def forward(x_TD, inputs, shared, bias_C, weights):
        inputs = inputs._replace(train=train, key=shared["key"])
        routing = router.apply(*_router_operands(config, shared["router"], x_TD), inputs, bias_C)
        if factor and router.slots:
            limit = capacity.limit_of_valid(inputs.mask_T, router.k, router.num_experts, factor)
            first_T = routing.weight_N.reshape(-1, router.slots)[:, 0] if router.by_score else None
            routing = capacity.drop(routing, router.num_experts, router.slots, limit, first_T)
        y_TD, routing = _experts(config, weights, x_TD, routing, _rounding_key(config, inputs))
        if router.idle_experts:
            kinds, num_experts = router.idle_experts, router.num_experts
            y_TD = y_TD + idle.apply(shared["idle"], kinds, x_TD, routing, num_experts)
        first = jax.lax.axis_index(parallel.DATA) * x_TD.shape[0]
        return y_TD, routing._replace(token_N=routing.token_N + first)

    return forward


def _experts(
    config: MoeConfig,
    weights: experts.Weights,
    x_TD: jax.Array,
    routing: routing_lib.Routing,
    key: jax.Array | None,
) -> tuple[jax.Array, routing_lib.Routing]:
    """The experts' output, and the routing without what no device had room for."""
    options = dict(
        assignments_per_token=config.router.slots,
        activation=config.activation,
        precision=config.precision,
        key=key,
        implementation=config.implementation,
    )
    if not config.parallel:
        return experts.apply(weights, x_TD, routing, **options), routing
    options |= dict(axis=parallel.DATA, receive_factor=config.receive_factor)
    y_TD, kept_N = experts.apply_parallel(weights, x_TD, routing, **options)
    return y_TD, routing._replace(
        expert_N=jnp.where(kept_N, routing.expert_N, config.router.num_experts),
        weight_N=jnp.where(kept_N, routing.weight_N, 0),
    )


def _router_operands(config: MoeConfig, params: Any, x_TD: jax.Array) -> tuple[dict, jax.Array]:
    """The router's variables and input, rounded where its precision says so."""
    precision = config.router_precision
    if precision is None:
        return {"params": params}, x_TD
    params = linear.rounded_router(params, x_TD.shape[1], precision.w, precision.w_rule)
    return {"params": params}, linear.rounded(x_TD, precision.x, precision.x_rule)


def _rounding_key(config: MoeConfig, inputs: routing_lib.RouterInput) -> jax.Array | None:
    """A key for the gradients' rounding: of the step, the layer, and where these tokens are in the step's batch."""
    if config.precision is None or not config.precision.needs_key:
        return None
    return linear.fold(linear.fold(inputs.key, inputs.position_T[0]), 0)


def report(
    config: MoeConfig, routing: routing_lib.Routing, states: dict, trace: bool
) -> LayerReport:
    """Reduces a routing to what leaves the layer."""
    router, aux = config.router, routing.aux
    load_E = routing_lib.load(routing.expert_N, router.num_experts)
    idle_count = jnp.sum(routing.expert_N > router.num_experts).astype(jnp.float32)
    chosen = jnp.sum(aux.choice_N < router.num_columns).astype(jnp.float32)
    logit_TC = jax.lax.stop_gradient(aux.logit_TC)
    valid = jnp.maximum(jnp.sum(aux.mask_T), 1).astype(jnp.float32)

    def mean(value_T: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(aux.mask_T, value_T, 0)) / valid

    with_loss = [(n, m) for n, m in config.mechanisms if m.has_loss]
    weights = {n: jnp.asarray(m.weight(states[n]), jnp.float32) for n, m in with_loss}
    return LayerReport(
        loss={n: m.loss(routing, states[n], router) for n, m in with_loss},
        weight=weights,
        observation={n: m.observe(routing, states[n], router) for n, m in config.mechanisms},
        rows={n: m.rows(routing, states[n], router) for n, m in config.mechanisms},
        load_E=load_E,
        idle=idle_count,
        dropped=chosen - jnp.sum(load_E) - idle_count,
        logit_norm=mean(jnp.sqrt(jnp.sum(jnp.square(logit_TC), axis=-1))),
        log_sum_exp=mean(jax.nn.logsumexp(logit_TC, axis=-1)),
        trace=routing if trace else None,
    )
