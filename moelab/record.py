"""Ends a run: evaluates the last state, writes the documents' table, the card and the report."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from moelab import balancing, data, environment, evaluate, metrics, report, schema, scoring, size
from moelab import config as configs
from moelab.progress import note
from moelab.report import card as cards
from moelab.report import documents


def finished_card(workdir: Path, config) -> dict[str, Any] | None:
    """Returns the card of a finished run of this config, or None."""
    if not (workdir / cards.NAME).is_file():
        return None
    card = cards.read(workdir)
    return card if card["config_sha256"] == configs.sha256(config) else None


def conclude(session, config_file: str, overrides: list[str], command: str) -> dict[str, Any]:
    """Evaluates `session.state` on the test split and writes everything that a finished run has.

    Args:
      session: train._Session after its last step.
      config_file, overrides, command: recorded in the card.

    Returns:
      The card.
    """
    config, dataset, workdir = session.config, session.dataset, session.workdir
    names = config.evaluation.precisions
    started = time.perf_counter()
    note(f"evaluating {len(names)} precisions on the test split")
    state = session.state
    done = evaluate.evaluate(config, state.params, state.router_state, dataset, "test", names)
    section = evaluate.section(config, dataset, "test", done)
    if config.evaluation.tasks:
        note(f"asking {len(config.evaluation.tasks)} tasks in each of them")
        section["tasks"] = scoring.answer(
            config,
            state.params,
            state.router_state,
            dataset,
            config.evaluation.tasks,
            [
                row["precision"]
                for row in section["rows"]
                if row["precision"] in (evaluate.REFERENCE, *names)
            ],
        )
    section["baselines"] = {"kneser_ney_bigram": _bigram(config, dataset, session.batches)}
    documents.write(workdir / documents.NAME, done.columns)
    num_steps = config.train.num_steps
    session.event("finished", num_steps, {"evaluation_seconds": time.perf_counter() - started})
    session.journal.close()
    train_records = [r for r in metrics.read(session.journal.path) if r["kind"] == "train"]
    last = train_records[-1]
    summary = size.count(config, dataset.tokenizer.vocab_size)
    card = cards.build(
        workdir,
        name=Path(config_file.partition(":")[0]).stem or workdir.name,
        command=command,
        config=configs.record(config)["config"],
        config_sha256=configs.sha256(config),
        overrides=overrides,
        seeds={"seed": config.seed},
        environment=environment.describe() | {"mesh": dict(session.mesh.shape)},
        data=_data(dataset) | _passes(config, session.batches),
        parameters=summary["parameters"],
        leak=session.model.leak,
        group=session.model.group,
        bound=bound(config),
        training={
            "steps": num_steps,
            "tokens": last["tokens"],
            "train_seconds": last["seconds"],
            "wall_seconds": last["seconds"] + time.perf_counter() - started,
            "final_loss": last["loss"],
            "flops_per_token": summary["flops_per_token"]["train"],
            "nonfinite_steps": last["nonfinite_steps"],
            "attempts": session.attempts,
        },
        evaluation=section,
        checkpoint={"step": num_steps, "digest": session.digest()},
    )
    cards.write(card, workdir)
    report.render_run(workdir)
    return card


def _bigram(config, dataset, train_batches) -> dict[str, float]:
    """The Kneser-Ney bigram fitted on exactly the windows that the model saw, on the same test documents."""
    seen = (train_batches[step] for step in range(config.train.num_steps))
    return data.kneser_ney.bits_per_byte(
        dataset, seen, evaluate.batches_of(config, dataset, "test")
    )


def bound(config) -> str:
    """Says why a run is never ranked with others; empty where it may be."""
    if not config.moe.num_experts or config.moe.slots_per_expert:
        return ""
    ranked = balancing.router_of(config).ranked
    return (
        ""
        if ranked
        else f"router.kind={config.router.kind} routes by what it is given or by chance"
    )


def _passes(config, batches) -> dict[str, Any]:
    """How often the run saw its text, where the config says anything about that."""
    if dict(config.mixture) == dataclasses.asdict(schema.Mixture()):
        return {}
    return {"mixture": batches.passes(config.train.num_steps)}


def _data(dataset) -> dict[str, Any]:
    manifest = dataset.manifest
    return {
        "sha256": manifest["sha256"],
        "tokenizer_sha256": dataset.tokenizer.sha256,
        "fallback": manifest["fallback"],
        "domains": list(dataset.domains),
        "tokens": {
            name: sum(counts["tokens"] for counts in split["domains"].values())
            for name, split in manifest["splits"].items()
        },
    } | ({"quality": _quality(manifest["quality"])} if "quality" in manifest else {})


def _quality(found: dict[str, Any]) -> dict[str, Any]:
    """What a reader wants of dirt and filters; domains, labels and reasons one by one are in the dataset's manifest."""
    keys = ("filter", "documents", "removed", "bytes", "removed_bytes")
    keys += ("precision", "recall", "clean_removed", "auc")
    outcomes = [{key: one[key] for key in keys} for one in found["outcomes"]]
    same = ("inject", "filter", "packages", "kept_labels")
    return {key: found[key] for key in same} | {"outcomes": outcomes}
