"""What an exported folder says of itself: config.json, and whether the expert tensors agree with it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

import moelab
from moelab import model as model_lib
from moelab.errors import ConfigError
from moelab.quant import storage
from moelab.quant.export_tensors import BFLOAT16, E4M3

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A compressed-tensors format.

    Attributes:
      formats: keys of pallas_kernels' FORMATS that it holds.
      block: elements that share a block scale.
      scale_dtype: of `weight_scale` in the file.
      arguments: of compressed-tensors' QuantizationArgs, for weights and activations.
      activation_arguments: those that activations have besides.
      static_input_scale: whether W4A4 wants an `input_global_scale`.
    """

    formats: tuple[str, ...]
    block: int
    scale_dtype: np.dtype
    arguments: dict[str, Any]
    activation_arguments: dict[str, Any]
    static_input_scale: bool


_FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True}
LAYOUTS = {
    "nvfp4-pack-quantized": Layout(
        formats=("nvfp4", "nvfp4_2d", "nvfp4_46", "nvfp4_46_2d"),
        block=16,
        scale_dtype=E4M3,
        arguments=_FLOAT4
        | {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"},
        activation_arguments={"dynamic": "local", "observer": "static_minmax"},
        static_input_scale=True,
    ),
    "mxfp4-pack-quantized": Layout(
        formats=("mxfp4",),
        block=32,
        scale_dtype=np.dtype(np.uint8),
        arguments=_FLOAT4 | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
        activation_arguments={"dynamic": True},
        static_input_scale=False,
    ),
}


def describe(
    config,
    packed: storage.PackedRun,
    layout: str,
    activations: bool,
    tensors: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Returns config.json: the model's shapes, its routing, and how its experts are quantized."""
    m, moe, router = config.model, config.moe, config.router
    sparse = model_lib.moe_layers(config)
    return {
        "architectures": ["MoelabForCausalLM"],
        "model_type": "moelab",
        "torch_dtype": "bfloat16",
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "hidden_size": m.width,
        "hidden_act": "silu",
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_heads,
        "num_key_value_heads": m.num_kv_heads,
        "head_dim": m.head_dim,
        "intermediate_size": m.dense_width,
        "moe_intermediate_size": moe.expert_width,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": router.k,
        "n_shared_experts": moe.num_shared_experts,
        "mlp_only_layers": [i for i in range(m.num_layers) if i not in sparse],
        "scoring_func": router.score,
        "score_before_selection": router.score_before_selection,
        "norm_topk_prob": router.renormalise,
        "routed_scaling_factor": router.scale,
        "rms_norm_eps": m.norm_epsilon,
        "rope_theta": m.rope_base,
        "tie_word_embeddings": m.tied_head,
        "embedding_multiplier": m.width**0.5,
        "quantization_config": quantization(config, layout, activations, tensors),
        "moelab": {"version": moelab.__version__} | _origin(packed.facts),
    }


def _origin(facts: Mapping[str, Any]) -> dict[str, Any]:
    names = ("source", "method", "format", "rule", "recipe", "calibration")
    found = {name: facts[name] for name in names if name in facts}
    return found | {"order_of_operations": storage.ORDER_OF_OPERATIONS}


def quantization(
    config, layout: str, activations: bool, tensors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Returns `quantization_config`: one group of all Linear layers, and which of them are left alone."""
    spec = LAYOUTS[layout]
    inputs = spec.arguments | spec.activation_arguments if activations else None
    group = {
        "targets": ["Linear"],
        "format": layout,
        "weights": spec.arguments | {"dynamic": False},
        "input_activations": inputs,
        "output_activations": None,
    }
    sparse = model_lib.moe_layers(config)
    dense = [i for i in range(config.model.num_layers) if i not in sparse]
    ignore = ["lm_head", r"re:.*self_attn\..*", r"re:.*mlp\.gate$", r"re:.*mlp\.shared_experts\..*"]
    ignore += [rf"re:model\.layers\.{i}\.mlp\.(gate|up|down)_proj$" for i in dense]
    plain = [i for i in sparse if f"model.layers.{i}.mlp.experts.0.gate_proj.weight" in tensors]
    ignore += [rf"re:model\.layers\.{i}\.mlp\.experts\..*" for i in plain]
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }


def check_experts(described: Mapping[str, Any], found: Mapping[str, np.ndarray], where: str) -> int:
    """Checks every expert's tensors against config.json; returns how many experts there are.

    Raises:
      ConfigError: a tensor is missing, or has another shape or dtype; a NaN scale; gate and up with two global scales;
        a Linear without packed weights that `ignore` does not name.
    """
    group = described["quantization_config"]["config_groups"]["group_0"]
    ignore = described["quantization_config"]["ignore"]
    layout = LAYOUTS[described["quantization_config"]["format"]]
    width, hidden = described["hidden_size"], described["moe_intermediate_size"]
    shapes = {
        "gate_proj": (hidden, width),
        "up_proj": (hidden, width),
        "down_proj": (width, hidden),
    }
    count = 0
    for index in range(described["num_hidden_layers"]):
        if index in described["mlp_only_layers"]:
            continue
        for e in range(described["num_experts"]):
            prefix = f"model.layers.{index}.mlp.experts.{e}"
            for name in _PROJECTIONS:
                wanted = _wanted(layout, shapes[name], group["input_activations"] is not None)
                if _is_ignored(f"{prefix}.{name}", ignore):
                    wanted = {"weight": (shapes[name], BFLOAT16)}
                for leaf, (shape, dtype) in wanted.items():
                    _check_tensor(found, f"{prefix}.{name}.{leaf}", shape, dtype, where)
            _check_pair(found, prefix, where)
            count += 1
    _check_ignored(ignore, found, where)
    return count


def _wanted(layout: Layout, shape: tuple[int, int], inputs: bool) -> dict[str, tuple]:
    rows, columns = shape
    found = {
        "weight_packed": ((rows, columns // 2), np.uint8),
        "weight_scale": ((rows, columns // layout.block), layout.scale_dtype),
    }
    if layout.static_input_scale:
        found["weight_global_scale"] = ((1,), np.float32)
        if inputs:
            found["input_global_scale"] = ((1,), np.float32)
    return found


def _check_tensor(found: Mapping, name: str, shape: tuple, dtype: Any, where: str) -> None:
    if name not in found:
        raise ConfigError(f"{where}: {name} is missing")
    array = found[name]
    if array.shape != shape or array.dtype != dtype:
        raise ConfigError(
            f"{where}: {name} is {array.dtype} {array.shape}; wanted {np.dtype(dtype)} {shape}"
        )
    leaf = name.rpartition(".")[2]
    if leaf.endswith("global_scale") and not (np.isfinite(array[0]) and array[0] > 0):
        raise ConfigError(f"{where}: {name} is {array[0]}; it must be finite and above 0")
    if leaf == "weight_scale":
        nan = 0xFF if array.dtype == np.uint8 else 0x7F
        if (array.view(np.uint8) == nan).any():
            raise ConfigError(f"{where}: {name} holds a NaN")


def _check_pair(found: Mapping, prefix: str, where: str) -> None:
    for leaf in ("weight_global_scale", "input_global_scale"):
        gate, up = (found.get(f"{prefix}.{name}.{leaf}") for name in _PROJECTIONS[:2])
        if gate is not None and gate.tobytes() != up.tobytes():
            raise ConfigError(
                f"{where}: {prefix}: gate and up differ in {leaf} ({gate[0]:g} and {up[0]:g}); engines read only the "
                "gate's"
            )


def _check_ignored(ignore: list[str], found: Mapping, where: str) -> None:
    """Every Linear with a plain weight must be ignored, and none with a packed one."""
    for name, array in found.items():
        module, _, leaf = name.rpartition(".")
        linear = leaf in ("weight", "weight_packed") and array.ndim == 2
        if not linear or module == "model.embed_tokens":
            continue
        ignored = _is_ignored(module, ignore)
        if ignored != (leaf == "weight"):
            what = "is ignored but packed" if ignored else "is not packed and not ignored"
            raise ConfigError(f"{where}: {module} {what}")


def _is_ignored(module: str, ignore: list[str]) -> bool:
    return any(
        bool(re.match(entry[3:], module)) if entry.startswith("re:") else entry == module
        for entry in ignore
    )
