"""Upcycling: a sparse model that starts as a trained dense one computes.

    plain (Komatsuzaki et al., arXiv:2212.05055): every expert is a copy of the dense feed-forward
    granular (He et al., arXiv:2410.07524): the dense hidden width is cut into G shards, expert i gets shard i mod G

With weights that sum to a constant s, the experts' output matrices are multiplied by G / s; then the first forward pass
equals the dense model's, provided that the chosen experts hold every shard equally often. Virtual groups see to that:
the G experts of a group, one per shard, start with the same router column, so that they are chosen together.

E experts, D model width, F hidden width of an expert, G = dense hidden width / F.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moelab import blocks, manifest, restack
from moelab import model as model_lib
from moelab.errors import ConfigError


def problems(config) -> list[tuple[str, str]]:
    """Lists what keeps a config from starting as its dense model: (path, message)."""
    if not config.upcycle.run:
        return []
    found, router, moe = [], config.router, config.moe
    path = Path(config.upcycle.run)
    dense = _saved(path)
    if dense is None:
        found.append(("upcycle.run", f"must be the directory of a dense run, got {str(path)!r}"))
    elif dense["moe"]["num_experts"]:
        found.append(
            ("upcycle.run", f"must be a dense run (moe.num_experts=0), {str(path)!r} has experts")
        )
    else:
        found += [
            (f"model.{name}", f"must be {value}, as in upcycle.run, got {config.model[name]}")
            for name, value in dense["model"].items()
            if name in _SHARED and config.model[name] != value
        ]
        found += _tokens(config, dense)
        found += _shards(config, dense["model"]["dense_width"])
        if not _has_checkpoint(path / "checkpoints"):
            found.append(
                ("upcycle.run", f"must be a finished run, {str(path)!r} has no checkpoint")
            )
    if not moe.num_experts:
        found.append(("moe.num_experts", "must be above 0 to upcycle a dense run"))
        return found
    if not weights_sum(config):
        message = "must give weights of a constant sum to equal the dense model: top_k (or a relative) with renormalise"
        found.append(
            ("router.kind", f"{message} and k > 1, or post-selection softmax; got {router.kind}")
        )
    if moe.activation != "swiglu":
        message = "must be swiglu to equal the dense model, which has no other"
        found.append(("moe.activation", f"{message}; got {moe.activation}"))
    if moe.capacity_factor or moe.slots_per_expert:
        found.append(
            ("moe.capacity_factor", "must be 0 to equal the dense model: dropped tokens lose it")
        )
    return found


# Fields of the model that shape what is copied.
_SHARED = ("num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "tied_head")


def _saved(path: Path) -> dict | None:
    """The saved config of a run, or None."""
    try:
        return json.loads((path / "config.json").read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError):
        return None


def _tokens(config, dense: dict) -> list[tuple[str, str]]:
    """Fields by which the runs' tokens differ, as far as configs tell: what is in a file only the run itself sees."""
    mine = {name: config[name].to_dict() for name in ("data", "tokenizer")}
    names = [("tokenizer", name) for name in mine["tokenizer"]]
    if "tokens" in (mine["data"]["kind"], dense["data"]["kind"]):
        names = [("data", name) for name in ("kind", "vocab_size", "end_id")]
    elif mine["tokenizer"]["kind"] == "bpe" and mine["data"]["kind"] == dense["data"]["kind"]:
        names.append(("data", "domains"))  # of the corpus: what the merges were learned on
    found = []
    for section, name in names:
        ours, theirs = mine[section].get(name), dense[section].get(name)
        if None in (ours, theirs):
            continue  # a field of one kind alone, and the kinds are compared
        if sorted(theirs) != sorted(ours) if name == "domains" else theirs != ours:
            message = f"must be {theirs}, as in upcycle.run, whose tokens are copied; got {ours}"
            found.append((f"{section}.{name}", message))
    return found


def _shards(config, dense_width: int) -> list[tuple[str, str]]:
    """What keeps the dense feed-forward from being cut into shards that the experts share evenly."""
    moe, found = config.moe, []
    if (moe.num_dense_layers or moe.every > 1) and config.model.dense_width != dense_width:
        wanted = f"must be {dense_width}, as in upcycle.run, for the layers without experts"
        found.append(("model.dense_width", f"{wanted}; got {config.model.dense_width}"))
    shards, rest = divmod(dense_width, max(1, moe.expert_width))
    if rest:
        message = (
            f"must divide {dense_width}, the dense width of upcycle.run, got {moe.expert_width}"
        )
        return [*found, ("moe.expert_width", message)]
    counts = {"moe.num_experts": moe.num_experts, "router.k": config.router.k}
    message = f"must be divisible by {shards}, the shards of the dense width {dense_width}, got"
    return found + [(path, f"{message} {n}") for path, n in counts.items() if n % shards]


