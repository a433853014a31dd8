"""What a report says about a run in words: key figures, warnings, and the sections of facts."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from moelab.report import formatting as fmt
from moelab.report import statistics
from moelab.report.runs import Run

Pairs = list[tuple[str, str]]


def key_figures(run: Run) -> list[tuple[str, str, str]]:
    """Lists (label, value, detail) of the figures that head a report."""
    card = run.card
    parameters, training = card["parameters"], card["training"]
    bits = (run.reference or {}).get("bits_per_byte") or {}
    total, active = parameters.get("total"), parameters.get("active")
    share = fmt.number(active) / fmt.number(total) if active and total else None
    rate = None
    if training.get("tokens") and training.get("train_seconds"):
        rate = fmt.number(training["tokens"]) / fmt.number(training["train_seconds"])
    return [
        ("bits per byte", fmt.fixed(bits.get("all"), 4), "float32, all domains"),
        ("parameters", fmt.compact(total), "all experts"),
        ("active parameters", fmt.compact(active), f"{fmt.percent(share, 0)} of all"),
        ("training tokens", fmt.compact(training.get("tokens")), f"{fmt.count(rate)} per second"),
        ("steps", fmt.count(training.get("steps")), _loss_detail(training)),
        ("wall time", fmt.duration(training.get("wall_seconds")), _machine(card)),
    ]


def _loss_detail(training: dict[str, Any]) -> str:
    return f"last loss {fmt.fixed(training.get('final_loss'), 4)} nats per token"


def _machine(card: dict[str, Any]) -> str:
    devices = card["environment"].get("devices") or {}
    cores = card["environment"].get("cores")
    return f"{devices.get('count', '?')} × {devices.get('kind', '?')}, {cores} cores"


def warnings(run: Run) -> list[str]:
    """Lists what a reader must know before trusting the numbers, loudest first."""
    card, found = run.card, list(run.notes)
    if card.get("leak"):
        found.insert(
            0,
            f"Not causal: {card['leak']}. The loss of a token may use what comes after it, so its "
            "numbers do not compare with those of causal models.",
        )
    if card.get("bound"):
        found.insert(
            0,
            f"Bound, not ranked: {card['bound']}. It shows what a choice can be worth; it is no method.",
        )
    if card["data"].get("fallback"):
        found.insert(
            0,
            "Fallback corpus: the extra `data` was not installed, so the run read the standard "
            "library's text. Its numbers do not compare with those of the five-domain corpus.",
        )
    if card.get("group") == "micro-batch of a device":
        found.append(
            "Tokens compete within a micro-batch of a device: more or fewer of them give other results."
        )
    git = card["environment"].get("git") or {}
    if git.get("dirty"):
        sha = str(git.get("diff_sha256"))[:12]
        found.append(f"The working tree had uncommitted changes (diff SHA-256 {sha}).")
    skipped = fmt.number(card["training"].get("nonfinite_steps"))
    if skipped:
        found.append(f"{fmt.count(skipped)} training step(s) with a non-finite loss were skipped.")
    attempts = fmt.number(card["training"].get("attempts"))
    if attempts and attempts > 1:
        found.append(f"The run was resumed: it took {fmt.count(attempts)} attempts.")
    return found


def result_note(run: Run) -> str:
    """Says what the result table was measured on and how its intervals were made."""
    evaluation = run.card["evaluation"]
    text = (
        f"Measured on {fmt.count(evaluation.get('documents'))} documents "
        f"({fmt.count(evaluation.get('tokens'))} tokens) of the {evaluation.get('split')} split; "
        "the same documents and tokens for every precision. "
    )
    if run.documents is not None:
        text += (
            f"Intervals: paired bootstrap, {statistics.RESAMPLES} resamples of whole documents "
            f"within their domain, percentile method, seed {statistics.SEED}; they cover the choice "
            "of documents, not the training seed. "
        )
    return text + "Router agreement: share of tokens whose top-k set is unchanged from float32."


def sections(run: Run) -> list[tuple[str, Pairs]]:
    """Lists (heading, facts) of what the numbers stand on."""
    return [
        ("Training", _training(run.card)),
        ("Data", _data(run.card)),
        ("Environment", _environment(run.card)),
        ("Digests", _digests(run.card)),
    ]


def _training(card: dict[str, Any]) -> Pairs:
    training, parameters = card["training"], card["parameters"]
    flops = fmt.number(training.get("flops_per_token"))
    return [
        ("seeds", ", ".join(f"{k} {v}" for k, v in card["seeds"].items())),
        ("steps", fmt.count(training.get("steps"))),
        ("tokens", fmt.count(training.get("tokens"))),
        ("precision", training_precision(card["config"])),
        ("last training loss", fmt.fixed(training.get("final_loss"), 4, suffix=" nats per token")),
        ("skipped non-finite steps", fmt.count(training.get("nonfinite_steps"))),
        ("attempts", fmt.count(training.get("attempts"))),
        ("wall time", fmt.duration(training.get("wall_seconds"))),
        ("of it, training", fmt.duration(training.get("train_seconds"))),
        ("training FLOPs per token", fmt.compact(flops)),
        ("parameters", fmt.count(parameters.get("total"))),
        ("active parameters", fmt.count(parameters.get("active"))),
        ("expert parameters", fmt.count(parameters.get("expert"))),
    ]


def training_precision(config: dict[str, Any]) -> str:
    """Says what training computed in: the model's dtype, the recipe, when and where it held, the teacher."""
    quantization = config.get("quantization") or {}  # cards of earlier versions have none
    words = [str((config.get("model") or {}).get("dtype", "unknown"))]
    recipe = quantization.get("recipe", "none")
    if recipe == "none" and not quantization.get("roles"):
        return words[0]
    words.append(" ".join([recipe, *quantization.get("roles", ())]))
    start, end = quantization["start_step"], quantization["end_step"]
    if start or end:
        words.append(f"in steps {start + 1} to {end or 'the last'}")
    kept = [f"{quantization[k + '_layers']} {k}" for k in ("first", "last")]
    if quantization["first_layers"] or quantization["last_layers"]:
        words.append(f"but for the {' and '.join(kept)} layers")
    if quantization["teacher"]:
        words.append(f"distilled from {quantization['teacher']}")
    return ", ".join(words)


