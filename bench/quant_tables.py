"""What the runs of quant_study.py say: numbers with intervals, Markdown tables, a picture.

Every interval is Student's t over paired seeds: post-training rows are differences to the same checkpoint in float32,
training rows to the control of the same seed. The documents are the same for all, and what others would give is not in
the intervals.
"""

from __future__ import annotations

import json
import statistics as plain_statistics
from pathlib import Path

import quant_study as study

from moelab.quant import recipes
from moelab.report import statistics

ALL = "all"
# (a, b): is b better than a? Paired directly, which two intervals against float32 do not tell.
CONTRASTS = (
    ("mxfp4", "nvfp4"),
    ("nvfp4", "nvfp4_46"),
    ("int4", "nvfp4"),
    ("mxfp4_floor", "mxfp4_even"),
    ("mxfp4", "mxfp4_even"),
    ("mxfp4_ceil", "mxfp4"),
)


def gather(workdir: Path) -> dict:
    """Returns per model the seeds, the reference's bits per byte, and the rows of each table."""
    found = {}
    for model in study.MODELS:
        seeds = [s for s in range(100) if _card(workdir, model, "", s) is not None]
        if not seeds:
            continue
        formats = _formats(workdir, model, seeds)
        found[model] = {
            "seeds": seeds,
            "float32": [_bits(_card(workdir, model, "", s), "float32") for s in seeds],
            "formats": formats,
            "contrasts": _contrasts(formats),
            "methods": _methods(workdir, model, seeds),
            "training": _training(workdir, model, seeds, formats),
        }
    return found


def _card(workdir: Path, model: str, method: str, seed: int) -> dict | None:
    path = study.directory(workdir, model, method, seed) / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _row(card: dict, precision: str) -> dict:
    return next(row for row in card["evaluation"]["rows"] if row["precision"] == precision)


def _bits(card: dict, precision: str) -> float:
    return _row(card, precision)["bits_per_byte"][ALL]


def _formats(workdir: Path, model: str, seeds: list[int]) -> list[dict]:
    """Round to nearest in every format, on the high-precision runs."""
    cards = [_card(workdir, model, "", s) for s in seeds]
    rows = []
    for name in (row["precision"] for row in cards[0]["evaluation"]["rows"]):
        if name == "float32":
            continue
        by_seed = [_bits(c, name) - _bits(c, "float32") for c in cards]
        own = [_row(card, name) for card in cards]
        rows.append(
            {
                "precision": name,
                "label": recipes.get(name).label,
                "difference": _t(by_seed),
                "by_seed": by_seed,
                "expert_bytes": own[0]["expert_bytes"],
                "router_agreement": plain_statistics.fmean(r["router_agreement"] for r in own),
            }
        )
    return rows


def _contrasts(formats: list[dict]) -> list[dict]:
    """Round to nearest, format against format."""
    by_seed = {row["precision"]: row["by_seed"] for row in formats}
    rows = []
    for a, b in CONTRASTS:
        for ending in ("w", "wa"):
            names = f"{a}_{ending}", f"{b}_{ending}"
            if by_seed.keys() >= set(names):
                pairs = zip(*(by_seed[name] for name in names), strict=True)
                difference = _t([y - x for x, y in pairs])
                rows.append({"a": names[0], "b": names[1], "difference": difference})
    return rows


def _methods(workdir: Path, model: str, seeds: list[int]) -> list[dict]:
    """Post-training methods: what `moelab quantize` wrote."""
    rows = []
    for format in study.FORMATS:
        for method in study.METHODS:
            folders = [study.post_training(workdir, model, method, format, s) for s in seeds]
            paths = [folder / "quality.json" for folder in folders]
            if not all(path.is_file() for path in paths):
                continue
            reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
            for scheme in study.SCHEMES:
                rows.append(
                    {"format": format, "method": method, "scheme": scheme}
                    | _method(reports, scheme)
                )
    return rows


def _method(reports: list[dict], scheme: str) -> dict:
    found = [next(r for r in report["rows"] if r["name"] == scheme) for report in reports]
    by_seed = [r["bits_per_byte_difference"]["estimate"] for r in found]
    return {
        "difference": _t(by_seed),
        "by_seed": by_seed,
        "kl": plain_statistics.fmean(r["kl"]["mean"] for r in found),
    }


def _t(difference: list[float]) -> dict:
    """The mean over seeds and its t interval; without one for a single seed."""
    if len(difference) < 2:
        return {"estimate": difference[0], "low": None, "high": None}
    found = statistics.paired_t([0.0] * len(difference), difference)
    return {"estimate": found.mean, "low": found.low, "high": found.high}


