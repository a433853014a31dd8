"""The tensors of a compressed-tensors checkpoint, made from a packed run.

E experts, G = 2F gate rows and then up rows, F expert width, D model width, C columns of the router's scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from moelab import blocks
from moelab import model as model_lib
from moelab.errors import ConfigError
from moelab.quant.storage import PackedRun
from pallas_kernels import formats

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
# The format of the activations that a static input scale is for.
ACTIVATION = "nvfp4"
_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
_NORMS = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One block of the model: its place among all blocks, and what belongs to it in each collection."""

    index: int
    config: blocks.BlockConfig
    params: dict
    quantized: dict
    router_state: dict


def layers(model: model_lib.Transformer, packed: PackedRun) -> Iterator[Layer]:
    """Yields the blocks in order, their parameters without the segments' leading axis."""
    index = 0
    for i, segment in enumerate(model.segments):
        for repetition in range(segment.count):
            for j, config in enumerate(segment.blocks):
                parts = (
                    _one(tree, f"segment_{i}", f"block_{j}", repetition)
                    for tree in (packed.rest, packed.quantized, packed.router_state)
                )
                yield Layer(index, config, *parts)
                index += 1


def _one(tree: Mapping[str, Any], segment: str, block: str, repetition: int) -> dict:
    if segment not in tree or block not in tree[segment]:
        return {}
    return jax.tree.map(lambda leaf: np.asarray(leaf)[repetition], dict(tree[segment][block]))


def tensors(
    model: model_lib.Transformer, packed: PackedRun, input_amax: Mapping[int, Mapping] | None
) -> dict[str, np.ndarray]:
    """Names and lays out every parameter.

    Args:
      model: of the run.
      packed: with NVFP4 or MXFP4 experts.
      input_amax: per layer "gate_up" and "down": (E,) float32, the largest magnitude of each expert's rows in
        calibration; None writes no input scales.

    Returns:
      Arrays by checkpoint name.

    Raises:
      ConfigError: what the layout cannot say; the message names layer and expert.
    """
    rest = packed.rest
    found = {"model.embed_tokens.weight": _plain(rest["embedding"], "the embedding")}
    for layer in layers(model, packed):
        prefix = f"model.layers.{layer.index}"
        for name, value in _around(layer):
            found[f"{prefix}.{name}"] = _plain(value, f"layer {layer.index}: {name}")
        if layer.config.moe is None:
            found |= _feed_forward(layer.params["dense"], f"{prefix}.mlp", layer.index)
        else:
            found |= _sparse(layer, f"{prefix}.mlp", input_amax)
    found["model.norm.weight"] = _plain(rest["final_norm"]["scale"], "the final norm")
    if "head" in rest:
        found["lm_head.weight"] = _plain(rest["head"], "the head")
    return found


def _plain(value: Any, where: str) -> np.ndarray:
    array = np.asarray(value)
    if not np.isfinite(array.astype(np.float32)).all():
        raise ConfigError(f"{where} holds a NaN or an infinity; it cannot be exported")
    return array.astype(BFLOAT16)


def _around(layer: Layer) -> Iterator[tuple[str, Any]]:
    for ours, theirs in _NORMS.items():
        yield f"{theirs}.weight", layer.params[ours]["scale"]
    for ours, theirs in _ATTENTION.items():
        yield f"self_attn.{theirs}.weight", layer.params["attention"][ours]


def _feed_forward(weights: Mapping[str, Any], prefix: str, index: int) -> dict[str, np.ndarray]:
    gate, up = np.split(np.asarray(weights["gate_up"]), 2)
    parts = {"gate_proj": gate, "up_proj": up, "down_proj": weights["down"]}
    return {
        f"{prefix}.{name}.weight": _plain(value, f"layer {index}: {name}")
        for name, value in parts.items()
    }


def _sparse(layer: Layer, prefix: str, input_amax) -> dict[str, np.ndarray]:
    moe = layer.params["moe"]
    kernel_DC = np.asarray(moe["router"]["kernel"])
    found = {f"{prefix}.gate.weight": _plain(kernel_DC.T, f"layer {layer.index}: the router")}
    bias_C = _selection_bias(layer)
    if bias_C is not None:
        found[f"{prefix}.gate.e_score_correction_bias"] = bias_C
    if "shared" in moe:
        found |= _feed_forward(moe["shared"], f"{prefix}.shared_experts", layer.index)
    if "experts" in moe:
        return found | _plain_experts(layer, f"{prefix}.experts")
    experts = layer.quantized["moe"]["experts"]
    for e in range(experts["gate_up"].codes.shape[0]):
        for name, matrix, amax in _matrices(layer.index, e, experts, input_amax):
            linear = f"{prefix}.experts.{e}.{name}"
            found |= {f"{linear}.{leaf}": x for leaf, x in _linear(matrix, amax).items()}
    return found


