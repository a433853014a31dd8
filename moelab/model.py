"""The transformer, and `from_config`, the door from configs to modules.

B sequences, L tokens each, T = B*L tokens, D model width, V vocabulary, E experts.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import pallas_kernels
from moelab import attention, balance, blocks, moe, parallel, routers
from moelab.quant import linear, precisions, recipes
from moelab.routing import RouterInput
from pallas_kernels.grouped_matmul.activation import ACTIVATIONS

PLAIN = recipes.named("none")


class Inputs(NamedTuple):
    """A batch of token ids and what is known of them.

    Attributes:
      token_BL: int32.
      mask_BL: bool, False for padding (routed nowhere).
      domain_B: int32 domain of each sequence; None: unknown.
      key: (2,) uint32 key data of the step, for routers with noise; None: zeros.
      row_B: int32 place of each sequence in the step's whole batch, for noise; None: these are the whole batch.
      replay_MTK: int32 columns to select in each MoE layer instead of the routers' own choice, T = B*L tokens with
        the routers' slots; None: the routers choose.
    """

    token_BL: jax.Array
    mask_BL: jax.Array
    domain_B: jax.Array | None = None
    key: jax.Array | None = None
    row_B: jax.Array | None = None
    replay_MTK: jax.Array | None = None


class Output(NamedTuple):
    """What the transformer returns.

    Attributes:
      hidden_BLD: final normalised vectors; multiply by `head` for logits.
      reports: per segment a dict block name -> moe.LayerReport stacked over the segment's repetitions.
    """

    hidden_BLD: jax.Array
    reports: tuple[dict[str, moe.LayerReport], ...]


class Transformer(nn.Module):
    """A decoder-only language model without its loss.

    Attributes:
      vocab_size: V.
      width: D.
      segments: the blocks, in order.
      tied_head: the head is the embedding.
      dtype: of the computation; parameters, norms, routers and softmaxes are float32.
      remat: recompute each unit of blocks in the backward pass.
      mesh: from parallel.make_mesh.
      embedding_format, head_precision: formats of the table, and of the head's weights and input; None: plain.
      scale_leak: why the scales of activations let outputs depend on later tokens; empty: they do not.
    """

    vocab_size: int
    width: int
    segments: tuple[blocks.Segment, ...]
    norm_epsilon: float
    tied_head: bool
    dtype: Any
    remat: bool
    mesh: jax.sharding.Mesh
    embedding_format: str | None = None
    head_precision: pallas_kernels.MatmulPrecision | None = None
    scale_leak: str = ""

    @nn.compact
    def __call__(
        self,
        inputs: Inputs,
        *,
        train: bool = False,
        trace: bool = False,
        cache_length: int = 0,
    ) -> Output:
        """Runs the blocks.

        Args:
          inputs: B a multiple of the number of devices.
          train: lets routers add noise.
          trace: returns every layer's Routing in its report.
          cache_length: 0, or the length of a key-value cache in the collection `cache` to continue from.
        """
        init = nn.initializers.normal(self.width**-0.5)
        embedding_VD = self.param("embedding", init, (self.vocab_size, self.width), jnp.float32)
        if not self.tied_head:
            self.param("head", init, (self.vocab_size, self.width), jnp.float32)
        table_VD = linear.rounded(embedding_VD, self.embedding_format)
        x_BLD = table_VD[inputs.token_BL].astype(self.dtype) * self.width**0.5
        router_input = _router_input(inputs)
        num_layers = sum(s.count * len(s.blocks) for s in self.segments)
        carry = blocks.Carry(x_BLD, self._no_logits(x_BLD), jnp.zeros((), jnp.int32))
        reports, first = [], 0
        for i, segment in enumerate(self.segments):
            unit = blocks.scan(segment, self.remat)(
                segment=segment,
                mesh=self.mesh,
                output_scale=(2 * num_layers) ** -0.5,
                train=train,
                trace=trace,
                cache_length=cache_length,
                name=f"segment_{i}",
            )
            replay = segment.replayed(inputs.replay_MTK, first)
            carry, report = unit(carry, router_input, replay)
            first += segment.count * len(segment.sparse)
            reports.append(report)
        hidden = blocks.RMSNorm(self.norm_epsilon, name="final_norm")(carry.x_BLD)
        if self.head_precision is not None:  # only the head reads it
            hidden = linear.rounded(hidden, self.head_precision.x, self.head_precision.x_rule)
        return Output(hidden, tuple(reports))

    def _no_logits(self, x_BLD: jax.Array) -> jax.Array | None:
        """Zeros for the logits before the first MoE layer, where a router reads them."""
        routers_ = [m.router for m in self._moe]
        if not any(router.uses_previous_logits for router in routers_):
            return None
        return jnp.zeros((x_BLD.shape[0] * x_BLD.shape[1], routers_[0].num_columns), jnp.float32)

    @property
    def _moe(self) -> list[moe.MoeConfig]:
        """The sparse blocks' settings, in order."""
        return [b.moe for s in self.segments for b in s.blocks if b.moe is not None]

    @property
    def kept_blocks(self) -> frozenset[tuple[str, str]]:
        """(segment, block) of the blocks that stay in high precision, as parameters name them."""
        return frozenset(
            (f"segment_{s}", f"block_{b}")
            for s, segment in enumerate(self.segments)
            for b, block in enumerate(segment.blocks)
            if block.high_precision
        )

    @property
    def leak(self) -> str:
        """Why outputs depend on later tokens; empty where they do not."""
        routed = next((m.leak for m in self._moe if m.leak), "")
        return routed or self.scale_leak

    @property
    def group(self) -> str:
        """Among which tokens the routing lets results depend on one another; see `moe.MoeConfig.group`."""
        return next((m.group for m in self._moe if m.group), "")


