"""Shapes of published models and two hypothetical ones, each with the parameters that its makers state."""

from __future__ import annotations

from moelab import spelling
from moelab.errors import UserError
from moelab.plan.figures import Source
from moelab.plan.models import Attention, Model


def _card(name: str, date: str) -> Source:
    return Source(f"Hugging Face, number of parameters in the safetensors of {name}", date)


def _config(name: str, date: str, status: str = "vendor") -> Source:
    return Source(f"config.json of {name}", date, status)


_GPT_OSS = Source("gpt-oss model card, arXiv:2508.10925, table 1", "2025-08")
_MLA = {"head_dim": 192, "kv_lora": 512, "nope": 128, "rope": 64, "v_dim": 128}
_HYPOTHETICAL = Source("a moelab extrapolation of Kimi K2's proportions", "2026-11", "assumed")


def _gqa(heads: int, kv_heads: int, head_dim: int = 128, **more) -> Attention:
    return Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim, **more)


def _mla(heads: int, q_lora: int) -> Attention:
    return Attention(heads=heads, kv_heads=heads, q_lora=q_lora, **_MLA)


def _gpt_oss(name: str, layers: int, experts: int, total: int) -> Model:
    attention = _gqa(64, 8, 64, window=128, windowed=layers // 2, bias=True, sinks=True)
    return Model(
        name=name,
        layers=layers,
        width=2880,
        vocab=201088,
        attention=attention,
        experts=experts,
        k=4,
        expert_width=2880,
        bias=True,
        source=_config(f"openai/{name.replace('_', '-')}", "2025-08"),
        published_total=total,
        published=_GPT_OSS,
    )


_LIST = (
    Model(
        name="mixtral_8x7b",
        layers=32,
        width=4096,
        vocab=32000,
        attention=_gqa(32, 8),
        experts=8,
        k=2,
        expert_width=14336,
        source=_config("mistralai/Mixtral-8x7B-v0.1", "2023-12"),
        published_total=46_702_792_704,
        published=_card("mistralai/Mixtral-8x7B-v0.1", "2023-12"),
    ),
    Model(
        name="mixtral_8x22b",
        layers=56,
        width=6144,
        vocab=32768,
        attention=_gqa(48, 8),
        experts=8,
        k=2,
        expert_width=16384,
        source=_config("mistralai/Mixtral-8x22B-Instruct-v0.1", "2024-04"),
        published_total=140_630_071_296,
        published=_card("mistralai/Mixtral-8x22B-Instruct-v0.1", "2024-04"),
    ),
    Model(
        name="olmoe",
        layers=16,
        width=2048,
        vocab=50304,
        attention=_gqa(16, 16, qk_norm="layer"),
        experts=64,
        k=8,
        expert_width=1024,
        source=Source("arXiv:2409.02060, table 10, and the parameters of the card", "2024-09"),
        published_total=6_919_161_856,
        published=_card("allenai/OLMoE-1B-7B-0924", "2024-09"),
    ),
    Model(
        name="qwen3_30b",
        layers=48,
        width=2048,
        vocab=151936,
        attention=_gqa(32, 4, qk_norm="head"),
        experts=128,
        k=8,
        expert_width=768,
        source=_config("Qwen/Qwen3-30B-A3B", "2025-04"),
        published_total=30_532_122_624,
        published=_card("Qwen/Qwen3-30B-A3B", "2025-04"),
    ),
    Model(
        name="qwen3_235b",
        layers=94,
        width=4096,
        vocab=151936,
        attention=_gqa(64, 4, qk_norm="head"),
        experts=128,
        k=8,
        expert_width=1536,
        source=_config("Qwen/Qwen3-235B-A22B", "2025-04"),
        published_total=235_093_634_560,
        published=_card("Qwen/Qwen3-235B-A22B", "2025-04"),
    ),
    _gpt_oss("gpt_oss_20b", 24, 32, 20_910_000_000),
    _gpt_oss("gpt_oss_120b", 36, 128, 116_830_000_000),
    Model(
        name="deepseek_v3",
        layers=61,
        dense_layers=3,
        width=7168,
        vocab=129280,
        attention=_mla(128, 1536),
        dense_width=18432,
        experts=256,
        k=8,
        expert_width=2048,
        shared_width=2048,
        groups=8,
        group_limit=4,
        router_bias=True,
        mtp=1,
        source=_config("deepseek-ai/DeepSeek-V3", "2024-12"),
        published_total=671_026_419_200,
        published=Source("arXiv:2412.19437 (671B), exact from the safetensors", "2024-12"),
    ),
    Model(
        name="kimi_k2",
        layers=61,
        dense_layers=1,
        width=7168,
        vocab=163840,
        attention=_mla(64, 1536),
        dense_width=18432,
        experts=384,
        k=8,
        expert_width=2048,
        shared_width=2048,
        router_bias=True,
        source=_config("moonshotai/Kimi-K2-Instruct", "2025-07"),
        published_total=1_026_408_232_448,
        published=_card("moonshotai/Kimi-K2-Instruct", "2025-07"),
    ),
    Model(
        name="hypothetical_5t",
        layers=80,
        dense_layers=2,
        width=10240,
        vocab=163840,
        attention=_mla(128, 2048),
        dense_width=27648,
        experts=768,
        k=8,
        expert_width=2688,
        shared_width=2688,
        source=_HYPOTHETICAL,
    ),
    Model(
        name="hypothetical_10t",
        layers=96,
        dense_layers=2,
        width=12288,
        vocab=163840,
        attention=_mla(160, 2048),
        dense_width=32768,
        experts=1024,
        k=8,
        expert_width=2816,
        shared_width=2816,
        source=_HYPOTHETICAL,
    ),
)
MODELS = {model.name: model for model in _LIST}


class ModelError(UserError):
    """A model that there is not, or a config that is not understood."""


def find(name: str) -> Model:
    """Returns a published or hypothetical model.

    Raises:
      ModelError: there is none; the message names the nearest.
    """
    key = name.lower().replace("-", "_").replace(".", "_")
    key = {"deepseek_r1": "deepseek_v3", "mixtral": "mixtral_8x7b"}.get(key, key)
    if key not in MODELS:
        hint = spelling.hint(key, MODELS) or f"; there are {', '.join(MODELS)}"
        raise ModelError(f"no model {name!r}{hint}, or a config.json, or a moelab config")
    return MODELS[key]