def _training(workdir: Path, model: str, seeds: list[int], formats: list[dict]) -> dict:
    """Continued and low-precision training, each against its control on the seeds that both have."""
    rows = []
    for method in (*study.CONTINUED, *study.FROM_NOTHING):
        control = _control(method)
        pairs = [
            (_card(workdir, model, control, s), _card(workdir, model, method, s)) for s in seeds
        ]
        pairs = [pair for pair in pairs if None not in pair]
        if not pairs:
            continue
        for precision in (r["precision"] for r in pairs[0][1]["evaluation"]["rows"]):
            if method == "more" and precision == "float32":
                continue
            mine = [_bits(b, precision) for _, b in pairs]
            by_seed = [bits - _bits(a, "float32") for bits, (a, _) in zip(mine, pairs, strict=True)]
            rows.append(
                {
                    "method": method,
                    "control": control,
                    "precision": precision,
                    "seeds": len(pairs),
                    "bits_per_byte": plain_statistics.fmean(mine),
                    "difference": _t(by_seed),
                    "by_seed": by_seed,
                }
            )
    return {"rows": rows, "recovered": _recovered(rows, formats)}


def _control(method: str) -> str:
    """What a method is compared with: as many more steps on the data, but the teacher where that is all it learns."""
    return "more" if method in study.CONTINUED and not method.endswith("qad") else ""


def _recovered(rows: list[dict], formats: list[dict]) -> list[dict]:
    """Share of the control's rounding loss that each continued method takes back: 1 - its loss / the control's."""
    by = {(r["method"], r["precision"]): r for r in rows}
    by |= {("", r["precision"]): r for r in formats}
    found = []
    for format in study.FORMATS:
        for scheme in ("w", "wa"):
            for kind in ("qat", "qad"):
                base = by.get((_control(f"{format}_{kind}"), f"{format}_{scheme}"))
                row = by.get((f"{format}_{kind}", f"{format}_{scheme}"))
                if base is None or row is None or len(row["by_seed"]) != len(base["by_seed"]):
                    continue
                pairs = zip(row["by_seed"], base["by_seed"], strict=True)
                saved = _t([b - a for a, b in pairs])
                lost = plain_statistics.fmean(base["by_seed"])
                found.append(
                    {
                        "method": row["method"],
                        "precision": row["precision"],
                        "saved": saved,
                        "share": saved["estimate"] / lost,
                    }
                )
    return found


def _text(interval: dict) -> str:
    if interval["low"] is None:
        return f"{interval['estimate']:+.4f}"
    return f"{interval['estimate']:+.4f} [{interval['low']:+.4f}, {interval['high']:+.4f}]"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def tables(found: dict) -> str:
    """All tables as Markdown."""
    models = list(found)
    heads = [f"{m}: difference in bits per byte [95 %]" for m in models]
    return "\n".join(
        [
            _reference(found),
            *_format_tables(found, models, heads),
            "#### Round to nearest: format against format\n",
            _contrast_table(found, models, heads),
            "#### Post-training methods\n",
            _method_table(found, models, heads),
            "#### Training\n",
            _training_table(found, models, heads),
            "#### What quantization-aware training takes back of the control's rounding loss\n",
            _recovered_table(found, models),
            "",
        ]
    )


def _reference(found: dict) -> str:
    parts = [
        f"{m} {plain_statistics.fmean(f['float32']):.4f} ({len(f['seeds'])} seeds)"
        for m, f in found.items()
    ]
    return f"float32, bits per byte: {'; '.join(parts)}.\n"


def _format_tables(found: dict, models: list[str], heads: list[str]) -> list[str]:
    parts = []
    titles = {
        "_w": "weights of the experts alone",
        "_wa": "weights and activations of the experts",
        "_kv": "key-value cache alone",
        "": "the whole model",
    }
    first = found[models[0]]["formats"]
    for ending, title in titles.items():
        names = [r["precision"] for r in first if _ending(r["precision"]) == ending]
        if not names:
            continue
        rows = []
        for name in names:
            mine = [_find(found[m]["formats"], precision=name) for m in models]
            size = first[0]["expert_bytes"] and mine[0]["expert_bytes"]
            rows.append(
                [f"`{name}`", *(_text(r["difference"]) for r in mine), f"{size:,}"]
                + [f"{mine[0]['router_agreement']:.1%}"]
            )
        rows.sort(key=lambda row: float(row[1].split()[0]))
        head = ["round to nearest", *heads, f"experts, bytes ({models[0]})"]
        head.append(f"same experts chosen ({models[0]})")
        parts += [f"#### Round to nearest: {title}\n", _markdown(head, rows)]
    return parts


