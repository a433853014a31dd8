"""What one GPU computes, reads and sends in a step of a model under a layout: the terms of the roofline.

A replica is tp x dp GPUs: attention is split over tp and repeated dp times (attention data parallelism), experts are
split over ep ranks, each over moe_tp = tp x dp / ep GPUs. All may be arrays: one row per configuration.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from moelab.plan import coverage
from moelab.plan.hardware import Gpu
from moelab.plan.models import Model
from moelab.plan.recipes import Recipe
from moelab.plan.roofline import MEMORY, OPERATIONS, PRECISIONS, Terms

ACTIVATION = 2  # bytes of an activation on a link
_CLASS = {"bf16": 0, "fp8": 1, "nvfp4": 2, "mxfp4": 2, "int4": 2}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a replica is split; integers or arrays of them.

    Attributes:
      tp: GPUs that share one attention.
      dp: copies of the attention.
      ep: ranks that share the experts, a divisor of tp * dp.
      pp: stages of layers.
    """

    tp: np.ndarray | int
    dp: np.ndarray | int = 1
    ep: np.ndarray | int = 1
    pp: np.ndarray | int = 1

    @property
    def gpus(self):
        """GPUs of the replica."""
        return np.asarray(self.tp) * self.dp * self.pp

    @property
    def moe_tp(self):
        """GPUs that share one expert."""
        return np.asarray(self.tp) * self.dp / self.ep


def weight_bytes(model: Model, recipe: Recipe, layout: Layout) -> np.ndarray:
    """Returns bytes of weights on one GPU."""
    counts, bits = model.parameters(), recipe.bits
    size = {role: counts[role] * bits[role] / 8 for role in counts}
    group = np.asarray(layout.tp) * layout.dp
    shared = size["dense"] + size["attention"] + size["embedding"] + size["head"]
    return (
        size["experts"] / group + shared / layout.tp + size["router"] + size["rest"]
    ) / layout.pp


def kv_share(model: Model, tp) -> np.ndarray:
    """Returns the share of a sequence's keys and values on one of tp GPUs: heads are split, a latent is repeated."""
    tp = np.asarray(tp, float)
    return (
        np.ones_like(tp)
        if model.attention.kv_lora
        else 1 / np.minimum(tp, model.attention.kv_heads)
    )


def kv_bytes(model: Model, recipe: Recipe, layout: Layout, length) -> np.ndarray:
    """Returns bytes on one GPU that one more sequence of `length` tokens in a batch costs.

    A stage of pp keeps 1/pp of the layers, for the pp batches that are on their way at a time.
    """
    lengths = np.atleast_1d(np.asarray(length, float))
    found = np.array([model.kv_bytes(recipe, x) for x in lengths])
    return found * kv_share(model, layout.tp)


def terms(
    model: Model,
    recipe: Recipe,
    gpu: Gpu,
    layout: Layout,
    tokens,
    keys,
    *,
    sequences=None,
    p_E: np.ndarray | None = None,
    by_load: bool = False,
    decoding: bool = True,
) -> Terms:
    """Counts one step.

    Args:
      tokens: of one attention copy (data-parallel rank).
      keys: average number of keys that a token sees.
      sequences: whose keys are read, per attention copy; None: one per token.
      p_E: how likely the experts are; None: equally.
      by_load: experts are placed, and copied, so that ranks have equal loads but for chance.
      decoding: latent attention stays compressed, and keys are read once per sequence.

    Returns:
      Terms with n rows, the broadcast of layout, tokens and keys.

    Raises:
      HardwareError: the GPU lacks a precision of the recipe.
    """
    tp, dp, ep, pp, tokens, keys, sequences = (
        np.atleast_1d(x).astype(float)
        for x in np.broadcast_arrays(
            layout.tp,
            layout.dp,
            layout.ep,
            layout.pp,
            tokens,
            keys,
            tokens if sequences is None else sequences,
        )
    )
    counts, bits, d = model.parameters(), recipe.bits, model.width
    core_flops = np.array([model.core_flops(x, absorbed=decoding) for x in keys])
    read = np.array([model.kv_bytes(recipe, x) for x in keys])
    per_gpu = tokens / tp
    flops = np.stack(
        [
            2 * counts["attention"] * per_gpu,
            core_flops * per_gpu,
            2 * counts["dense"] * per_gpu,
            np.zeros_like(tp),
            2 * model.vocab * d * (per_gpu if decoding else sequences / tp),
        ]
    )
    moved = np.stack(
        [
            counts["attention"] * bits["attention"] / 8 / tp,
            read * sequences * kv_share(model, tp),
            counts["dense"] * bits["dense"] / 8 / tp,
            np.zeros_like(tp),
            model.vocab * d * bits["head"] / 8 / tp,
        ]
    )
    if model.experts:
        p_E = coverage.uniform(model.experts, model.k) if p_E is None else p_E
        hit, load = coverage.per_rank(p_E, tokens * dp, ep, by_load)
        moe_tp = tp * dp / ep
        flops[3] = 2 * model.sparse_layers * load * model.expert_matrices() / moe_tp
        weight = model.expert_matrices() * bits["experts"] / 8
        moved[3] = model.sparse_layers * hit * weight / moe_tp
    roles = OPERATIONS
    precision = [recipe.core if r == "core" else recipe.compute[r] for r in roles]
    peaks = np.array([gpu.peak(p) for p in precision])[:, None]
    classes = [MEMORY.index("keys") if r == "core" else _CLASS[recipe.formats[r]] for r in roles]
    shape = flops.shape
    link, collectives = traffic(model, recipe, gpu, (tp, dp, ep, pp), tokens, decoding)
    return Terms(
        compute_On=flops / peaks,
        memory_On=moved / gpu.bandwidth.value,
        precision_On=np.broadcast_to(
            np.array([PRECISIONS.index(p) for p in precision])[:, None], shape
        ),
        memory_class_On=np.broadcast_to(np.array(classes)[:, None], shape),
        link_Ln=link,
        collectives_n=collectives,
        layers_n=np.full(shape[1], float(model.layers)),
        steps_n=np.ones(shape[1]),
    )


