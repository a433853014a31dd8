"""Calibration: runs a model over text and keeps what its experts' inputs say, for post-training quantization.

B sequences, L tokens, T = B*L tokens, N assignments, S repetitions of a segment, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moelab import model as model_lib
from moelab.errors import ConfigError
from moelab.quant import statistics
from moelab.quant.statistics import LayerStatistics, Sums

FALLBACKS = ("siblings", "all_tokens")
MIN_TOKENS = 64

Layer = tuple[int, int, int]  # segment, block of the segment, repetition of the segment


def calibrate(
    config,
    dataset,
    params: Mapping[str, Any],
    router_state: Mapping[str, Any],
    batches: Sequence,
    *,
    fallback: str = "siblings",
    min_tokens: int = MIN_TOKENS,
    gate_weighted: bool = False,
) -> dict[Layer, LayerStatistics]:
    """Collects the statistics of every MoE layer's experts from the float32 model.

    Args:
      config: of the run.
      dataset: data.Dataset, for the model's vocabulary.
      params: float32 parameters, not packed.
      router_state: states of the balancing mechanisms, used and not changed.
      batches: data.Batch, gone through twice under `all_tokens`. Padding counts nowhere, and neither does an
        assignment that was dropped or goes to an expert without computation.
      fallback: what stands in for an expert below min_tokens. "siblings": all rows of its layer (for `down` their mean
        alone, see `statistics.siblings`). "all_tokens": every token, sent through that expert, with weight 1.
      min_tokens: fewest rows for an expert's own statistics.
      gate_weighted: weigh each row by the square of the router's combine weight.

    Returns:
      Statistics by (segment, block, repetition), in the order of the blocks.

    Raises:
      ConfigError: a model without routed experts.
      ValueError: no batches, an unknown fallback, min_tokens below 1, or activations that are not finite.

    Reference: gate weighting: MoEQuant, arXiv:2505.03804 (AGQ). All tokens through all experts is llm-compressor's
    default; siblings are ModelOpt's choice for scales.
    """
    batches = list(batches)
    _check(config, batches, fallback, min_tokens)
    model = model_lib.from_dataset(config, dataset, dtype="float32")
    variables = {"params": params, "router_state": router_state}
    own = _total(model, variables, batches, gate_weighted, None)
    _check_finite(own)
    few = {layer: np.asarray(sums.tokens_E) < min_tokens for layer, sums in own.items()}
    stand_ins: dict[Layer, Sums] = {}
    if fallback == "siblings":
        stand_ins = {layer: statistics.siblings(own[layer]) for layer in own if few[layer].any()}
    elif any(few_E.any() for few_E in few.values()):
        stand_ins = _total(model, variables, batches, gate_weighted, few)
        _check_finite(stand_ins)
    return {
        layer: statistics.finish(sums, stand_ins.get(layer), fallback, min_tokens)
        for layer, sums in own.items()
    }


def name_of(layer: Layer) -> str:
    """Returns a layer's name in reports: segment_0/block_1/2 for (0, 1, 2)."""
    segment, block, repetition = layer
    return f"segment_{segment}/block_{block}/{repetition}"


def coverage(found: Mapping[Layer, LayerStatistics]) -> list[dict[str, Any]]:
    """Lists per layer how many tokens its experts saw, and which of them needed a fallback.

    Returns:
      One dict per layer: layer, tokens (per expert), experts_by_tokens (how many experts saw 0, 1 to 9, 10 to 99, ...),
      fallbacks (expert ids by source, "own" left out), gate_up and down (width, and the rank of each expert's Hessian).
    """
    return [
        {
            "layer": name_of(layer),
            "tokens": found_here.tokens_E.tolist(),
            "experts_by_tokens": _histogram(found_here.tokens_E),
            "fallbacks": _fallbacks(found_here.source_E),
            "gate_up": _ranks(found_here.gate_up),
            "down": _ranks(found_here.down),
        }
        for layer, found_here in found.items()
    ]


def coverage_table(found: Mapping[Layer, LayerStatistics]) -> str:
    """Returns `coverage` as text, one line per layer."""
    lines = ["layer  tokens per expert: least, median, most  fallbacks  least rank: gate_up, down"]
    for row in coverage(found):
        tokens, fallbacks = np.array(row["tokens"]), row["fallbacks"]
        counts = [f"{len(experts)} {source}" for source, experts in fallbacks.items()]
        ranks = [f"{min(row[m]['rank'])}/{row[m]['width']}" for m in ("gate_up", "down")]
        lines.append(
            f"{row['layer']}  {tokens.min()}, {np.median(tokens):g}, {tokens.max()}  "
            f"{', '.join(counts) or 'none needed'}  {', '.join(ranks)}"
        )
    return "\n".join(lines)


def _histogram(tokens_E: np.ndarray) -> dict[str, int]:
    bins = {"0": int((tokens_E == 0).sum())}
    low = 1
    while low <= tokens_E.max(initial=0):
        inside = (tokens_E >= low) & (tokens_E < 10 * low)
        bins[f"{low}-{10 * low - 1}"] = int(inside.sum())
        low *= 10
    return bins


def _fallbacks(source_E: tuple[str, ...]) -> dict[str, list[int]]:
    used = [name for name in statistics.SOURCES if name != "own" and name in source_E]
    return {name: [e for e, source in enumerate(source_E) if source == name] for name in used}


