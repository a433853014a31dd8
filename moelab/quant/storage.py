"""A quantized run in a folder: one safetensors file with every parameter, one JSON file that says how they were made.

    DIR/model.safetensors   params/..., quantized/.../{codes,scales,global_amax}, router_state/...
    DIR/quantized.json      format, method, calibration, source, bytes

A 4-bit weight takes 4 bits and its share of a scale: 4 + 8/16 (NVFP4) or 4 + 8/32 (MXFP4), and each matrix of an expert
one float32 (NVFP4).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moelab import atomic, environment, metrics
from moelab.data import files
from moelab.errors import ConfigError
from moelab.quant import packing, tensor_file
from pallas_kernels import formats

TENSORS, FACTS = "model.safetensors", "quantized.json"
SCHEMA = 1
# What codes and scales mean, and how they were rounded. Raised when pallas_kernels.formats gives other bits.
ORDER_OF_OPERATIONS = {
    "version": 1,
    "definition": "pallas_kernels/formats/block_scaled.py",
    "nvfp4": "order of Transformer Engine's NVFP4QuantizerRef; value = (code * scale) * (global_amax * (1/2688))",
    "packing": "two 4-bit codes a byte, low nibble first; scales linear, not swizzled",
}
REST_DTYPES = ("float32", "bfloat16")
_LEAVES = ("codes", "scales", "global_amax")


@dataclasses.dataclass(frozen=True)
class PackedRun:
    """A run whose experts are packed.

    Attributes:
      rest: the other parameters, nested.
      quantized: BlockScaled values at the experts' paths, and where the method made one the float32 factor
        "input_scale" of the rows that enter them: the collection `quantized`.
      router_state: states of the balancing mechanisms.
      facts: plain values: where the run comes from and how it was quantized (`quantized.json`).
    """

    rest: dict
    quantized: dict
    router_state: dict
    facts: dict[str, Any]


def save(folder: str | Path, packed: PackedRun, rest_dtype: str = "float32") -> dict[str, Any]:
    """Writes a packed run to a folder, which must be new or empty.

    Args:
      folder: is made.
      packed: what to write; its facts are completed. What `packing.for_device` did to its experts is undone.
      rest_dtype: of the floating-point parameters that are not packed: float32 or bfloat16. The router's state stays
        as it is.

    Returns:
      The facts as written, with `bytes` (`count`), packages, order of operations and the hash of the tensors.

    Raises:
      ConfigError: an unknown rest_dtype, or a folder that is not empty.
    """
    if rest_dtype not in REST_DTYPES:
        allowed = ", ".join(REST_DTYPES)
        raise ConfigError(f"rest_dtype={rest_dtype!r} is not known; allowed: {allowed}")
    folder = check_empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    packed = dataclasses.replace(packed, quantized=packing.as_packed(packed.quantized))
    arrays = _arrays(packed, jnp.dtype(rest_dtype))
    tensor_file.save(folder / TENSORS, arrays, {"format": "pt", "moelab": str(SCHEMA)})
    facts = packed.facts | {
        "schema": SCHEMA,
        "order_of_operations": ORDER_OF_OPERATIONS,
        "packages": environment.packages(),
        "rest_dtype": rest_dtype,
        "tensors_sha256": files.digest(folder / TENSORS),
        "blocks": blocks(packed.quantized),
        "empty": [path for tree in _trees(packed) for path, v in _flat(*tree) if v is None],
        "bytes": count(arrays, _num_weights(packed.quantized))
        | {"file": (folder / TENSORS).stat().st_size},
    }
    text = json.dumps(metrics.plain(facts), indent=2, allow_nan=False)
    atomic.write_text(folder / FACTS, text + "\n")  # last: a folder with facts is whole
    return facts


def load(folder: str | Path) -> PackedRun:
    """Reads a packed run back, bit for bit.

    Raises:
      ConfigError: the folder holds none, or one of another schema, or its tensors are not those that were written.
    """
    folder = Path(folder)
    if not (folder / FACTS).is_file():
        raise ConfigError(f"{folder} holds no quantized run: there is no {FACTS}")
    facts = metrics.restored(json.loads((folder / FACTS).read_text(encoding="utf-8")))
    if facts["schema"] != SCHEMA:
        raise ConfigError(f"{folder}: schema {facts['schema']}, and this moelab reads {SCHEMA}")
    if files.digest(folder / TENSORS) != facts["tensors_sha256"]:
        raise ConfigError(f"{folder / TENSORS} is not the file that {FACTS} was written for")
    trees: dict[str, dict] = {"params": {}, "quantized": {}, "router_state": {}}
    arrays = tensor_file.load(folder / TENSORS)
    for path, spec in facts["blocks"].items():
        leaves = {leaf: arrays.pop(f"{path}/{leaf}", None) for leaf in _LEAVES}
        leaves = {name: None if x is None else jnp.asarray(x) for name, x in leaves.items()}
        _insert(trees, path, formats.BlockScaled(**leaves, **spec))
    for path, array in arrays.items():
        _insert(trees, path, jnp.asarray(array))
    for path in facts["empty"]:
        _insert(trees, path, {})
    return PackedRun(trees["params"], trees["quantized"], trees["router_state"], facts)


def check_empty(folder: str | Path) -> Path:
    """Returns the folder's path, or raises ConfigError if something is there already."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already and is not empty; choose another folder")
    return folder