def _has_checkpoint(path: Path) -> bool:
    """Whether a step there can be read, by its manifest: arrays are hashed when the run reads them."""
    for step in path.glob("[0-9]*"):
        try:
            return bool(manifest.read_manifest(path, int(step.name)))
        except (manifest.DamagedError, ValueError):
            continue
    return False


def weights_sum(config) -> float:
    """The sum of each token's combine weights if it is a constant, else 0."""
    router = config.router
    if router.kind not in ("top_k", "group_limited"):
        return 0.0
    after = not router.score_before_selection and router.score == "softmax"
    constant = after or (router.renormalise and router.k > 1)
    return router.scale if constant else 0.0


def params(config, model: model_lib.Transformer, fresh: Any, dense_model, dense: Any) -> Any:
    """Returns the sparse model's parameters, started from a dense model's.

    Args:
      config: of the sparse run; `problems` is empty.
      model: the sparse model.
      fresh: its freshly drawn parameters; routers are taken from them.
      dense_model: the dense model.
      dense: its parameters.

    Raises:
      ConfigError: shapes that do not go together; names the first.
    """
    old = list(restack.blocks(dense_model, dense))
    new = [
        _block(config, block, mine, theirs)
        for block, mine, theirs in zip(
            _configs(model), restack.blocks(model, fresh), old, strict=False
        )
    ]
    if len(old) != len(list(_configs(model))):
        raise ConfigError(f"upcycle.run has {len(old)} layers, model.num_layers is {len(new)}")
    rest = {n: dense[n] for n in dense if not n.startswith("segment_")}
    mine = {n: fresh[n] for n in fresh if not n.startswith("segment_")}
    if set(rest) != set(mine):
        raise ConfigError("upcycle.run has another head: set model.tied_head as it has")
    jax.tree.map_with_path(_check, mine, rest)
    return rest | restack.stacked(model, new)


def _block(config, block: blocks.BlockConfig, fresh: dict, dense: dict) -> dict:
    if "dense" not in dense:
        raise ConfigError("upcycle.run has experts; it must be a dense run (moe.num_experts=0)")
    shared = {n: dense[n] for n in ("attention", "attention_norm", "feed_forward_norm")}
    jax.tree.map_with_path(_check, {n: fresh[n] for n in shared}, shared)
    if block.moe is None:
        _check("dense", fresh["dense"]["down"], dense["dense"]["down"])
        return shared | {"dense": dense["dense"]}
    return shared | {"moe": _moe(config, block, fresh["moe"], dense["dense"])}


def _moe(config, block: blocks.BlockConfig, fresh: dict, dense: dict) -> dict:
    num_experts, width = block.moe.router.num_experts, block.moe.expert_width
    dense_width = dense["down"].shape[1]
    shards, rest = divmod(dense_width, width)
    if rest or num_experts % max(shards, 1) or config.router.k % max(shards, 1):
        raise ConfigError(
            f"moe.expert_width={width} must divide the dense width {dense_width}, and the quotient must divide "
            f"moe.num_experts={num_experts} and router.k={config.router.k}"
        )
    gate, up = jnp.split(dense["gate_up"], 2, axis=0)
    gate_up = [
        jnp.concatenate([part[i * width : (i + 1) * width] for part in (gate, up)])
        for i in range(shards)
    ]
    scale = shards / weights_sum(config)
    down = [dense["down"][:, i * width : (i + 1) * width] * scale for i in range(shards)]
    copies = num_experts // shards
    new = dict(fresh)
    new["experts"] = {"gate_up": jnp.stack(gate_up * copies), "down": jnp.stack(down * copies)}
    if "shared" in fresh:  # they add nothing yet
        new["shared"] = fresh["shared"] | {"down": jnp.zeros_like(fresh["shared"]["down"])}
    if config.upcycle.virtual_groups and shards > 1:
        kernel = fresh["router"]["kernel"][:, ::shards]
        new["router"] = fresh["router"] | {"kernel": jnp.repeat(kernel, shards, axis=1)}
    return new


def _check(name, mine, theirs) -> None:
    shapes = (getattr(mine, "shape", None), theirs.shape)
    if shapes[0] != shapes[1]:
        label = name if isinstance(name, str) else jax.tree_util.keystr(name)
        raise ConfigError(
            f"upcycle.run does not fit: {label} is {shapes[1]} there and {shapes[0]} here"
        )


def _configs(model: model_lib.Transformer):
    for segment in model.segments:
        yield from segment.blocks * segment.count
