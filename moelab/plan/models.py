"""Shapes of models and what follows from them: parameters, weight bytes, key-value bytes, FLOPs.

d model width, H query heads, L layers, E experts, k experts a token passes, F expert width.
A multiply-add is two FLOPs. Bytes are what the recipe stores, block scales included.
"""

from __future__ import annotations

import dataclasses

from moelab.plan.figures import Source
from moelab.plan.recipes import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """The attention of a model.

    Attributes:
      heads, kv_heads, head_dim: grouped-query attention.
      kv_lora, q_lora, nope, rope, v_dim: multi-head latent attention where kv_lora > 0 (arXiv:2405.04434); q_lora 0:
        queries are not compressed.
      window, windowed: keys seen in the `windowed` layers that have a sliding window.
      linear: layers with a gated delta net (arXiv:2412.06464) instead, of linear_key_heads and linear_value_heads
        heads of linear_dim and a convolution over linear_conv tokens.
      top_keys, index_heads, index_dim: keys that a sparse attention keeps (DeepSeek-V3.2), and the indexer that picks.
      bias, sinks, gate: biases of the projections; a learned logit per head; a gate on the output.
      qk_norm: "", "head" (one scale per head_dim) or "layer" (over all heads).
    """

    heads: int
    kv_heads: int
    head_dim: int
    kv_lora: int = 0
    q_lora: int = 0
    nope: int = 0
    rope: int = 0
    v_dim: int = 0
    window: int = 0
    windowed: int = 0
    linear: int = 0
    linear_key_heads: int = 0
    linear_value_heads: int = 0
    linear_dim: int = 0
    linear_conv: int = 4
    top_keys: int = 0
    index_heads: int = 0
    index_dim: int = 0
    bias: bool = False
    sinks: bool = False
    gate: bool = False
    qk_norm: str = ""

    def matrices(self, d: int) -> int:
        """Counts the weights of one layer's projections."""
        if self.kv_lora:
            width = self.heads * (self.nope + self.rope)
            queries = d * self.q_lora + self.q_lora * width if self.q_lora else d * width
            keys = d * (self.kv_lora + self.rope)
            expanded = self.kv_lora * self.heads * (self.nope + self.v_dim)
            indexer = (self.q_lora or d) * self.index_heads * self.index_dim
            indexer += d * (self.index_dim + self.index_heads) if self.top_keys else 0
            return queries + keys + expanded + self.heads * self.v_dim * d + indexer
        queries = d * self.heads * self.head_dim
        return queries * (3 if self.gate else 2) + 2 * d * self.kv_heads * self.head_dim

    def vectors(self, d: int) -> int:
        """Counts norms, biases and sinks of one layer."""
        if self.kv_lora:
            return self.q_lora + self.kv_lora + (2 * self.index_dim if self.top_keys else 0)
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        count = width + 2 * kv_width + d if self.bias else 0
        count += self.heads if self.sinks else 0
        return count + {"": 0, "head": 2 * self.head_dim, "layer": width + kv_width}[self.qk_norm]

    def linear_matrices(self, d: int) -> int:
        """Counts the weights of one gated delta net's projections."""
        keys, values = self._linear_widths()
        return d * (2 * keys + 2 * values + 2 * self.linear_value_heads) + values * d

    def linear_vectors(self) -> int:
        """Counts its convolution, decays and norm."""
        keys, values = self._linear_widths()
        return (
            self.linear_conv * (2 * keys + values) + 2 * self.linear_value_heads + self.linear_dim
        )

    def _linear_widths(self) -> tuple[int, int]:
        return (
            self.linear_key_heads * self.linear_dim,
            self.linear_value_heads * self.linear_dim,
        )

    def kv_elements(self) -> int:
        """Counts what one layer keeps of one token."""
        if self.kv_lora:
            return self.kv_lora + self.rope + (self.index_dim if self.top_keys else 0)
        return 2 * self.kv_heads * self.head_dim

    def core_flops(self, absorbed: bool) -> int:
        """Counts FLOPs of one token against one key, all heads: scores and values.

        Args:
          absorbed: latent attention works on the compressed keys, as decoding does.
        """
        if not self.kv_lora:
            return 4 * self.heads * self.head_dim
        if absorbed:
            return 2 * self.heads * (2 * self.kv_lora + self.rope)
        return 2 * self.heads * (self.nope + self.rope + self.v_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The shape of a decoder.

    Attributes:
      name: "deepseek_v3".
      layers, dense_layers: all, and those at the beginning without experts.
      width, vocab: d and the vocabulary.
      dense_width: hidden width of the layers without experts.
      experts, k, expert_width: routed experts of a layer, those of a token, their hidden width; 0 experts: dense.
      shared_width: hidden width of all shared experts of a layer together.
      shared_gate: a gate on the shared expert.
      groups, group_limit: experts are in groups, of which a token uses so many; 1, 1: no groups.
      matrices: of an expert, 3 with a gate and 2 without.
      bias: biases of router and experts; router_bias of the router alone.
      tied: the head is the embedding.
      mtp: layers of multi-token prediction, in no count.
      source: of the shape.
      published_total, published: parameters that its makers state, and where.
    """

    name: str
    layers: int
    width: int
    vocab: int
    attention: Attention
    dense_layers: int = 0
    dense_width: int = 0
    experts: int = 0
    k: int = 0
    expert_width: int = 0
    shared_width: int = 0
    shared_gate: bool = False
    groups: int = 1
    group_limit: int = 1
    matrices: int = 3
    bias: bool = False
    router_bias: bool = False
    tied: bool = False
    mtp: int = 0
    source: Source
    published_total: int = 0
    published: Source | None = None

    @property
    def sparse_layers(self) -> int:
        """Layers with experts."""
        return self.layers - self.dense_layers if self.experts else 0

    @property
    def full_layers(self) -> int:
        """Layers whose attention sees every key."""
        return self.layers - self.attention.windowed - self.attention.linear

    def expert_matrices(self) -> int:
        """Counts the weights of one expert."""
        return self.matrices * self.width * self.expert_width

    def parameters(self) -> dict[str, int]:
        """Counts parameters by role: experts, dense (shared experts too), attention, embedding, head, router, rest."""
        d, attention, sparse = self.width, self.attention, self.sparse_layers
        softmax = self.layers - attention.linear
        expert_bias = (self.matrices - 1) * self.expert_width + d if self.bias else 0
        attend = softmax * attention.matrices(d) + attention.linear * (
            attention.linear_matrices(d) if attention.linear else 0
        )
        vectors = softmax * attention.vectors(d) + attention.linear * (
            attention.linear_vectors() if attention.linear else 0
        )
        dense = (self.layers - sparse) * self.matrices * d * self.dense_width
        router = d * self.experts + (self.experts if self.bias or self.router_bias else 0)
        return {
            "experts": sparse * self.experts * (self.expert_matrices() + expert_bias),
            "dense": dense + sparse * self.matrices * d * self.shared_width,
            "attention": attend,
            "embedding": self.vocab * d,
            "head": 0 if self.tied else self.vocab * d,
            "router": sparse * (router + (d if self.shared_gate else 0)),
            "rest": vectors + (2 * self.layers + 1) * d,
        }

    def total(self) -> int:
        """Counts all parameters, without multi-token prediction."""
        return sum(self.parameters().values())

    def active(self) -> int:
        """Counts the parameters that one token uses, embedding and head among them."""
        counts = self.parameters()
        share = self.k / self.experts if self.experts else 0
        return self.total() - counts["experts"] + round(counts["experts"] * share)

    def weight_bytes(self, recipe: Recipe) -> float:
        """Adds up the bytes of all weights."""
        return sum(n * recipe.bits[role] / 8 for role, n in self.parameters().items())

    def kv_bytes(self, recipe: Recipe, length: float) -> float:
        """Adds up what one sequence of `length` tokens keeps, with windows and recurrent states."""
        a, size = self.attention, recipe.kv_bits / 8
        kept = self.full_layers * length + a.windowed * min(length, a.window or length)
        state = a.linear * a.linear_value_heads * a.linear_dim**2 * 4  # float32
        return kept * a.kv_elements() * size + state

    def kv_bytes_per_token(self, recipe: Recipe) -> float:
        """Adds up what one more token costs while it is within all windows."""
        a = self.attention
        return (self.layers - a.linear) * a.kv_elements() * recipe.kv_bits / 8

    def keys(self, length: float) -> float:
        """Adds the keys that a token sees up over the layers."""
        a = self.attention
        full = min(length, a.top_keys) if a.top_keys else length
        return self.full_layers * full + a.windowed * min(length, a.window or length)

    def matmul_flops(self) -> int:
        """Counts FLOPs of one token in weights: all its matrices but the embedding, which is looked up."""
        counts, d = self.parameters(), self.width
        routed = self.sparse_layers * (self.k * self.expert_matrices() + d * self.experts)
        return 2 * (counts["dense"] + counts["attention"] + self.vocab * d + routed)

    def core_flops(self, length: float, absorbed: bool = False) -> float:
        """Counts FLOPs of one token against `length` keys in all layers, the recurrent states among them."""
        a = self.attention
        recurrent = a.linear * 8 * a.linear_value_heads * a.linear_dim**2
        return self.keys(length) * a.core_flops(absorbed) + recurrent

    def forward_flops(self, length: float, absorbed: bool = False) -> float:
        """Counts FLOPs of one token that sees `length` keys."""
        return self.matmul_flops() + self.core_flops(length, absorbed)

    def training_flops(self, length: int, core: str = "causal") -> float:
        """Counts FLOPs of one token in training: three times the forward pass.

        Args:
          length: tokens of a sequence.
          core: "causal": a token sees half of the keys, as Megatron counts; "full": all; "none": the weights alone.
        """
        if core == "none":
            return 3.0 * self.matmul_flops()
        a = self.attention
        if core == "full":
            return 3.0 * self.forward_flops(length)
        window = min(a.window or length, length)
        in_window = window - window * (window - 1) / (2 * length)
        keys = self.full_layers * length / 2 + a.windowed * in_window
        recurrent = a.linear * 8 * a.linear_value_heads * a.linear_dim**2
        return 3.0 * (self.matmul_flops() + keys * a.core_flops(False) + recurrent)