def count(arrays: Mapping[str, np.ndarray], quantized_weights: int) -> dict[str, Any]:
    """Counts stored bytes by role.

    Args:
      arrays: by path, as in the file.
      quantized_weights: how many weights the packed ones stand for.

    Returns:
      total and roles: bytes; codes, scales, global_scales: bytes of the packed weights; quantized_weights;
      bits_per_weight: of codes and scales, without the global scales.
    """
    roles: dict[str, int] = {}
    part = dict.fromkeys(_LEAVES, 0)
    for path, array in arrays.items():
        role = role_of(path)
        roles[role] = roles.get(role, 0) + array.nbytes
        leaf = path.rpartition("/")[2]
        if path.startswith("quantized/") and leaf in part:
            part[leaf] += array.nbytes
    return {
        "total": sum(roles.values()),
        "roles": dict(sorted(roles.items())),
        "codes": part["codes"],
        "scales": part["scales"],
        "global_scales": part["global_amax"],
        "quantized_weights": quantized_weights,
        "bits_per_weight": 8 * (part["codes"] + part["scales"]) / max(quantized_weights, 1),
    }


_ROLES = {
    "gate_up": "expert_gate_up",
    "down": "expert_down",
    "input_scale": "expert_input_scale",
    "attention": "attention",
    "shared": "shared",
    "dense": "dense",
    "router": "router",
    "router_state": "router",
    "idle": "idle",
    "embedding": "embedding",
    "head": "head",
}


def role_of(path: str) -> str:
    """Names the role of a parameter from its path.

    >>> role_of("params/segment_0/block_0/moe/shared/down")
    'shared'
    """
    parts = path.split("/")
    if "experts" in parts:
        return _ROLES[parts[parts.index("experts") + 1]]
    if any(part.endswith("norm") for part in parts):
        return "norms"
    known = [part for part in parts if part in _ROLES and part not in ("gate_up", "down")]
    return _ROLES[known[0]] if known else "other"


def blocks(quantized: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Returns format and rule of each packed array of a `quantized` collection, by path."""
    return {
        path: {"format": value.format, "rule": value.rule}
        for path, value in _flat("quantized", quantized)
        if isinstance(value, formats.BlockScaled)
    }


def paths(quantized: Mapping[str, Any]) -> list[str]:
    """Returns the path of every array of a `quantized` collection."""
    return [path for path, _ in _flat("quantized", quantized)]


def _num_weights(quantized: Mapping[str, Any]) -> int:
    values = (value for _, value in _flat("", quantized))
    return sum(math.prod(v.shape) for v in values if isinstance(v, formats.BlockScaled))


def _trees(packed: PackedRun) -> tuple[tuple[str, Mapping], ...]:
    return (
        ("params", packed.rest),
        ("quantized", packed.quantized),
        ("router_state", packed.router_state),
    )


def _flat(prefix: str, tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields (path, leaf); an empty folder, which a router without parameters needs, as (path, None)."""
    for name, value in tree.items():
        path = f"{prefix}/{name}"
        if isinstance(value, Mapping):
            yield from _flat(path, value) if value else [(path, None)]
        else:
            yield path, value


def _arrays(packed: PackedRun, rest_dtype: np.dtype) -> dict[str, np.ndarray]:
    arrays = {}
    for prefix, tree in _trees(packed):
        for path, value in _flat(prefix, tree):
            if isinstance(value, formats.BlockScaled):
                leaves = ((leaf, getattr(value, leaf)) for leaf in _LEAVES)
                arrays |= {f"{path}/{leaf}": np.asarray(x) for leaf, x in leaves if x is not None}
            elif value is not None:
                array = np.asarray(value)
                to_rest = prefix == "params" and jnp.issubdtype(array.dtype, jnp.floating)
                arrays[path] = array.astype(rest_dtype) if to_rest else array
    return arrays


def _insert(trees: dict[str, dict], path: str, value: Any) -> None:
    *folders, leaf = path.split("/")
    for name in folders:
        trees = trees.setdefault(name, {})
    trees[leaf] = value
