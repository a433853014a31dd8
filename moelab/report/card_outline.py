"""What kinds of values a result card must hold within its sections, where reports read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moelab.report import outline

_ROW = "evaluation.rows.*"
_TASK = "evaluation.tasks.rows.*"
_TRAINING = (
    "steps tokens wall_seconds train_seconds final_loss flops_per_token nonfinite_steps attempts"
)

PLACES = {
    "seeds.seed": "whole!",
    "environment.git": "object?",
    "environment.git.commit": "text?",
    "environment.git.diff_sha256": "text?",
    "environment.packages": "object?",
    "environment.cpu": "text?",
    "environment.simd": "text?",
    "environment.cores": "number?",
    "environment.devices": "object?",
    "environment.devices.kind": "text?",
    "data.sha256": "text?",
    "data.tokenizer_sha256": "text?",
    "data.fallback": "flag?",
    "data.domains": "list?",
    "data.tokens": "object?",
    "data.tokens.*": "number?",
    "data.mixture": "object?",
    "data.mixture.epochs": "number!",
    "data.mixture.unique_tokens": "number!",
    "data.mixture.streams": "list",
    "data.mixture.streams.*": "object",
    "data.mixture.streams.*.domain": "text?!",
    "data.mixture.streams.*.bucket": "text?!",
    "data.mixture.streams.*.epochs": "number?!",
    "data.quality": "object?",
    "data.quality.inject": "list!",
    "data.quality.inject.*": "text",
    "data.quality.outcomes": "list!",
    "data.quality.outcomes.*": "object",
    **{f"data.quality.outcomes.*.{key}": "number!" for key in ("documents", "removed")},
    **{f"data.quality.outcomes.*.{key}": "number?!" for key in ("precision", "recall")},
    "data.quality.outcomes.*.filter": "text!",
    **{f"parameters.{key}": "number" for key in ("total", "active", "expert")},
    **{f"training.{key}": "number?" for key in _TRAINING.split()},
    "evaluation.split": "text?",
    "evaluation.tokens": "number?",
    "evaluation.documents": "number?",
    "evaluation.domains": "list?",
    "evaluation.domains.*": "text",
    f"{_ROW}.label": "text?",
    f"{_ROW}.bits_per_byte.*": "number?",
    **{
        f"{_ROW}.{key}": "number?"
        for key in ("loss", "loss_delta", "expert_bytes", "router_agreement")
    },
    f"{_ROW}.max_violation": "list?",
    f"{_ROW}.max_violation.*": "number?",
    "evaluation.baselines": "object?",
    "evaluation.baselines.*": "object",
    "evaluation.baselines.*.*": "number?",
    "evaluation.tasks": "object?",
    "evaluation.tasks.rows": "list?",
    _TASK: "object",
    **{f"{_TASK}.{key}": "text!" for key in ("task", "measure", "precision", "unit")},
    **{f"{_TASK}.{key}": "number?!" for key in ("value", "low", "high", "chance", "n")},
    "evaluation.tasks.left_out": "object",
    "evaluation.tasks.dropped": "object",
    "evaluation.layers": "list?",
    "evaluation.load_by_domain": "list?",
    "evaluation.load_by_domain.*": "list",
    "evaluation.load_by_domain.*.*": "list",
    "evaluation.load_by_domain.*.*.*": "number?",
    **{
        f"config.{key}": "object?"
        for key in "model moe router balance quantization upcycle data evaluation train".split()
    },
    "config.moe.num_experts": "finite",
    "config.moe.expert_width": "finite",
    "config.model.width": "finite",
    "config.router.k": "finite",
    "config.train.accumulation_steps": "finite",
    "config.balance.*": "object",
    "config.balance.*.coefficient": "finite",
    "config.balance.*.rate": "finite",
    "config.quantization.recipe": "text",
    "config.quantization.format": "text",
    "config.quantization.roles": "list",
    "config.quantization.roles.*": "text",
    "config.quantization.teacher": "text!",
    **{
        f"config.quantization.{key}": "finite!"
        for key in ("start_step", "end_step", "first_layers", "last_layers")
    },
    "config.data.inject": "list?",
    "config.data.inject.*": "words",
    "config.data.filter": "list?",
    "config.data.filter.*": "words",
    "config.evaluation.tasks": "list?",
    "config.evaluation.tasks.*": "text",
}


def problems(card: Mapping[str, Any]) -> list[str]:
    """Lists what of a card with all its sections and rows reports cannot read, one line each."""
    found = outline.problems(card, PLACES)
    return found if found else [*_precisions(card["evaluation"]), *_shares(card["evaluation"])]


def _precisions(evaluation: Mapping[str, Any]) -> Iterator[str]:
    names = [row["precision"] for row in evaluation["rows"]]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield f"evaluation.rows has the precision {name!r} {names.count(name)} times"


def _shares(evaluation: Mapping[str, Any]) -> Iterator[str]:
    shares, layers = (evaluation.get(key) or [] for key in ("load_by_domain", "layers"))
    domains = {len(by_domain) for by_domain in shares}
    experts = {len(share) for by_domain in shares for share in by_domain}
    if shares and (len(shares) != len(layers) or len(domains) > 1 or len(experts) > 1):
        yield "evaluation.load_by_domain wants layers x domains x experts"