def traffic(model: Model, recipe: Recipe, gpu: Gpu, sizes, tokens, decoding: bool):
    """Counts what one GPU sends in a step and in how many collectives.

    Within one attention copy (tp > 1): two all-reduces a layer. With several (dp > 1): one all-reduce for the attention
    where tp > 1, and an exchange with the experts' ranks.

    Args:
      sizes: (tp, dp, ep, pp), each (n,).

    Returns:
      (seconds at full speed by link (2, n), collectives (n,)).
    """
    tp, dp, ep, pp = sizes
    sparse, dense = model.sparse_layers, model.layers - model.sparse_layers
    row = model.width * ACTIVATION
    reduce = 2 * (1 - 1 / tp) * tokens * row  # a ring's share of one all-reduce
    together = dp == 1
    reduces = model.layers + dense + np.where(together, sparse, 0)
    inside = outside = np.zeros_like(tp)
    if model.experts:
        inside, outside = exchange(model, recipe, gpu, tp * dp, ep, tokens / tp, decoding)
        inside, outside = (np.where(together, 0.0, x * sparse) for x in (inside, outside))
    wide = tp > gpu.domain.value  # an all-reduce over several nodes is bound by the card
    inside = inside + np.where(wide, 0.0, reduces * reduce)
    outside = outside + np.where(wide, reduces * reduce, 0.0) + (pp - 1) * tokens / tp * row
    count = (tp > 1) * reduces + np.where(together, 0, 2 * sparse)
    return np.stack([inside / gpu.nvlink.value, outside / gpu.nic.value]), count.astype(float)


def exchange(model: Model, recipe: Recipe, gpu: Gpu, group, ep, tokens, decoding: bool):
    """Counts the bytes of a layer's dispatch and combine that one GPU sends: (inside, beyond its scale-up domain).

    A token goes once to each rank that has one of its experts, and to every GPU of that rank. Beyond the domain, by the
    network card: prompts go once to each node and are passed on inside it (node-limited routing caps their number);
    decoding sends one copy per GPU, as low-latency kernels do.

    Args:
      group: GPUs that share the experts.
      tokens: of this GPU.
    """
    fp8 = recipe.compute["experts"] != "bf16"
    size = model.width * ((1 if fp8 else ACTIVATION) + ACTIVATION)  # dispatch, then combine
    ranks = np.where(ep > 1, ep * (1 - (1 - 1 / np.maximum(ep, 1)) ** model.k), 1.0)
    ranks = ranks * group / np.maximum(ep, 1)
    copies = tokens * ranks * (1 - 1 / group)
    nodes = np.maximum(np.ceil(group / gpu.domain.value), 1.0)
    limit = model.group_limit if model.groups > 1 else np.inf
    per_node = coverage.nodes_of_token(model.k, nodes, limit)
    away = tokens * (ranks if decoding else per_node) * (1 - 1 / nodes)
    away = np.where(nodes > 1, np.minimum(away, copies), 0.0)
    inside = copies * size if not decoding else (copies - away) * size
    return inside, away * size
