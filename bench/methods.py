"""Makes experiments/README.md from the runs of the routing and balancing methods of experiments/.

    moelab sweep --config=ablation --sweep=routing --seeds=0-2 --jobs=2 --workdir=runs/methods --drop_checkpoints
    moelab sweep --config=ablation --sweep=balance --seeds=0-2 --jobs=2 --workdir=runs/methods --drop_checkpoints
    python bench/methods.py [--workdir runs/methods]

Writes a small JSON per method to experiments/baselines/ and the tables: bits per byte as a difference to the folder's
reference, with seeds paired. With one seed the interval is over documents, and says so. Entries of seeds whose run
directory is not here stay as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import batch  # noqa: E402
import numpy as np  # noqa: E402

from moelab import config as configs  # noqa: E402
from moelab import diagnostics, metrics, model, sweep_file  # noqa: E402
from moelab.report import documents  # noqa: E402
from moelab.report import statistics as intervals  # noqa: E402

REFERENCE = {"balance": "balance/switch_loss", "routing": "routing/top_k"}
BOUNDS = ("routing/oracle", "routing/uniform")
PRECISION = "float32"
TAIL = 0.2  # share of the steps, the last ones, over which training figures are averaged


def methods() -> list[str]:
    """folder/name of every method, the references first."""
    found = [
        path.relative_to(ROOT / "experiments").with_suffix("").as_posix()
        for folder in REFERENCE
        for path in sorted((ROOT / "experiments" / folder).glob("*.py"))
    ]
    return sorted(found, key=lambda name: (name not in REFERENCE.values(), name))


def finished(workdir: Path) -> dict[tuple[str, int], Path]:
    """The run directories of a sweep's finished points, by method and seed."""
    if not sweep_file.is_sweep(workdir):
        return {}
    points = (p for p in sweep_file.read(workdir).points if p.status == sweep_file.FINISHED)
    split = ((point.name.rpartition("-seed="), point.directory) for point in points)
    return {(method, int(seed)): workdir / name for (method, _, seed), name in split}


def summary(target: Path, seed: int) -> dict:
    """What a run's card and journal say, as the tables want it."""
    card = json.loads((target / "result.json").read_text())
    row = next(r for r in card["evaluation"]["rows"] if r["precision"] == PRECISION)
    train = [r for r in metrics.read(target / "metrics.jsonl") if r["kind"] == "train"]
    tail = [r["router"] for r in train[-max(1, int(TAIL * len(train))) :]]
    config = card["config"]
    tokens = config["train"]["batch_size"] * config["train"]["length"]

    def mean(name):
        values = [value for router in tail for value in router.get(name, ())]
        return statistics.fmean(values) if values else None

    assigned = mean("assigned")
    return {
        "seed": seed,
        "schema": configs.schema_of(target),
        "config_sha256": card["config_sha256"],
        "commit": card["environment"].get("git", {}),
        "bits_per_byte": row["bits_per_byte"],
        "loss": row["loss"],
        "max_violation": statistics.fmean(row["max_violation"]),
        "max_violation_batch": mean("max_violation"),
        "entropy": mean("entropy"),
        "dead_experts": mean("dead_experts"),
        "dropped_share": mean("dropped_share"),
        "idle_share": mean("idle_share"),
        "log_sum_exp": mean("log_sum_exp"),
        "specialisation": _specialisation(card["evaluation"]["load_by_domain"]),
        "experts_per_token": assigned / tokens if assigned else None,
        "parameters": card["parameters"],
        "train_seconds": card["training"]["train_seconds"],
        "leak": model.from_config(configs.from_dict(config), 4096).leak,
    }


def _specialisation(share_MGE: list) -> float | None:
    """Mutual information of expert and domain in nats, domains weighted equally, mean over layers."""
    if not share_MGE:
        return None
    return float(diagnostics.mutual_information(np.asarray(share_MGE)).mean())


def collect(options) -> int:
    """Writes the summaries and the tables; returns the exit code."""
    runs = finished(options.workdir)
    found = {method: entries for method in methods() if (entries := _entries(runs, method))}
    for method, entries in found.items():
        target = _baseline(method)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    batch.replace_generated(ROOT / "experiments" / "README.md", "methods", tables(found))
    picture(found, ROOT / "experiments" / "methods.png")
    return 0


def _baseline(method: str) -> Path:
    return ROOT / "experiments" / "baselines" / f"{method}.json"


def _entries(runs: dict[tuple[str, int], Path], method: str) -> list[dict]:
    """The method's summaries by seed: of the runs that are here, and of earlier ones from the baselines."""
    path = _baseline(method)
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    entries = {entry["seed"]: entry for entry in known}
    reference = REFERENCE[method.partition("/")[0]]
    for seed, target in ((s, path) for (name, s), path in runs.items() if name == method):
        entries[seed] = summary(target, seed)
        other = runs.get((reference, seed), Path()) / documents.NAME
        if method != reference and other.is_file():
            pair = [documents.read(path) for path in (other, target / documents.NAME)]
            difference = intervals.bits_per_byte_between(*pair, PRECISION)
            entries[seed]["difference"] = difference._asdict()
    # Under another schema of configs the same config is another experiment: it is not averaged with these.
    newest = max((entry.get("schema", 1) for entry in entries.values()), default=1)
    kept = [seed for seed in sorted(entries) if entries[seed].get("schema", 1) == newest]
    if len(kept) < len(entries):
        left = sorted(entries.keys() - set(kept))
        print(
            f"{method}: seeds {left} are of an earlier schema of configs: left out", file=sys.stderr
        )
    return [entries[seed] for seed in kept]