def _plain_experts(layer: Layer, prefix: str) -> dict[str, np.ndarray]:
    """The experts of a layer that stays in high precision."""
    experts, found = layer.params["moe"]["experts"], {}
    for role in ("gate_up", "down"):
        if role not in experts:
            raise ConfigError(
                f"layer {layer.index}: {role} is packed and the rest of its experts is not"
            )
    for e in range(experts["gate_up"].shape[0]):
        weights = {role: matrices[e] for role, matrices in experts.items()}
        found |= _feed_forward(weights, f"{prefix}.{e}", layer.index)
    return found


def _selection_bias(layer: Layer) -> np.ndarray | None:
    """The sum of the mechanisms' biases, as the model adds them, or None."""
    states = layer.router_state["moe"] if layer.router_state else {}
    biases = [
        mechanism.selection_bias(states[name] if name in states else {})
        for name, mechanism in layer.config.moe.mechanisms
    ]
    biases = [np.asarray(bias, np.float32) for bias in biases if bias is not None]
    return np.sum(biases, axis=0, dtype=np.float32) if biases else None


def _matrices(index: int, expert: int, experts: Mapping[str, Any], input_amax) -> Iterator[tuple]:
    """Yields (name, matrix, amax of its input) of one expert; the matrices are checked."""
    where = f"layer {index}, expert {expert}"
    for role, names in (("gate_up", ("gate_proj", "up_proj")), ("down", ("down_proj",))):
        matrix = jax.tree.map(lambda leaf: leaf[expert], experts[role])
        _check_scales(matrix, f"{where}, {role}")
        amax = None if input_amax is None else calibrated_amax(input_amax, index, expert, role)
        rows = matrix.codes.shape[0] // len(names)
        for part, name in enumerate(names):
            yield name, _rows(matrix, slice(part * rows, (part + 1) * rows)), amax


def _rows(matrix: formats.BlockScaled, rows: slice) -> formats.BlockScaled:
    return dataclasses.replace(matrix, codes=matrix.codes[rows], scales=matrix.scales[rows])


def _check_scales(matrix: formats.BlockScaled, where: str) -> None:
    nan = 0x7F if formats.FORMATS[matrix.format].scale == "e4m3" else 0xFF
    count = int(np.sum(np.asarray(matrix.scales) == nan))
    if count:
        raise ConfigError(f"{where}: {count} block scales are NaN; the weights were not finite")
    if matrix.global_amax is None:
        return
    amax = np.unique(np.asarray(matrix.global_amax))
    if amax.size > 1:
        part = "gate and up differ in" if where.endswith("gate_up") else "its rows differ in"
        raise ConfigError(
            f"{where}: {part} global scale (amax {amax[0]:g} to {amax[-1]:g}); engines read one for both"
        )
    if not np.isfinite(amax).all():
        raise ConfigError(f"{where}: the global scale is {amax[0]}")


def calibrated_amax(
    input_amax: Mapping[int, Mapping], index: int, expert: int, role: str
) -> np.float32:
    """Returns the calibrated maximum of an expert's rows, or raises ConfigError if there is none."""
    amax_E = input_amax.get(index, {}).get(role)
    amax = np.float32(np.nan if amax_E is None else amax_E[expert])
    if not (np.isfinite(amax) and amax > 0):
        raise ConfigError(
            f"layer {index}, expert {expert}, {role}: no calibrated input scale (amax {amax}); calibrate on more "
            "tokens, or with a fallback"
        )
    return amax


def _linear(matrix: formats.BlockScaled, amax: np.float32 | None) -> dict[str, np.ndarray]:
    """The tensors of one Linear: codes [out, in / 2], scales [out, in / block], global scales [1]."""
    found = {"weight_packed": matrix.codes, "weight_scale": matrix.scales}
    spec = formats.FORMATS[matrix.format]
    if spec.scale == "e4m3":
        found["weight_scale"] = matrix.scales.view(E4M3)
        weight_amax = np.unique(matrix.global_amax)[0]
        found["weight_global_scale"] = global_scale(weight_amax, spec.scale_bound)
        if amax is not None:
            bound = formats.FORMATS[ACTIVATION].scale_bound
            found["input_global_scale"] = global_scale(amax, bound)
    return found


def global_scale(amax: np.float32, bound: float) -> np.ndarray:
    """Returns 6 * bound / amax, float32 [1]: what block scales were multiplied by. Codes decode as code * scale / it.

    2688 / amax for NVFP4, 1536 / amax for Four Over Six. A matrix of zeros, whose scales are all 0, gets 1.
    """
    with np.errstate(over="ignore"):
        encode = np.float32(formats.E2M1.max_value * bound) / np.float32(amax or np.inf)
    encode = min(encode, np.finfo(np.float32).max) if encode else 1.0
    return np.array([encode], np.float32)
