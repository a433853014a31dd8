"""A tiny run with packed experts, made up in code, for the tests of storage, export and quality."""

import json

import jax
import numpy as np

from moelab import config as configs
from moelab import model
from moelab.quant import storage
from pallas_kernels import formats
from tests import tiny

SECTIONS = {
    "model": dict(num_layers=3, tied_head=False),
    "moe": dict(num_dense_layers=1, num_shared_experts=1),
    "router": dict(kind="top_k", k=2),
    "balance": {"loss_free_bias": {"rate": 0.001}},
}


def make(format="nvfp4", rule=None, seed=0, **sections):
    """Returns (config, model, variables, PackedRun) of an untrained tiny model."""
    merged = {name: dict(values) for name, values in SECTIONS.items()}
    for name, values in sections.items():
        merged[name] = merged.get(name, {}) | values
    config = tiny.make_config(**merged)
    built = model.from_config(config, tiny.VOCAB)
    variables = model.init(built, jax.random.key(seed))
    variables["router_state"] = jax.tree.map(
        lambda a: a + 0.25 * np.arange(a.size, dtype=np.float32).reshape(a.shape),
        variables["router_state"],
    )
    rest, quantized = pack(variables["params"], format, rule)
    facts = {
        "config": json.loads(configs.canonical(config)),
        "format": format,
        "rule": rule,
        "method": {"kind": "rtn", "fields": {}},
        "rotation": None,
    }
    return (
        config,
        built,
        variables,
        storage.PackedRun(rest, quantized, variables["router_state"], facts),
    )


def pack(tree, format, rule=None, path=()):
    """Packs every leaf below a folder called experts; one global scale per matrix."""
    rest, quantized = {}, {}
    for name, value in tree.items():
        if "experts" in path:
            quantized[name] = formats.quantize(
                value, format, rule=rule, num_batch_axes=value.ndim - 2
            )
        elif isinstance(value, dict):
            kept, packed = pack(value, format, rule, (*path, name))
            if kept or not packed:
                rest[name] = kept
            if packed:
                quantized[name] = packed
        else:
            rest[name] = value
    return rest, quantized


def experts(packed):
    """The packed experts of the tiny run's only sparse segment."""
    found = [s for s in packed.quantized.values() if s]
    assert len(found) == 1
    return found[0]["block_0"]["moe"]["experts"]


def with_experts(packed, **changes):
    """The run with other expert matrices."""
    ((segment, _),) = packed.quantized.items()
    merged = experts(packed) | changes
    quantized = {segment: {"block_0": {"moe": {"experts": merged}}}}
    return storage.PackedRun(packed.rest, quantized, packed.router_state, dict(packed.facts))
