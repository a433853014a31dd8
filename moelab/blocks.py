"""The blocks of the transformer, and the segments of equal blocks that run as one scan each.

B sequences, L tokens each, T = B*L tokens, D model width, C columns of a router, M MoE layers.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import pallas_kernels
from moelab import attention, experts, moe, soft_moe
from moelab.quant import linear
from moelab.routing import RouterInput


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One transformer block: attention, then a dense or a sparse feed-forward."""

    attention: attention.AttentionConfig
    dense_width: int
    moe: moe.MoeConfig | None
    norm_epsilon: float
    dense_precision: pallas_kernels.MatmulPrecision | None = None
    high_precision: bool = False  # stays unquantized whatever the recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """`count` repetitions of the same blocks, run as one scan over stacked parameters."""

    count: int
    blocks: tuple[BlockConfig, ...]

    @property
    def sparse(self) -> tuple[str, ...]:
        """Names of the blocks with experts."""
        return tuple(f"block_{i}" for i, b in enumerate(self.blocks) if b.moe is not None)

    def replayed(self, replay_MTK: jax.Array | None, first: int) -> dict[str, jax.Array]:
        """Cuts the replayed choices of this segment's MoE layers out: (count, T, C) by block."""
        if replay_MTK is None:
            return {}
        names = self.sparse
        mine = replay_MTK[first : first + self.count * len(names)]
        return {name: mine[i :: len(names)] for i, name in enumerate(names)}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale, computed in float32 (arXiv:1910.07467)."""

    epsilon: float

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        scale_D = self.param("scale", nn.initializers.ones, (x_BLD.shape[-1],), jnp.float32)
        x = x_BLD.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * inverse * scale_D[None, None, :]).astype(x_BLD.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then + feed-forward(norm(.))."""

    config: BlockConfig
    mesh: jax.sharding.Mesh
    output_scale: float

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, inputs: RouterInput, trace: bool, cache_length: int
    ) -> tuple[jax.Array, moe.LayerReport | None, jax.Array | None]:
        config, scale = self.config, self.output_scale
        # Gradients are rounded with other noise in every micro-batch.
        random = linear.fold(inputs.key, inputs.position_T[0])
        normed = RMSNorm(config.norm_epsilon, name="attention_norm")(x_BLD)
        attend = attention.Attention(config.attention, scale, name="attention")
        x_BLD = x_BLD + attend(normed, cache_length, linear.fold(random, 2))
        normed = RMSNorm(config.norm_epsilon, name="feed_forward_norm")(x_BLD)
        if config.moe is not None:
            block = soft_moe.SoftMoeBlock if config.moe.slots_per_expert else moe.MoeBlock
            sparse = block(config.moe, self.mesh, scale, name="moe")
            y_BLD, report, logit_TC = sparse(normed, inputs, trace)
            return x_BLD + y_BLD, report, logit_TC
        width = x_BLD.shape[-1]
        weights = self.param(
            "dense", lambda k: experts.init_swiglu(k, (), width, config.dense_width, scale)
        )
        x_TD = normed.reshape(-1, width)
        y_TD = experts.swiglu(x_TD, weights, config.dense_precision, linear.fold(random, 3))
        return x_BLD + y_TD.reshape(x_BLD.shape), None, None


class Carry(NamedTuple):
    """What goes from block to block.

    Attributes:
      x_BLD: the residual stream.
      logit_TC: logits of the last MoE layer, zeros before the first; None where no router reads them.
      layer: () int32 blocks done, part of the key of a router's noise.
    """

    x_BLD: jax.Array
    logit_TC: jax.Array | None
    layer: jax.Array


class _Unit(nn.Module):
    """The blocks of a segment once: the body of its scan."""

    segment: Segment
    mesh: jax.sharding.Mesh
    output_scale: float
    train: bool
    trace: bool
    cache_length: int

    @nn.compact
    def __call__(self, carry: Carry, inputs: RouterInput, replay: dict[str, jax.Array]):
        reports, key = {}, jax.random.wrap_key_data(inputs.key, impl="threefry2x32")
        for i, config in enumerate(self.segment.blocks):
            name = f"block_{i}"
            inputs = inputs._replace(
                train=self.train,
                key=jax.random.key_data(jax.random.fold_in(key, carry.layer)),
                previous_logit_TC=carry.logit_TC,
                replay_TK=replay.get(name),
            )
            block = Block(config, self.mesh, self.output_scale, name=name)
            x_BLD, report, logit_TC = block(carry.x_BLD, inputs, self.trace, self.cache_length)
            if report is not None:
                reports[name] = report
            if carry.logit_TC is None or logit_TC is None:
                logit_TC = carry.logit_TC
            carry = Carry(x_BLD, logit_TC, carry.layer + 1)
        return carry, reports


def scan(segment: Segment, remat: bool):
    """Returns the module class that runs a segment, its unit recomputed in the backward pass under `remat`."""
    unit = nn.remat(_Unit, prevent_cse=False) if remat else _Unit
    return nn.scan(
        unit,
        variable_axes={
            "params": 0,
            "router_state": 0,
            "quantized": 0,
            "cache": 0,
            "calibration": 0,
        },
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        length=segment.count,
    )


def segments(blocks: list[BlockConfig]) -> tuple[Segment, ...]:
    """Groups equal neighbours, and pairs or longer patterns that repeat, into segments.

    >>> [(s.count, s.blocks) for s in segments(["d", "m", "m"])]
    [(1, ('d',)), (2, ('m',))]
    >>> [(s.count, s.blocks) for s in segments(["d", "m", "d", "m"])]
    [(2, ('d', 'm'))]
    """
    found, i = [], 0
    while i < len(blocks):
        size, count = _repetition(blocks, i)
        next_size, next_count = _repetition(blocks, i + 1)
        if next_size * next_count > size * count:
            size = count = 1  # a longer pattern starts one block later
        found.append(Segment(count=count, blocks=tuple(blocks[i : i + size])))
        i += size * count
    return tuple(found)


def _repetition(blocks: list[BlockConfig], start: int) -> tuple[int, int]:
    """Returns (length, repetitions) of the pattern at `start` that covers most blocks, the shortest such one."""
    best = (1, 1)
    for size in range(1, (len(blocks) - start) // 2 + 1):
        count, pattern = 1, blocks[start : start + size]
        while pattern == blocks[start + count * size : start + (count + 1) * size]:
            count += 1
        if count > 1 and size * count > best[0] * best[1]:
            best = (size, count)
    return best