HEAD = (
    "| method | seeds | bits per byte | difference to the reference [95 %] | MaxVio, test set | MaxVio, batch | "
    "MI with domain, nats | dropped | experts per token | log-sum-exp |"
)


def tables(found: dict) -> str:
    """The tables of both folders, best first, bounds and leaking methods apart."""
    parts = []
    for folder, reference in REFERENCE.items():
        mine = {m: e for m, e in found.items() if m.startswith(folder)}
        groups = {
            f"`{folder}/`, against `{reference}`": [m for m in mine if not _apart(m, mine[m])],
            f"`{folder}/`: bounds and methods that see later tokens (not comparable)": [
                m for m in mine if _apart(m, mine[m])
            ],
        }
        for title, names in groups.items():
            if names:
                # By the paired difference: rows of different seeds have means that do not compare.
                names.sort(key=lambda m: _pairs(mine[m], mine.get(reference, []))[1])
                rows = [_row(m, mine[m], mine.get(reference, [])) for m in names]
                rule = "|" + " --- |" * (HEAD.count("|") - 1)
                parts.append("\n".join([f"### {title}", "", HEAD, rule, *rows, ""]))
    return "\n".join(parts)


def _apart(method: str, entries: list[dict]) -> bool:
    return method in BOUNDS or any(entry["leak"] for entry in entries)


def _mean(entries: list[dict], name: str) -> float | None:
    values = [e[name]["all"] if name == "bits_per_byte" else e[name] for e in entries]
    values = [value for value in values if value is not None]
    return statistics.fmean(values) if values else None


def _row(method: str, entries: list[dict], reference: list[dict]) -> str:
    def text(name, form):
        value = _mean(entries, name)
        return "" if value is None else format(value, form)

    cells = [
        f"`{method.partition('/')[2]}`" + (" *" if any(e["leak"] for e in entries) else ""),
        str(len(entries)),
        text("bits_per_byte", ".4f"),
        _difference(entries, reference),
        text("max_violation", ".2f"),
        text("max_violation_batch", ".2f"),
        text("specialisation", ".3f"),
        text("dropped_share", ".1%"),
        text("experts_per_token", ".2f"),
        text("log_sum_exp", ".2f"),
    ]
    return "| " + " | ".join(cells) + " |"


def _pairs(entries: list[dict], reference: list[dict]) -> tuple[list[tuple[float, float]], float]:
    """(reference, method) bits per byte of the seeds that both have, and the mean difference."""
    base = {e["seed"]: e["bits_per_byte"]["all"] for e in reference}
    pairs = [(base[e["seed"]], e["bits_per_byte"]["all"]) for e in entries if e["seed"] in base]
    return pairs, statistics.fmean(b - a for a, b in pairs) if pairs else math.inf


def _difference(entries: list[dict], reference: list[dict]) -> str:
    pairs, _ = _pairs(entries, reference)
    if not pairs or entries == reference:
        return "reference" if entries == reference else ""
    if len(pairs) > 1:
        paired = intervals.paired_t(*zip(*pairs, strict=True))
        return f"{paired.mean:+.4f} [{paired.low:+.4f}, {paired.high:+.4f}]"
    one = next((e["difference"] for e in entries if "difference" in e), None)
    return (
        f"{one['estimate']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}] (documents)" if one else ""
    )


def picture(found: dict, path: Path) -> None:
    """Draws each method's difference to its reference and its MaxVio; bounds and what is far off are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, 2, figsize=(13, 14), layout="constrained", height_ratios=(3, 4)
    )
    for (left, right), (folder, reference) in zip(axes, REFERENCE.items(), strict=True):
        mine = {m: e for m, e in found.items() if m.startswith(folder) and m not in BOUNDS}
        base = mine[reference]
        pairs = {m: _pairs(e, base)[0] for m, e in mine.items() if m != reference}
        rows = [
            (m, intervals.paired_t(*zip(*p, strict=True))) for m, p in pairs.items() if len(p) > 1
        ]
        rows = sorted((row for row in rows if abs(row[1].mean) < 0.1), key=lambda row: row[1].mean)
        place = range(len(rows))
        star = [" *" if any(e["leak"] for e in mine[m]) else "" for m, _ in rows]
        names = [m.partition("/")[2] + mark for (m, _), mark in zip(rows, star, strict=True)]
        error = [[t.mean - t.low for _, t in rows], [t.high - t.mean for _, t in rows]]
        left.errorbar([t.mean for _, t in rows], place, xerr=error, fmt="o", ms=5, color="#2a6f97")
        left.axvline(0, color="black", lw=0.8)
        left.set_yticks(place, names)
        left.set_xlabel(f"bits per byte more than {reference} (95 %, paired over seeds)")
        violation = [_mean(mine[m], "max_violation") for m, _ in rows]
        right.barh(place, violation, color="#a8c5da")
        right.set_yticks(place, [])
        right.set_xlabel("MaxVio on the test set")
        for axis in (left, right):
            axis.set_ylim(len(rows) - 0.5, -0.5)
            axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=90)


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "methods")
    return collect(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
