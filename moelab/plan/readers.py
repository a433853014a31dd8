"""Reads model shapes from a Hugging Face `config.json` or from a moelab experiment config."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from moelab.plan import published
from moelab.plan.figures import Source
from moelab.plan.models import Attention, Model
from moelab.plan.published import ModelError

_LATENT = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "glm_moe_dsa")
_GROUPED = (
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "gpt_oss",
    "minimax_m2",
    "qwen3_vl_moe_text",
    "qwen3_5_moe_text",
    "llama",
    "mistral",
    "qwen3",
    "qwen3_vl_text",
    "qwen3_5_text",
)
_NORMS = {"olmoe": "layer", "minimax_m2": "layer"} | {
    name: "head" for name in _GROUPED if name.startswith("qwen3")
}
FAMILIES = (*_LATENT, *_GROUPED)


def model(text: str) -> Model:
    """Finds a model by name, or reads it from a `config.json`, a checkpoint folder, a moelab config or run.

    Raises:
      ModelError: none of these; the message names the nearest.
    """
    path = Path(text)
    if path.is_dir() and (path / "config.json").is_file():
        path = path / "config.json"
    if path.suffix == ".json":
        return _from_json(path)
    try:
        return published.find(text)
    except ModelError:
        from moelab import config_file

        bare = text.partition(":")[0]
        if bare.endswith(".py") or bare in {name for name, _ in config_file.files()}:
            return from_experiment(text)
        raise


def _from_json(path: Path) -> Model:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ModelError(f"{path} is no JSON: {error}") from None
    if isinstance(read, dict) and "config" in read and "model_type" not in read:
        return from_experiment(str(path))  # of a moelab run
    if not isinstance(read, dict):
        raise ModelError(f"{path} wants a JSON object, got {type(read).__name__}")
    return from_hugging_face(read, path.stem.removesuffix("_config"), str(path.name))


def from_hugging_face(config: Mapping, name: str, where: str = "config.json") -> Model:
    """Makes a shape of the fields of a `config.json`.

    Args:
      config: its object; where the language model is nested in `text_config`, that is read.
      name: to call the model.
      where: for messages and the source.

    Raises:
      ModelError: an architecture that is not known here, or a field that is missing or cannot be.
    """
    fields = dict(config.get("text_config") or config)
    fields.setdefault("tie_word_embeddings", config.get("tie_word_embeddings", False))
    family = fields.get("model_type", "")
    if family not in FAMILIES:
        raise ModelError(
            f"{where}: model_type {family!r} is not known here; there are {', '.join(FAMILIES)}"
        )
    try:
        return _checked(_shape(fields, family, name, where))
    except KeyError as error:
        raise ModelError(f"{where}: a {family} config wants the field {error}") from None
    except (TypeError, ValueError) as error:
        raise ModelError(f"{where}: {error}") from None


def _checked(m: Model) -> Model:
    """Returns a shape whose sizes can be.

    Raises:
      ValueError: one that cannot; the message names it.
    """
    a = m.attention
    for part in (m, a):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if field.type == "int" and (type(value) is not int or value < 0):
                raise ValueError(f"{field.name} wants a whole number from 0, got {value!r}")
    for name, value in {
        "layers": m.layers,
        "width": m.width,
        "vocab": m.vocab,
        "heads": a.heads,
        "kv_heads": a.kv_heads,
        "head_dim": a.head_dim,
        **({"dense_width": m.dense_width} if m.dense_layers else {}),
        **({"expert_width": m.expert_width} if m.experts else {}),
    }.items():
        if not value:
            raise ValueError(f"{name} wants a number above 0, got 0")
    if m.experts and not 1 <= m.k <= m.experts:
        raise ValueError(f"a token wants 1 to {m.experts} experts, got {m.k}")
    if m.dense_layers > m.layers or a.windowed + a.linear > m.layers:
        raise ValueError(f"more layers of one kind than the {m.layers} that there are")
    if a.heads % a.kv_heads:
        raise ValueError(f"{a.heads} heads cannot share {a.kv_heads} of keys and values equally")
    if m.experts % m.groups or m.group_limit > m.groups:
        raise ValueError(
            f"{m.experts} experts cannot be in {m.groups} groups, {m.group_limit} used"
        )
    return m


def _shape(f: Mapping, family: str, name: str, where: str) -> Model:
    experts = _first(f, "n_routed_experts", "num_local_experts", "num_experts", default=0)
    layers, width = f["num_hidden_layers"], f["hidden_size"]
    expert_width = f.get("moe_intermediate_size") or f["intermediate_size"]
    shared = f.get("n_shared_experts") or 0
    shared_width = shared * expert_width or f.get("shared_expert_intermediate_size") or 0
    dense = f.get("first_k_dense_replace", len(f.get("mlp_only_layers") or ()))
    latent = family in _LATENT
    return Model(
        name=name,
        layers=layers,
        width=width,
        vocab=f["vocab_size"],
        attention=_latent(f) if latent else _grouped(f, family, layers, width),
        dense_layers=dense if experts else layers,
        dense_width=f["intermediate_size"] if dense or not experts else 0,
        experts=experts,
        k=_first(f, "num_experts_per_tok", "experts_per_token") if experts else 0,
        expert_width=expert_width if experts else 0,
        shared_width=shared_width,
        shared_gate=bool(shared_width) and family in ("qwen2_moe", "qwen3_5_moe_text"),
        groups=f.get("n_group") or 1,
        group_limit=f.get("topk_group") or 1,
        bias=family == "gpt_oss",
        router_bias=latent or family == "minimax_m2",
        tied=bool(f.get("tie_word_embeddings", False)),
        mtp=f.get("num_nextn_predict_layers", 0) or 0,
        source=Source(where, "2026-11"),
    )


def _first(fields: Mapping, *names: str, default=None):
    for name in names:
        if fields.get(name) is not None:
            return fields[name]
    if default is None:
        raise KeyError(names[0])
    return default


def _latent(f: Mapping) -> Attention:
    return Attention(
        heads=f["num_attention_heads"],
        kv_heads=f["num_attention_heads"],
        head_dim=f["qk_nope_head_dim"] + f["qk_rope_head_dim"],
        kv_lora=f["kv_lora_rank"],
        q_lora=f.get("q_lora_rank") or 0,
        nope=f["qk_nope_head_dim"],
        rope=f["qk_rope_head_dim"],
        v_dim=f["v_head_dim"],
        top_keys=f.get("index_topk") or 0,
        index_heads=f.get("index_n_heads") or 0,
        index_dim=f.get("index_head_dim") or 0,
    )


def _grouped(f: Mapping, family: str, layers: int, width: int) -> Attention:
    heads = f["num_attention_heads"]
    kinds = list(f.get("layer_types") or ())[:layers]
    window = f.get("sliding_window") or 0
    windowed = kinds.count("sliding_attention") if window else 0
    linear = kinds.count("linear_attention")
    gated = {}
    if linear:
        gated = {
            "linear": linear,
            "linear_key_heads": f["linear_num_key_heads"],
            "linear_value_heads": f["linear_num_value_heads"],
            "linear_dim": f["linear_value_head_dim"],
            "linear_conv": f["linear_conv_kernel_dim"],
        }
    return Attention(
        heads=heads,
        kv_heads=f.get("num_key_value_heads") or heads,
        head_dim=f.get("head_dim") or width // heads,
        window=window if windowed else 0,
        windowed=windowed,
        bias=bool(f.get("attention_bias", False)),
        sinks=family == "gpt_oss",
        gate=bool(f.get("attn_output_gate", False)),
        qk_norm=_NORMS.get(family, ""),
        **gated,
    )


def from_experiment(text: str) -> Model:
    """Makes a shape of a moelab config file or run directory.

    Raises:
      UserError: no such config, or a layer that this planner has no shape for.
    """
    from moelab import config as configs

    config = configs.load(text).config
    return of_config(config, configs.vocab_size(config), text)


def of_config(config, vocab: int, name: str) -> Model:
    """Makes a shape of a loaded moelab config.

    Args:
      config: an expanded ConfigDict.
      vocab: token ids that the model is made for.
      name: to call the model.
    """
    m, moe = config.model, config.moe
    if moe.slots_per_expert:
        raise ModelError(f"{name}: Soft MoE mixes tokens into slots; the planner has no such layer")
    first = moe.num_dense_layers
    sparse = len(range(first + moe.every - 1, m.num_layers, moe.every)) if moe.num_experts else 0
    return Model(
        name=name,
        layers=m.num_layers,
        dense_layers=m.num_layers - sparse,
        width=m.width,
        vocab=vocab,
        attention=Attention(heads=m.num_heads, kv_heads=m.num_kv_heads, head_dim=m.head_dim),
        dense_width=m.dense_width if sparse < m.num_layers else 0,
        experts=moe.num_experts,
        k=getattr(config.router, "k", 1) if moe.num_experts else 0,
        expert_width=moe.expert_width if moe.num_experts else 0,
        shared_width=moe.num_shared_experts * moe.expert_width,
        tied=m.tied_head,
        source=Source(f"moelab config {name}", "2026-11"),
    )
