"""A stored packed run against the run that it was made of, in each scheme: what `quality.json` says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moelab import evaluate, quant
from moelab import model as model_lib
from moelab.quant import noise, quality, recipes, storage


def describe(
    loaded: evaluate.Loaded,
    options,
    stored: storage.PackedRun,
    input_amax: Mapping | None,
    report: Mapping,
) -> dict[str, Any]:
    """Compares what was stored with the run that it was made of.

    Args:
      loaded: the run.
      options: quantize.Options.
      stored: the packed run, read back.
      input_amax: calibrated maxima by layer, for static activation scales.
      report: of ptq.quantize_params.

    Returns:
      What quantize.quantize_run returns, without the method's report and the export.
    """
    config, dataset, state = loaded.config, loaded.dataset, loaded.state
    plain = recipes.get(evaluate.REFERENCE)
    reference = quality.Subject(
        plain.name,
        evaluate.in_precision(config, dataset, plain),
        {"params": state.params, "router_state": state.router_state},
    )
    subjects = [_subject(loaded, options, stored, name, input_amax) for name in options.schemes]
    names = ("source", "format", "rule", "method", "rotation", "activation_scale", "rest_dtype")
    sizes = {
        name: quant.expert_bytes(state.params, recipes.get(name)) for name in ("float32", "bf16")
    }
    return {name: stored.facts[name] for name in names} | {
        "split": options.split,
        "calibration": stored.facts["calibration"],
        "bytes": stored.facts["bytes"] | {"unquantized_experts": sizes},
        "layers": model_lib.moe_layers(config),
        "weights": _weights(state.params, stored, report),
        "rows": quality.compare(config, dataset, options.split, reference, subjects),
    }


def _weights(params: Mapping, stored: storage.PackedRun, report: Mapping) -> dict[str, Any]:
    """SQNR of the weights; by the method's own account where it moved scales between up and down."""
    if any(path.endswith("/input_scale") for path in storage.paths(stored.quantized)):
        return noise.reported_weights(params, stored.quantized, report)
    return noise.weights(params, stored.quantized, stored.facts["rotation"])


def _subject(loaded, options, stored: storage.PackedRun, name: str, input_amax):
    """The stored run as a scheme computes it. The report's float32 parameters stand for bfloat16 ones exactly."""
    recipe = dataclasses.replace(
        recipes.named(name, options.format), rotation=stored.facts["rotation"]
    )
    quantized = stored.quantized
    if name == "w4a4" and options.scale == "static":
        recipe = dataclasses.replace(recipe, activation_scale="static")
        quantized = _with_amax(loaded, quantized, input_amax)
    rest = jax.tree.map(_widened, stored.rest)
    variables, _ = evaluate.packed_variables(rest, quantized, stored.router_state, recipe)
    model = evaluate.in_precision(loaded.config, loaded.dataset, recipe)
    return quality.Subject(name, model, variables)


def _widened(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf


def _with_amax(loaded: evaluate.Loaded, quantized: Mapping, input_amax: Mapping) -> dict:
    """Adds the calibrated maxima to the experts: gate_up_amax and down_amax (S, E)."""
    model = model_lib.from_dataset(loaded.config, loaded.dataset)
    result, rows = {}, iter(input_amax.values())
    for i, segment in enumerate(model.segments):
        stacks = {name: {"gate_up": [], "down": []} for name in segment.sparse}
        for _ in range(segment.count):
            for name in segment.sparse:
                amax = next(rows)
                for role, stack in stacks[name].items():
                    stack.append(amax[role])
        blocks = quantized.get(f"segment_{i}", {})
        for name, tree in blocks.items():
            extra = {f"{role}_amax": jnp.stack(stack) for role, stack in stacks[name].items()}
            experts = tree["moe"]["experts"] | extra
            result.setdefault(f"segment_{i}", {})[name] = {"moe": {"experts": experts}}
    return result
