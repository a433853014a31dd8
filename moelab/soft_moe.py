"""Soft MoE: experts work on mixtures of a sequence's tokens, nothing is chosen or dropped (arXiv:2308.00951).

    logit = normalise(X) (scale * normalise(Phi))
    slot inputs = softmax over tokens (logit)^T X,   y = softmax over slots (logit) experts(slot inputs)

Not causal: every slot mixes all tokens of its sequence, later ones included. Its own block, since nothing in it is an
assignment of tokens to experts; what its report calls load is uniform.

B sequences, L tokens each, T = B*L, D model width, E experts, S slots per expert and sequence, P = E*S.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

import pallas_kernels
from moelab import experts, moe, parallel, routing
from moelab.quant import linear


class SoftMoeBlock(moe.MoeBlock):
    """Mixes tokens into slots, computes each expert's slots, and mixes the results back."""

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, inputs: routing.RouterInput, trace: bool = False
    ) -> tuple[jax.Array, moe.LayerReport, jax.Array]:
        """As `moe.MoeBlock`; the logits are those of the experts' slots, summed in the log domain."""
        config, (batch, length, width) = self.config, x_BLD.shape
        num_experts, slots = config.router.num_experts, config.slots_per_expert
        weights = self._expert_weights(width)
        phi_DP = self.param(
            "phi", nn.initializers.normal(width**-0.5), (width, num_experts * slots), jnp.float32
        )
        scale = self.param("scale", nn.initializers.ones, (), jnp.float32)
        mask_BL = inputs.mask_T.reshape(batch, length)
        local = parallel.shard_tokens(_local_forward(config), self.mesh, (True, True, False, False))
        random = linear.fold(inputs.key, inputs.position_T[0])
        shared = (phi_DP, scale, random)
        y_BLD, combine_BLP, logit_BLP = local(x_BLD, mask_BL, shared, weights)
        if config.shared_width:
            y_BLD = y_BLD + self._shared_experts(x_BLD.reshape(-1, width), random).reshape(
                x_BLD.shape
            )
        described = _describe(config, inputs, combine_BLP, logit_BLP)
        states = {
            name: self._mechanism_state(name, mechanism) for name, mechanism in config.mechanisms
        }
        report = moe.report(config, described, states, trace)
        return y_BLD, report, described.aux.logit_TC


def _local_forward(config: moe.MoeConfig):
    """Returns the block as a function of one device's sequences."""
    num_experts, slots = config.router.num_experts, config.slots_per_expert

    def forward(x_BLD, mask_BL, shared, weights):
        phi_DP, scale, random = shared
        rounds = config.precision is not None and config.precision.needs_key
        random = linear.fold(random, jax.lax.axis_index(parallel.DATA)) if rounds else None
        batch, _, width = x_BLD.shape
        x32_BLD = x_BLD.astype(jnp.float32)
        logit_BLP = jnp.einsum(
            "bld,dp->blp", _unit(x32_BLD, -1), scale * _unit(phi_DP, 0), precision="highest"
        )
        mask_BL1 = mask_BL[:, :, None]
        # A sequence of padding alone mixes evenly; its tokens get nothing back.
        into_BLP = jax.nn.softmax(jnp.where(mask_BL1, logit_BLP, -1e30), axis=1)
        back_BLP = jnp.where(mask_BL1, jax.nn.softmax(logit_BLP, axis=2), 0.0)
        slot_BPD = jnp.einsum("blp,bld->bpd", into_BLP, x32_BLD)
        # Rows sorted by expert, as the grouped matmul wants them.
        slot_EBSD = slot_BPD.reshape(batch, num_experts, slots, width).swapaxes(0, 1)
        rows_ND = slot_EBSD.reshape(-1, width).astype(x_BLD.dtype)
        sizes_E = jnp.full((num_experts,), batch * slots, jnp.int32)
        out_ND = pallas_kernels.expert_mlp(
            rows_ND,
            experts.cast(weights["gate_up"], x_BLD.dtype, config.precision),
            experts.cast(weights["down"], x_BLD.dtype, config.precision),
            sizes_E,
            activation=config.activation,
            precision=config.precision,
            key=random,
            implementation=config.implementation,
        )
        out_EBSD = out_ND.astype(jnp.float32).reshape(num_experts, batch, slots, width)
        out_BPD = out_EBSD.swapaxes(0, 1).reshape(batch, num_experts * slots, width)
        y_BLD = jnp.einsum("blp,bpd->bld", back_BLP, out_BPD).astype(x_BLD.dtype)
        return y_BLD, back_BLP, logit_BLP

    return forward


def _describe(
    config: moe.MoeConfig, inputs: routing.RouterInput, combine_BLP: jax.Array, logit_BLP: jax.Array
) -> routing.Routing:
    """Says for reports that each token uses every expert, by the weight of its slots."""
    num_experts, slots = config.router.num_experts, config.slots_per_expert
    tokens = inputs.mask_T.shape[0]
    weight_TE = jnp.sum(combine_BLP.reshape(tokens, num_experts, slots), axis=2)
    logit_TE = jax.nn.logsumexp(logit_BLP.reshape(tokens, num_experts, slots), axis=2)
    prob_TE = jax.nn.softmax(logit_TE, axis=-1)
    column_TE = jnp.broadcast_to(jnp.arange(num_experts, dtype=jnp.int32)[None], weight_TE.shape)
    scores = routing.Scores(logit_TE, prob_TE, logit_TE)
    return routing.from_token_choice(column_TE, weight_TE, scores, inputs, num_experts)


def _unit(a: jax.Array, axis: int) -> jax.Array:
    """Vectors over their length, finite for a vector of zeros."""
    return a * jax.lax.rsqrt(jnp.sum(jnp.square(a), axis=axis, keepdims=True) + 1e-12)
