"""The transformer: segments of blocks under one scan each, and `from_config`, the door from configs to modules.

B sequences, L tokens each, T = B*L tokens, D model width, V vocabulary, E experts.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import pallas_kernels
from moelab import attention, balance, experts, moe, parallel, routers, soft_moe
from moelab.quant import linear, precisions, recipes
from moelab.routing import RouterInput
from pallas_kernels import device

PLAIN = recipes.named("none")


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


class _Carry(NamedTuple):
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
    def __call__(self, carry: _Carry, inputs: RouterInput, replay: dict[str, jax.Array]):
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
            carry = _Carry(x_BLD, logit_TC, carry.layer + 1)
        return carry, reports


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
    segments: tuple[Segment, ...]
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
        carry = _Carry(x_BLD, self._no_logits(x_BLD), jnp.zeros((), jnp.int32))
        reports, first = [], 0
        for i, segment in enumerate(self.segments):
            unit = _scan(segment, self.remat)(
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
        hidden = RMSNorm(self.norm_epsilon, name="final_norm")(carry.x_BLD)
        if self.head_precision is not None:  # only the head reads it
            hidden = linear.rounded(hidden, self.head_precision.x, self.head_precision.x_rule)
        return Output(hidden, tuple(reports))

    def _no_logits(self, x_BLD: jax.Array) -> jax.Array | None:
        """Zeros for the logits before the first MoE layer, where a router reads them."""
        routers_ = [b.moe.router for s in self.segments for b in s.blocks if b.moe is not None]
        if not any(router.uses_previous_logits for router in routers_):
            return None
        return jnp.zeros((x_BLD.shape[0] * x_BLD.shape[1], routers_[0].num_columns), jnp.float32)

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
        blocks = (block for segment in self.segments for block in segment.blocks)
        routed = next((b.moe.leak for b in blocks if b.moe is not None and b.moe.leak), "")
        return routed or self.scale_leak

    @property
    def group(self) -> str:
        """Among which tokens the routing lets results depend on one another; see `moe.MoeConfig.group`."""
        blocks = (block for segment in self.segments for block in segment.blocks)
        return next((b.moe.group for b in blocks if b.moe is not None and b.moe.group), "")


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


def _scan(segment: Segment, remat: bool):
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
    blocks = [(kept if i in high else quantized)[i in sparse] for i in range(m.num_layers)]
    head_precision = precisions.of_role(recipe, "head")
    return Transformer(
        vocab_size=vocab_size,
        width=m.width,
        segments=segments(blocks),
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
) -> tuple[BlockConfig, BlockConfig | None]:
    """The dense block and the sparse one (None in a dense model) under a recipe."""
    m = config.model
    dense = BlockConfig(
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


def _active_share(config) -> float:
    """Expert parameters that a token's computation costs over all of them; with a router, by its nominal k."""
    if config.moe.slots_per_expert:
        return config.moe.slots_per_expert / config.train.length
    return config.router.k / config.moe.num_experts


def summary(config, vocab_size: int) -> dict:
    """Counts parameters, bytes and FLOPs of a config without touching a device.

    FLOPs per token count two per multiply-add of every matmul on the token's path and full (not causal) attention over
    `train.length` keys; training is three times the forward pass.

    Returns:
      parameters total/active/expert, bytes of parameters and optimizer state, flops_per_token forward/train.
    """
    from moelab import optimizer

    shown = config.copy_and_resolve_references()
    shown.moe.implementation = "auto"
    model = from_config(shown, vocab_size, parallel.abstract_mesh())
    with device.assume(
        device.CPU
    ):  # shapes are the same everywhere; to ask which GPU is here would start it
        shapes = jax.eval_shape(lambda: init(model, jax.random.key(0)))["params"]
    state = jax.eval_shape(optimizer.make(config, shapes).init, shapes)
    total, expert = 0, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        total += leaf.size
        expert += leaf.size if "['experts']" in jax.tree_util.keystr(path) else 0
    m, layers = config.model, len(moe_layers(config))
    share = _active_share(config) if layers else 0.0
    active = total - expert + round(expert * min(1.0, share))
    computed = total - expert + round(expert * share)
    embedding = 0 if m.tied_head else vocab_size * m.width  # a look-up, not a matmul
    attention_flops = 4 * config.train.length * m.num_heads * m.head_dim * m.num_layers
    forward = 2 * (computed - embedding) + attention_flops
    nbytes = lambda tree: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))  # noqa: E731
    return {
        "parameters": {"total": total, "active": active, "expert": expert},
        "bytes": {"parameters": nbytes(shapes), "optimizer": nbytes(state)},
        "flops_per_token": {"forward": forward, "train": 3 * forward},
    }