def _data(card: dict[str, Any]) -> Pairs:
    data = card["data"]
    known = ("sha256", "tokenizer_sha256", "fallback", "domains", "tokens", "quality", "mixture")
    rest = [(key, _value(value)) for key, value in data.items() if key not in known]
    return [
        ("domains", ", ".join(map(str, data.get("domains") or ())) or fmt.NOT_MEASURED),
        ("tokens", _value(data.get("tokens"))),
        ("fallback corpus", {True: "yes", False: "no"}.get(data.get("fallback"), "unknown")),
        ("data SHA-256", _value(data.get("sha256"))),
        ("tokenizer SHA-256", _value(data.get("tokenizer_sha256"))),
        *_quality(data.get("quality") or {}),
        *_passes(data.get("mixture") or {}),
        *rest,
    ]


def _quality(quality: dict[str, Any]) -> Pairs:
    """What was injected into the training split, and what each filter made of it."""
    if not quality:
        return []
    pairs = [("injected", "; ".join(quality["inject"]) or "nothing")]
    for one in quality["outcomes"]:
        numbers = (
            f"{key} {fmt.fixed(one[key], 3)}"
            for key in ("precision", "recall")
            if one[key] is not None
        )
        removed = f"removed {fmt.count(one['removed'])} of {fmt.count(one['documents'])} documents"
        pairs.append((f"filter {one['filter']}", ", ".join([removed, *numbers])))
    return pairs


def _passes(mixture: dict[str, Any]) -> Pairs:
    """How often the run saw its text, in all and by part."""
    if not mixture:
        return []
    tokens = fmt.count(mixture["unique_tokens"])
    pairs = [("unique tokens", f"{tokens}, {fmt.fixed(mixture['epochs'], 3)} epochs")]
    for one in mixture.get("streams", ()):
        name = " ".join(filter(None, (one["domain"], one["bucket"])))
        pairs.append((f"drawn of {name}", f"{fmt.fixed(one['epochs'], 3)} epochs"))
    return pairs


def _environment(card: dict[str, Any]) -> Pairs:
    return [(key.replace("_", " "), _value(value)) for key, value in card["environment"].items()]


def _digests(card: dict[str, Any]) -> Pairs:
    checkpoint = card["checkpoint"]
    return [
        ("card", _value(card["card_sha256"])),
        ("config", _value(card["config_sha256"])),
        (f"checkpoint of step {checkpoint.get('step')}", _value(checkpoint.get("digest"))),
        *((name, _value(sha)) for name, sha in card["files"].items()),
    ]


def _value(value: Any) -> str:
    if value is None or value == "":
        return fmt.NOT_MEASURED if value is None else "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return fmt.count(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def verify_command(run: Run) -> str:
    """Writes the command that re-checks the run; a path outside the working directory by its name only."""
    directory = run.directory.resolve()
    here = Path.cwd()
    path = directory.relative_to(here) if directory.is_relative_to(here) else directory.name
    return f"moelab verify {shlex.quote(str(path))}"


def bibtex(run: Run) -> str:
    """Writes a BibTeX entry that pins the run by its digests."""
    card = run.card
    key = "".join(c for c in str(card["name"]) if c.isalnum()) + str(card["card_sha256"])[:8]
    title = str(card["name"]).translate(str.maketrans("", "", "{}\\"))
    return (
        f"@misc{{{key},\n"
        f"  title = {{moelab run {title}}},\n"
        f"  year = {{{str(card['created'])[:4]}}},\n"
        f"  note = {{config SHA-256 {card['config_sha256']},\n"
        f"          card SHA-256 {card['card_sha256']}}},\n"
        "}\n"
    )