def head(model: Transformer, params: dict) -> jax.Array:
    """Returns the output head, (V, D) float32, rounded where the model's precision says so."""
    weight_VD = params["head"] if "head" in params else params["embedding"]
    precision = model.head_precision
    if precision is None:
        return weight_VD
    return linear.rounded_matrix(weight_VD, precision.w, precision.w_rule)


def logits(model: Transformer, params: dict, hidden_BLD: jax.Array) -> jax.Array:
    """Returns hidden @ head^T in float32: (B, L, V)."""
    weight = head(model, params).astype(hidden_BLD.dtype)
    return jnp.einsum("bld,vd->blv", hidden_BLD, weight, preferred_element_type=jnp.float32)


def _router_input(inputs: Inputs) -> RouterInput:
    batch, length = inputs.token_BL.shape
    sequence_B = jnp.arange(batch, dtype=jnp.int32)
    row_B = sequence_B if inputs.row_B is None else inputs.row_B
    domain_B = jnp.full_like(sequence_B, -1) if inputs.domain_B is None else inputs.domain_B
    position_BL = row_B[:, None] * length + jnp.arange(length, dtype=jnp.int32)[None]
    return RouterInput(
        token_id_T=inputs.token_BL.reshape(-1),
        sequence_T=jnp.repeat(sequence_B, length),
        position_T=position_BL.reshape(-1),
        mask_T=inputs.mask_BL.reshape(-1),
        domain_T=jnp.repeat(domain_B, length),
        key=jnp.zeros((2,), jnp.uint32) if inputs.key is None else inputs.key,
        train=None,
    )


def moe_layers(config) -> list[int]:
    """Returns the indices of the blocks that have experts."""
    if not config.moe.num_experts:
        return []
    first, every = config.moe.num_dense_layers, config.moe.every
    return [i for i in range(first, config.model.num_layers) if (i - first + 1) % every == 0]


def from_config(
    config,
    vocab_size: int,
    mesh: jax.sharding.Mesh | None = None,
    *,
    dtype: str | None = None,
    recipe: recipes.Recipe = PLAIN,
    token_counts: tuple[int, ...] = (),
) -> Transformer:
    """Builds the model of a config: the only place that knows both config and modules.

    Args:
      config: a full config (config.load).
      vocab_size: of the tokenizer.
      mesh: devices; None takes the first one.
      dtype: overrides config.model.dtype.
      recipe: which tensor role is computed in which format, but for the layers that config.quantization keeps in high
        precision. The recipe's own compute_dtype is the caller's to pass on.
      token_counts: how often each id occurs in the training data, for routers that go by it; empty: all alike.
    """
    counts = token_counts or (1,) * vocab_size
    m = config.model
    quantized = _block_kinds(config, recipe, counts, high_precision=False)
    kept = _block_kinds(config, PLAIN, counts, high_precision=True)
    sparse, high = moe_layers(config), high_precision_layers(config)
    layers = [(kept if i in high else quantized)[i in sparse] for i in range(m.num_layers)]
    head_precision = precisions.of_role(recipe, "head")
    return Transformer(
        vocab_size=vocab_size,
        width=m.width,
        segments=blocks.segments(layers),
        norm_epsilon=m.norm_epsilon,
        tied_head=m.tied_head,
        dtype=jnp.dtype(dtype or m.dtype),
        remat=m.remat,
        mesh=mesh or parallel.make_mesh(1),
        embedding_format=recipe.embedding.weight,
        head_precision=head_precision,
        scale_leak=recipe.leak,
    )


