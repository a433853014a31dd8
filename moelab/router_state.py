"""The state of the balancing mechanisms after a step, given the statistics of the whole step.

E experts; the leading axis of a segment's state and statistics is its layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from moelab import model as model_lib
from moelab import moe


def mechanisms(model: model_lib.Transformer) -> tuple:
    """(name, mechanism) of the model's MoE layers, which all have the same."""
    blocks = (block for segment in model.segments for block in segment.blocks)
    return next((b.moe.mechanisms for b in blocks if b.moe is not None), ())


def update(
    model: model_lib.Transformer, state: Any, reports: Any, rows: Any, only: list[str] | None = None
) -> Any:
    """Applies each mechanism's update (or those of `only`) to its state in every layer, given the step's statistics."""
    shared = {name: _over_layers(reports, name) for name, m in mechanisms(model) if m.across_layers}
    new = {}
    for i, (segment, report, row) in enumerate(zip(model.segments, reports, rows, strict=True)):
        blocks = {}
        for name in segment.sparse if f"segment_{i}" in state else ():
            config = segment.blocks[int(name.removeprefix("block_"))].moe
            old = state[f"segment_{i}"][name]["moe"]
            statistics = {n: report[name].observation[n] | row[name][n] for n in old}
            for n in shared.keys() & old.keys():
                statistics[n] = _for_each(shared[n], segment.count)
            blocks[name] = {"moe": _updated(config, old, statistics, only)}
        if blocks:
            new[f"segment_{i}"] = blocks
    return new


def _over_layers(reports: Any, name: str) -> dict[str, jax.Array]:
    """Adds a mechanism's statistics up over all MoE layers."""
    parts = [r.observation[name] for segment in reports for r in segment.values()]
    parts = [jax.tree.map(lambda a: jnp.sum(a, axis=0), part) for part in parts]
    return jax.tree.map(lambda *a: sum(a[1:], a[0]), *parts)


def _for_each(total: dict[str, jax.Array], count: int) -> dict[str, jax.Array]:
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *a.shape)), total)


def _updated(config: moe.MoeConfig, state: dict, statistics: dict, only: list[str] | None) -> dict:
    """Updates the mechanisms that have a state; the leading axis is the segment's layers."""
    new = dict(state)
    for name, mechanism in config.mechanisms:
        if name in state and (only is None or name in only):

            def updated(old, total, mechanism=mechanism):
                return mechanism.update(old, total, config.router)

            new[name] = jax.vmap(updated)(state[name], statistics[name])
    return new
