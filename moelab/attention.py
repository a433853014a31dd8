"""Causal grouped-query attention with rotary positions and a key-value cache.

B sequences, L tokens, M cache length, D model width, Q query heads, G key-value heads, H width of a head.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

import pallas_kernels
from moelab.quant import linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Attention of one block; see schema.Model for the fields.

    Attributes:
      precision: formats of the projections; None computes in the dtype of x.
      cache_format, cache_rule: of keys and values, each token and head with its own global scale; None: as computed.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_base: float
    precision: pallas_kernels.MatmulPrecision | None = None
    cache_format: str | None = None
    cache_rule: str | None = None


def rotate(x_BLQH: jax.Array, position_L: jax.Array, base: float) -> jax.Array:
    """Rotates pairs (i, i + H/2) of each head by position * base^(-2i/H) (RoPE, arXiv:2104.09864).

    Args:
      x_BLQH: (B, L, heads, H), H even.
      position_L: (L,) int32.
      base: of the frequencies.

    Returns:
      The shape and dtype of x; angles are float32.
    """
    half = x_BLQH.shape[-1] // 2
    frequency_H = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_LH = position_L.astype(jnp.float32)[:, None] * frequency_H[None, :]
    cos, sin = jnp.cos(angle_LH)[None, :, None, :], jnp.sin(angle_LH)[None, :, None, :]
    first, second = jnp.split(x_BLQH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BLQH.dtype)


def attend(
    query_BLQH: jax.Array, key_BMGH: jax.Array, value_BMGH: jax.Array, first: jax.Array | int
) -> jax.Array:
    """Softmax attention in float32 of queries at positions first..first+L-1 to keys at 0..M-1.

    Returns:
      (B, L, Q, H) in the dtype of the query.
    """
    batch, length, num_heads, head_dim = query_BLQH.shape
    groups = key_BMGH.shape[2]
    query = query_BLQH.reshape(batch, length, groups, num_heads // groups, head_dim)
    scaled = query * jnp.asarray(head_dim**-0.5, query.dtype)
    score = jnp.einsum("blgqh,bmgh->bgqlm", scaled, key_BMGH, preferred_element_type=jnp.float32)
    visible_LM = jnp.arange(key_BMGH.shape[1])[None, :] <= first + jnp.arange(length)[:, None]
    score = jnp.where(visible_LM[None, None, None], score, -1e30)
    prob = jax.nn.softmax(score, axis=-1).astype(value_BMGH.dtype)
    mixed = jnp.einsum("bgqlm,bmgh->blgqh", prob, value_BMGH)
    return mixed.reshape(batch, length, num_heads, head_dim)


class Attention(nn.Module):
    """Projects, rotates, attends; weights are [out, in]. With a cache length, continues from the cache."""

    config: AttentionConfig
    output_scale: float = 1.0

    @nn.compact
    def __call__(
        self, x_BLD: jax.Array, cache_length: int = 0, key_data: jax.Array | None = None
    ) -> jax.Array:
        """Attends; key_data is for stochastic rounding of gradients."""
        c, (batch, length, width) = self.config, x_BLD.shape
        random = iter(
            (None,) * 4 if key_data is None else [linear.fold(key_data, i) for i in range(4)]
        )
        query = self._project("query", x_BLD, c.num_heads, next(random))
        key = self._project("key", x_BLD, c.num_kv_heads, next(random))
        value = self._project("value", x_BLD, c.num_kv_heads, next(random))
        first = 0
        if cache_length:
            used = self.variable("cache", "used", lambda: jnp.zeros((), jnp.int32))
            first = used.value
        position_L = first + jnp.arange(length, dtype=jnp.int32)
        query = rotate(query, position_L, c.rope_base)
        key = rotate(key, position_L, c.rope_base)
        key, value = (linear.rounded(a, c.cache_format, c.cache_rule) for a in (key, value))
        if cache_length:
            key = self._extend("key", key, first, cache_length)
            value = self._extend("value", value, first, cache_length)
            used.value = first + length
        mixed = attend(query, key, value, first).reshape(batch, length, -1)
        init = nn.initializers.normal(mixed.shape[-1] ** -0.5 * self.output_scale)
        output = self.param("output", init, (width, mixed.shape[-1]), jnp.float32)
        return linear.product(mixed, output, c.precision, next(random))

    def _project(self, name: str, x_BLD: jax.Array, num_heads: int, random) -> jax.Array:
        width, out = x_BLD.shape[-1], num_heads * self.config.head_dim
        init = nn.initializers.normal(width**-0.5)
        weight = self.param(name, init, (out, width), jnp.float32)
        y = linear.product(x_BLD, weight, self.config.precision, random)
        return y.reshape(*x_BLD.shape[:2], num_heads, self.config.head_dim)

    def _extend(self, name: str, new: jax.Array, first: jax.Array, cache_length: int) -> jax.Array:
        """Writes the new keys or values behind those in the cache and returns the whole cache."""
        shape = (new.shape[0], cache_length, *new.shape[2:])
        cache = self.variable("cache", name, lambda: jnp.zeros(shape, new.dtype))
        cache.value = jax.lax.dynamic_update_slice_in_dim(cache.value, new, first, axis=1)
        return cache.value