def _block_kinds(
    config, recipe: recipes.Recipe, counts: tuple[int, ...], high_precision: bool
) -> tuple[blocks.BlockConfig, blocks.BlockConfig | None]:
    """The dense block and the sparse one (None in a dense model) under a recipe."""
    m = config.model
    dense = blocks.BlockConfig(
        attention=attention.AttentionConfig(
            num_heads=m.num_heads,
            num_kv_heads=m.num_kv_heads,
            head_dim=m.head_dim,
            rope_base=m.rope_base,
            precision=precisions.of_role(recipe, "attention"),
            cache_format=recipe.kv_cache.activation,
            cache_rule=recipe.activation_rule if recipe.kv_cache.activation else None,
        ),
        dense_width=m.dense_width,
        moe=None,
        norm_epsilon=m.norm_epsilon,
        dense_precision=precisions.of_role(recipe, "dense_mlp"),
        high_precision=high_precision,
    )
    if not moe_layers(config):
        return dense, None
    return dense, dataclasses.replace(dense, moe=_moe_config(config, recipe, counts))


def training_recipe(config) -> recipes.Recipe:
    """Returns the recipe of config.quantization."""
    q = config.quantization
    return recipes.named(q.recipe, q.format, tuple(q.roles), q.activation_scale)


def high_precision_layers(config) -> set[int]:
    """Indices of the blocks that config.quantization keeps unquantized: the first and last ones."""
    q, count = config.quantization, config.model.num_layers
    return {*range(min(q.first_layers, count)), *range(max(count - q.last_layers, 0), count)}


def _mechanism(config, kind: str):
    mechanism = balance.make(kind, **config.balance[kind])
    return mechanism.uncut() if config.train.accumulation_steps == 1 else mechanism


def from_dataset(config, dataset, mesh: jax.sharding.Mesh | None = None, **options) -> Transformer:
    """Builds the model of a config for a data.Dataset: its vocabulary, its token counts where a router wants them."""
    if _wants_counts(config.router.kind) and config.moe.num_experts:
        options["token_counts"] = dataset.token_counts
    return from_config(config, dataset.tokenizer.vocab_size, mesh, **options)


def _wants_counts(kind: str) -> bool:
    return "token_counts" in routers.module(kind).Router.__dataclass_fields__


def _moe_config(config, recipe: recipes.Recipe, token_counts: tuple[int, ...]) -> moe.MoeConfig:
    fields = config.router.to_dict()
    kind = fields.pop("kind")
    if _wants_counts(kind):
        fields["token_counts"] = token_counts
    router = routers.make(kind, num_experts=config.moe.num_experts, **fields)
    mechanisms = ((kind, _mechanism(config, kind)) for kind in balance.KINDS)
    implementation = config.moe.implementation
    return moe.MoeConfig(
        router=router,
        mechanisms=tuple((kind, m) for kind, m in mechanisms if m.strength),
        expert_width=config.moe.expert_width,
        shared_width=config.moe.num_shared_experts * config.moe.expert_width,
        capacity_factor=config.moe.capacity_factor,
        slots_per_expert=config.moe.slots_per_expert,
        activation=ACTIVATIONS[config.moe.activation],
        precision=precisions.experts(recipe),
        shared_precision=precisions.of_role(recipe, "shared_experts"),
        router_precision=precisions.of_role(recipe, "router"),
        implementation=None if implementation == "auto" else implementation,
        parallel=config.moe.parallel,
        receive_factor=config.moe.receive_factor,
    )


def init(model: Transformer, key: jax.Array) -> dict:
    """Draws parameters and zero states: {"params", "router_state"}; the same on any number of devices."""
    batch = model.mesh.size
    inputs = Inputs(
        token_BL=jnp.zeros((batch, 2), jnp.int32),
        mask_BL=jnp.ones((batch, 2), bool),
    )
    variables = jax.jit(model.init)(key, inputs)  # one program, not one per operation
    return {
        "params": variables["params"],
        "router_state": variables["router_state"] if "router_state" in variables else {},
    }