def _ending(name: str) -> str:
    return next((e for e in ("_wa", "_kv", "_w") if name.endswith(e)), "")


def _find(rows: list[dict], **wanted) -> dict | None:
    return next((r for r in rows if all(r[k] == v for k, v in wanted.items())), None)


def _cell(row: dict | None) -> str:
    return "" if row is None else _text(row["difference"])


def _contrast_table(found: dict, models: list[str], heads: list[str]) -> str:
    rows = []
    for row in found[models[0]]["contrasts"]:
        mine = [_find(found[m]["contrasts"], a=row["a"], b=row["b"]) for m in models]
        rows.append([f"`{row['b']}`", f"`{row['a']}`", *map(_cell, mine)])
    return _markdown(["format", "against", *heads], rows)


def _method_table(found: dict, models: list[str], heads: list[str]) -> str:
    rows = []
    for scheme, ending in zip(study.SCHEMES, ("w", "wa"), strict=True):
        for format in study.FORMATS:
            nearest = [_find(found[m]["formats"], precision=f"{format}_{ending}") for m in models]
            rows.append([scheme, format, "rtn", *map(_cell, nearest), ""])
            for method in study.METHODS:
                key = dict(scheme=scheme, format=format, method=method)
                mine = [_find(found[m]["methods"], **key) for m in models]
                kl = "" if mine[0] is None else f"{mine[0]['kl']:.5f}"
                rows.append([scheme, format, method, *map(_cell, mine), kl])
    head = ["scheme", "format", "method", *heads, f"KL, nats per token ({models[0]})"]
    return _markdown(head, rows)


def _training_table(found: dict, models: list[str], heads: list[str]) -> str:
    rows = []
    first = found[models[0]]["training"]["rows"]
    for row in first:
        key = dict(method=row["method"], precision=row["precision"])
        mine = [_find(found[m]["training"]["rows"], **key) for m in models]
        against = "`more`" if row["control"] else "the float32 run"
        rows.append([f"`{row['method']}`", f"`{row['precision']}`", against, *map(_cell, mine)])
    return _markdown(["training", "evaluated as", "against (in float32)", *heads], rows)


def _recovered_table(found: dict, models: list[str]) -> str:
    rows = []
    for row in found[models[0]]["training"]["recovered"]:
        key = dict(method=row["method"], precision=row["precision"])
        mine = [_find(found[m]["training"]["recovered"], **key) for m in models]
        cells = []
        for one in mine:
            cells += ["", ""] if one is None else [f"{one['share']:.0%}", _text(one["saved"])]
        rows.append([f"`{row['method']}`", f"`{row['precision']}`", *cells])
    head = ["method", "evaluated as"]
    for model in models:
        head += [f"{model}: share taken back", f"{model}: bits per byte saved [95 %]"]
    return _markdown(head, rows)


def picture(found: dict, path: Path) -> None:
    """Draws the rounding loss by format, weights alone and with activations, for every model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models, endings = list(found), ("_w", "_wa")
    figure, axes = pyplot.subplots(
        1, len(models), figsize=(6 * len(models), 5), sharex=True, layout="constrained"
    )
    for axis, model in zip(axes if len(models) > 1 else [axes], models, strict=True):
        rows = found[model]["formats"]
        names = [r["precision"][:-2] for r in rows if r["precision"].endswith("_w")]
        for offset, (ending, label, colour) in enumerate(
            zip(endings, ("weights", "weights + activations"), ("#2a6f97", "#c1440e"), strict=True)
        ):
            mine = [(i, _find(rows, precision=name + ending)) for i, name in enumerate(names)]
            mine = [(i + 0.25 * offset, r["difference"]) for i, r in mine if r is not None]
            y, values = [i for i, _ in mine], [d["estimate"] for _, d in mine]
            low = [max(0.0, d["estimate"] - d["low"]) for _, d in mine]
            high = [max(0.0, d["high"] - d["estimate"]) for _, d in mine]
            axis.errorbar(values, y, xerr=[low, high], fmt="o", color=colour, label=label, ms=4)
        axis.axvline(0, color="black", lw=0.8)
        axis.set_yticks([i + 0.125 for i in range(len(names))], names)
        axis.invert_yaxis()
        axis.set_xlabel("bits per byte more than float32 (95 %)")
        axis.set_title(f"{model}, {len(found[model]['seeds'])} seeds")
        axis.grid(axis="x", alpha=0.3)
    axes_first = axes[0] if len(models) > 1 else axes
    axes_first.legend(loc="lower right")
    figure.savefig(path, dpi=110)
