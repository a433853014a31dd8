"""Writes the experts of a packed run in the compressed-tensors layout, and checks what was written.

    DIR/model.safetensors               one Linear per expert and projection:
        model.layers.L.mlp.experts.E.{gate,up,down}_proj.
            weight_packed        U8       [out, in / 2]     two codes a byte, low nibble first
            weight_scale         F8_E4M3  [out, in / 16]    linear (MXFP4: U8, E8M0 bits, [out, in / 32])
            weight_global_scale  F32      [1]               2688 / amax; a weight is code * scale / it (NVFP4)
            input_global_scale   F32      [1]               2688 / amax of the calibrated input (W4A4)
    DIR/model.safetensors.index.json, DIR/config.json

Everything else is bfloat16 under the names that Hugging Face's decoders use. The architecture is MoelabForCausalLM: no
inference engine has it, so none loads the folder as it is. The expert tensors follow the contract of
compressed-tensors, and whoever adds the architecture to an engine finds the rest in config.json: `embedding_multiplier`
is the factor on the embedding's rows; `scoring_func`, `score_before_selection`, `norm_topk_prob` and
`routed_scaling_factor` say what the router does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moelab import atomic, metrics
from moelab import config as configs
from moelab import model as model_lib
from moelab.errors import ConfigError
from moelab.quant import export_config, export_tensors, storage, tensor_file
from moelab.quant.export_config import LAYOUTS

TENSORS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
# Routers whose parameters are one matrix, applied to the token: what `mlp.gate.weight` can say.
ROUTERS = ("top_k",)


def export(
    folder: str | Path,
    packed: storage.PackedRun,
    layout: str,
    *,
    activations: bool = False,
    input_amax: Mapping[int, Mapping[str, np.ndarray]] | None = None,
) -> dict[str, Any]:
    """Writes a packed run as a compressed-tensors checkpoint, reads it back and checks it.

    Args:
      folder: new or empty.
      packed: its facts have the run's config.
      layout: key of LAYOUTS: nvfp4-pack-quantized or mxfp4-pack-quantized.
      activations: W4A4: the engine quantizes the rows that enter the experts too; else W4A16.
      input_amax: for W4A4 in NVFP4, per layer "gate_up" and "down": (E,) float32, the largest magnitude of each
        expert's rows in calibration.

    Returns:
      What `validate_export` returns.

    Raises:
      ConfigError: the layout cannot say what the run does, or would say something wrong: another format, a rotation or
        an input factor that an engine would have to apply, gate and up with two global scales, a NaN, an expert without
        a calibrated input. The message names layer and expert.

    Reference: compressed-tensors, formats nvfp4-pack-quantized and mxfp4-pack-quantized.
    """
    check(packed, layout)
    folder = storage.check_empty(folder)
    config = configs.from_dict(packed.facts["config"])
    static = activations and LAYOUTS[layout].static_input_scale
    tensors = tensors_of(config, packed, (input_amax or {}) if static else None)
    described = export_config.describe(config, packed, layout, activations, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    tensor_file.save(folder / TENSORS, tensors, {"format": "pt"})
    total = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(tensors, TENSORS)}
    for name, value in ((INDEX, index), (CONFIG, described)):
        text = json.dumps(metrics.plain(value), indent=2, allow_nan=False)
        atomic.write_text(folder / name, text + "\n")
    return validate_export(folder, tensors)


def tensors_of(config, packed: storage.PackedRun, input_amax=None) -> dict[str, np.ndarray]:
    """Returns every tensor of the checkpoint by name; input scales only where input_amax is given."""
    vocab_size = packed.rest["embedding"].shape[0]
    model = model_lib.from_config(config, vocab_size)
    return export_tensors.tensors(model, packed, input_amax)


def check(packed: storage.PackedRun, layout: str) -> None:
    """Raises ConfigError unless the layout can say what the packed run computes."""
    facts = packed.facts
    for spec in storage.blocks(packed.quantized).values():
        check_model(configs.from_dict(facts["config"]), layout, spec["format"])
    if facts.get("rotation"):
        raise ConfigError(
            f"method {facts['method']['kind']} rotates the rows that enter the experts (blocks of "
            f"{facts['rotation']}); {layout} has no place for that"
        )
    scaled = [path for path in storage.paths(packed.quantized) if path.endswith("/input_scale")]
    if scaled:
        raise ConfigError(
            f"method {facts['method']['kind']} multiplies the rows that enter the experts by a factor per channel "
            f"({scaled[0]}); folding it into the norm before them would round the router's weights anew, so it is not "
            "exported"
        )


def check_model(config, layout: str, format: str) -> None:
    """Raises ConfigError unless the layout has a place for a run's router and for its experts' format."""
    if layout not in LAYOUTS:
        raise ConfigError(f"no layout {layout!r}; there are {', '.join(LAYOUTS)}")
    if format not in LAYOUTS[layout].formats:
        allowed = ", ".join(LAYOUTS[layout].formats)
        raise ConfigError(f"{layout} holds {allowed}; the experts are {format}")
    if config.router.kind not in ROUTERS:
        known, kind = ", ".join(ROUTERS), config.router.kind
        raise ConfigError(f"a checkpoint has no place for router.kind={kind}; only for {known}")
    for field in ("capacity_factor", "slots_per_expert"):
        if config.moe[field]:
            raise ConfigError(f"a checkpoint cannot say moe.{field}={config.moe[field]}")


def validate_export(
    folder: str | Path, source: Mapping[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """Reads an exported folder again and checks names, shapes, dtypes, scales and, against a source, every byte.

    Args:
      folder: what `export` wrote.
      source: arrays by name that the file must hold, byte for byte; None: not compared.

    Returns:
      tensors, experts, bytes of tensors, bytes of the file.

    Raises:
      ConfigError: with the first thing that is wrong; the message names the tensor.
    """
    folder = Path(folder)
    described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    found = tensor_file.load(folder / TENSORS)
    if set(index["weight_map"]) != set(found):
        odd = sorted(set(index["weight_map"]) ^ set(found))
        raise ConfigError(f"{folder}: index and file differ in {odd[0]}")
    for name, array in (source or found).items():
        _check_same(folder, name, array, found)
    if source is not None and set(source) != set(found):
        raise ConfigError(f"{folder}: {min(set(found) - set(source))} is not in the source")
    experts = export_config.check_experts(described, found, str(folder))
    return {
        "layout": described["quantization_config"]["format"],
        "tensors": len(found),
        "experts": experts,
        "tensor_bytes": sum(array.nbytes for array in found.values()),
        "file_bytes": (folder / TENSORS).stat().st_size,
    }


def _check_same(folder: Path, name: str, wanted: np.ndarray, found: Mapping) -> None:
    if name not in found:
        raise ConfigError(f"{folder}: {name} is missing")
    array = found[name]
    for what, theirs, ours in (
        ("shape", array.shape, wanted.shape),
        ("dtype", array.dtype, wanted.dtype),
    ):
        if theirs != ours:
            raise ConfigError(f"{folder}: {name} has {what} {theirs}; the source has {ours}")
    if array.tobytes() != wanted.tobytes():
        raise ConfigError(f"{folder}: {name} has other bytes than the source")