def _ranks(found: statistics.InputStatistics) -> dict[str, Any]:
    return {"width": found.hessian_EKK.shape[-1], "rank": found.rank_E.tolist()}


def _total(
    model, variables: Mapping, batches, gate_weighted: bool, few: Mapping[Layer, np.ndarray] | None
) -> dict[Layer, Sums]:
    """Sums over all batches; with `few`, of every token through the experts that are marked there."""
    step = _make_step(model, gate_weighted, few)
    add = jax.jit(lambda total, new: {key: statistics.merge(total[key], new[key]) for key in new})
    total = None
    for batch in batches:
        new = step(variables, batch)
        total = new if total is None else add(total, new)
    return _by_layer(model, total)


def _make_step(model, gate_weighted: bool, few: Mapping[Layer, np.ndarray] | None):
    """Returns a jitted (variables, batch) -> sums by (segment, block), stacked over the repetitions."""

    @jax.jit
    def step(variables, batch):
        inputs = model_lib.Inputs(batch.token_BL, batch.mask_BL, batch.domain_B)
        out, written = model.apply(
            variables, inputs, train=False, trace=True, mutable=["calibration"]
        )
        found = {}
        for i, j in _places(model):
            place = f"segment_{i}", f"block_{j}"
            (x_STD,) = written["calibration"][place[0]][place[1]]["moe"]["x_TD"]
            weights = variables["params"][place[0]][place[1]]["moe"]["experts"]
            routing = out.reports[i][place[1]].trace
            if few is None:
                rows = routing.token_N, routing.expert_N, _row_weight(routing, gate_weighted)
            else:
                rows = _every_token(routing.aux.mask_T, _few_of(model, few, i, j))
            layer = (x_STD, *rows, weights["gate_up"], weights["down"])
            found[i, j] = lax.map(lambda one: statistics.collect(*one), layer)
        return {f"{i}/{j}": sums for (i, j), sums in found.items()}

    return step


def _row_weight(routing, gate_weighted: bool) -> jax.Array:
    weight = routing.weight_N.astype(jnp.float32)
    return jnp.square(weight) if gate_weighted else jnp.ones_like(weight)


def _every_token(mask_ST: jax.Array, few_SE: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lists assignments of all valid tokens to the marked experts: (S, T * most marked) each."""
    repetitions, num_tokens = mask_ST.shape
    num_experts, most = few_SE.shape[1], max(int(few_SE.sum(axis=1).max()), 1)
    marked_SM = np.full((repetitions, most), num_experts, np.int32)
    for s, few_E in enumerate(few_SE):
        marked_SM[s, : few_E.sum()] = np.flatnonzero(few_E)
    shape = (repetitions, num_tokens, most)
    expert = jnp.broadcast_to(jnp.asarray(marked_SM)[:, None, :], shape)
    expert = jnp.where(mask_ST[:, :, None], expert, num_experts).reshape(repetitions, -1)
    token = jnp.arange(num_tokens, dtype=jnp.int32)[None, :, None]
    token = jnp.broadcast_to(token, shape).reshape(repetitions, -1)
    return token, expert, jnp.ones(expert.shape, jnp.float32)


def _few_of(model, few: Mapping[Layer, np.ndarray], segment: int, block: int) -> np.ndarray:
    return np.stack([few[segment, block, s] for s in range(model.segments[segment].count)])


def _places(model) -> Iterator[tuple[int, int]]:
    for i, segment in enumerate(model.segments):
        for j, block in enumerate(segment.blocks):
            if block.moe is not None:
                yield i, j


def _by_layer(model, total: Mapping[str, Sums]) -> dict[Layer, Sums]:
    """Unstacks repetitions, in the order of the blocks."""
    found = {}
    for i, segment in enumerate(model.segments):
        here = [j for k, j in _places(model) if k == i]
        for s in range(segment.count):
            for j in here:
                found[i, j, s] = jax.tree.map(lambda a, s=s: a[s], total[f"{i}/{j}"])
    return found


def _check(config, batches: Sequence, fallback: str, min_tokens: int) -> None:
    if not config.moe.num_experts:
        raise ConfigError("moe.num_experts is 0: there are no experts to calibrate")
    if config.moe.slots_per_expert:
        raise ConfigError(
            "moe.slots_per_expert: Soft MoE's experts see mixtures of tokens, not rows; calibration "
            "needs routed experts (slots_per_expert=0)"
        )
    if config.moe.activation != "swiglu":
        raise ConfigError(
            f"moe.activation={config.moe.activation}: calibration computes the rows of down with SwiGLU"
        )
    if fallback not in FALLBACKS:
        raise ValueError(f"unknown fallback {fallback!r}; allowed: {', '.join(FALLBACKS)}")
    if min_tokens < 1:
        raise ValueError(f"min_tokens must be at least 1, got {min_tokens}")
    if not len(batches):
        raise ValueError("batches must hold at least one batch, got none")


def _check_finite(found: Mapping[Layer, Sums]) -> None:
    for layer, sums in found.items():
        for name, inputs in (("gate_up", sums.gate_up), ("down", sums.down)):
            bad = ~np.isfinite(inputs.square_EKK).all(axis=(1, 2))
            if bad.any():
                raise ValueError(
                    f"the inputs of {name} in layer {name_of(layer)} are not finite for experts "
                    f"{np.flatnonzero(bad).tolist()}: no statistics can be made of them"
                )
