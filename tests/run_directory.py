"""A small run directory made up in code: random, but every number of its card follows from its files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from moelab import metrics, schema
from moelab.report import card as cards
from moelab.report import documents

DOMAINS = ("wiki_en", "code", "verse")
PRECISIONS = (  # name, label, weights, activations, nats added per token, bytes of expert weights
    ("float32", "float32", "float32", None, 0.0, 12_582_912),
    ("bf16", "bfloat16", "bf16", None, 0.0004, 6_291_456),
    ("fp8_w", "FP8 weights", "fp8_channel", None, 0.0021, 3_170_304),
    ("fp8_wa", "FP8 weights and activations", "fp8_channel", "fp8_tensor", 0.0043, 3_170_304),
    ("mxfp4_w", "MXFP4 weights", "mxfp4", None, 0.031, 1_671_168),
    ("mxfp4_wa", "MXFP4 weights and activations", "mxfp4", "mxfp4", 0.065, 1_671_168),
    ("nvfp4_w", "NVFP4 weights", "nvfp4", None, 0.017, 1_769_520),
    ("nvfp4_wa", "NVFP4 weights and activations", "nvfp4", "nvfp4", 0.034, 1_769_520),
)
LAYERS = (0, 1)


def make(
    directory: Path,
    *,
    seed: int = 0,
    steps: int = 40,
    experts: int = 8,
    config: dict | None = None,
    config_sha256: str = "ab" * 32,
    documents_per_domain: int = 12,
    shift: float = 0.0,
    name: str = "demo",
) -> Path:
    """Writes config.json, metrics.jsonl, evaluation/documents.parquet and result.json."""
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    config = config if config is not None else {"seed": seed, "train": {"num_steps": steps}}
    recorded = {"schema": schema.SCHEMA, "config_sha256": config_sha256, "config": config}
    recorded |= {"file": "experiments/demo.py", "overrides": [f"--config.seed={seed}"]}
    (directory / "config.json").write_text(json.dumps(recorded))
    records = _journal(rng, steps, experts)
    with metrics.MetricsWriter(directory / "metrics.jsonl") as writer:
        for record in records:
            writer.write(record)
    # The documents are the same whatever the seed: runs that are compared share the evaluation set.
    columns = _documents(np.random.default_rng(7), documents_per_domain, 0.05 * seed + shift)
    documents.write(directory / documents.NAME, columns)
    last = next(r for r in reversed(records) if r["kind"] == "train")
    card = cards.build(
        directory,
        name=name,
        command=f"moelab run --config=experiments/demo.py --config.seed={seed}",
        config=config,
        config_sha256=config_sha256,
        overrides=recorded["overrides"],
        seeds={"seed": seed},
        environment=_environment(),
        data={
            "sha256": "cd" * 32,
            "tokenizer_sha256": "ef" * 32,
            "fallback": False,
            "domains": list(DOMAINS),
            "tokens": {"train": 3_581_200},
        },
        parameters={"total": 14_826_752, "active": 3_816_704, "expert": 12_582_912},
        training={
            "steps": steps,
            "tokens": last["tokens"],
            "wall_seconds": 171.25,
            "train_seconds": 141.5,
            "final_loss": last["loss"],
            "flops_per_token": 22_900_000,
            "nonfinite_steps": 1,
            "attempts": 2,
        },
        evaluation=_evaluation(rng, documents.read(directory / documents.NAME), experts),
        checkpoint={"step": steps, "digest": "12" * 32},
        created="2026-08-31T12:00:00+00:00",
    )
    cards.write(card, directory)
    return directory


def _journal(rng: np.random.Generator, steps: int, experts: int) -> list[dict]:
    records = [{"kind": "event", "step": 0, "event": "started", "detail": {}}]
    skew_LE = rng.normal(0, 0.9, (len(LAYERS), experts))
    for step in range(1, steps + 1):
        progress = step / steps
        loss = 3.1 + 5.2 * math.exp(-5 * progress) + rng.normal(0, 0.06)
        skipped = step == steps // 3
        logits_LE = skew_LE * (1.3 - progress) + rng.normal(0, 0.12, skew_LE.shape)
        load_LE = np.exp(logits_LE) / np.exp(logits_LE).sum(-1, keepdims=True)
        records.append(
            {
                "kind": "train",
                "step": step,
                "loss": math.nan if skipped else loss,
                "balance": {"switch": 1.02},
                "total_loss": loss + 0.01,
                "learning_rate": 3e-3 * (1 - progress),
                "gradient_norm": 0.8,
                "tokens": step * 4096,
                "tokens_per_second": 18_000.0,
                "seconds": step * 0.7,
                "skipped": skipped,
                "nonfinite_steps": int(step >= steps // 3),
                "router": _router(load_LE),
            }
        )
        if step == steps // 2:
            records.append({"kind": "event", "step": step, "event": "resumed", "detail": {}})
        if step % max(1, steps // 5) == 0:
            records.append(
                {
                    "kind": "evaluation",
                    "step": step,
                    "split": "validation",
                    "precision": "float32",
                    "loss": loss + 0.08,
                    "bits_per_byte": {"all": loss / 3},
                    "router": _router(load_LE),
                }
            )
    records.append({"kind": "event", "step": steps, "event": "finished", "detail": {}})
    return records


def _router(load_LE: np.ndarray) -> dict:
    return {
        "layers": list(LAYERS),
        "load": load_LE,
        "max_violation": metrics.max_violation(load_LE),
        "entropy": metrics.normalized_entropy(load_LE),
        "dead_experts": metrics.dead_experts(load_LE),
        "dropped_share": np.zeros(len(LAYERS)),
        "logit_norm": np.full(len(LAYERS), 2.5),
    }


def _documents(rng: np.random.Generator, per_domain: int, shift: float) -> dict[str, list]:
    columns: dict[str, list] = {name: [] for name in documents.SCHEMA.names}
    for d, domain in enumerate(DOMAINS):
        for i in range(per_domain):
            size = int(rng.integers(300, 9000))
            tokens = size // 3 + 1
            base = tokens * (3.0 + 0.4 * d + rng.normal(0, 0.15) + shift)
            for name, _, _, _, extra, _ in PRECISIONS:
                nats = base if name == "float32" else base + tokens * extra * rng.normal(1, 0.4)
                row = (name, domain, f"{domain}/{i}", nats, size, tokens)
                for key, value in zip(columns, row, strict=True):
                    columns[key].append(value)
    return columns


def _evaluation(rng: np.random.Generator, table: documents.Documents, experts: int) -> dict:
    rows = []
    for name, label, weights, activations, extra, size in PRECISIONS:
        rows.append(
            {
                "precision": name,
                "label": label,
                "weights": weights,
                "activations": activations,
                "loss": table.loss(name),
                "loss_delta": table.loss(name) - table.loss("float32"),
                "bits_per_byte": table.bits_per_byte(name),
                "expert_bytes": size,
                "router_agreement": 1.0 - 2 * extra,
                "max_violation": [0.31, 0.22],
            }
        )
    load_LDE = rng.dirichlet(np.full(experts, 2.0), (len(LAYERS), len(DOMAINS)))
    bits = table.bits_per_byte("float32")
    return {
        "split": "test",
        "tokens": int(table.tokens_D.sum()),
        "documents": len(table.document_D),
        "domains": list(DOMAINS),
        "rows": rows,
        "baselines": {"kneser_ney_bigram": {key: value * 1.12 for key, value in bits.items()}},
        "load_by_domain": load_LDE,
        "layers": list(LAYERS),
    }


def _environment() -> dict:
    return {
        "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
        "packages": {"jax": "0.12.0.1", "numpy": "2.3.0"},
        "python": "3.12.1",
        "platform": "Linux",
        "cpu": "Example CPU <model> & co",
        "cores": 2,
        "devices": {"kind": "cpu", "count": 1},
        "mesh": {"data": 1},
        "xla_flags": "--xla_cpu_experimental_ynn_fusion_type=",
        "jax": {"enable_x64": False},
    }
