"""`moelab plan`: what serving a model would cost on GPUs that are not here."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
from pathlib import Path

from moelab.cli import output
from moelab.errors import UserError

COLUMNS = ("system", "precision", "tp", "dp", "ep", "pp", "batch", "ms/token [80 %]", "tok/s/user")
COLUMNS += ("tok/s/GPU", "first token ms", "GB/GPU", "$/M tok", "J/tok", "range")
SHOWN = 7  # rows of a front in a table; JSON has them all


def years(text: str) -> float:
    """Reads a date as years after 2026-01-01."""
    try:
        day = datetime.date.fromisoformat(text)
    except ValueError:
        raise UserError(f"a date of software wants YYYY-MM-DD, got {text!r}") from None
    return (day - datetime.date(2026, 1, 1)).days / 365.25


def paired(systems, precisions) -> list[tuple[str, str]]:
    """Gives every system its precision: one for all, or one each.

    Raises:
      UserError: other numbers.
    """
    if not systems or len(precisions) not in (1, len(systems)):
        raise UserError(
            f"--precision wants one recipe, or one per system: {len(systems)} systems, {len(precisions)} recipes"
        )
    spread = precisions * len(systems) if len(precisions) == 1 else precisions
    return list(zip(systems, spread, strict=True))


def serve(args: argparse.Namespace) -> int:
    """Searches layouts and batches and prints the front of speed and throughput."""
    from moelab.plan import coverage, hardware, readers, recipes, search
    from moelab.plan.serving import Load

    model = readers.model(args.model)
    p_E = None
    if args.routes:
        from moelab import trace

        p_E = coverage.of_trace(trace.load(args.routes), model.experts, model.k)
    load = Load(
        args.isl,
        args.osl,
        draft=args.draft,
        acceptance=args.acceptance,
        overlap=args.overlap,
        disaggregated=args.mode == "disaggregated",
        p_E=p_E,
    )
    options = search.Options(
        engine=args.engine,
        years=years(args.software),
        most_ttft=args.most_ttft / 1e3 or math.inf,
        most_tpot=args.most_tpot / 1e3 or math.inf,
    )
    results, costs = [], []
    for name, precision in paired(args.hardware, args.precision):
        system = hardware.system(name)
        results.append(search.search(model, recipes.named(precision), system, load, options))
        costs.append(price_of(system.gpu.name, args.price))
    notes = _notes(results, costs, args, options)
    if args.json:
        output.print_json(_plain(results, costs, args, notes))
        return 0
    rows = [
        row
        for found, price in zip(results, costs, strict=True)
        for row in _rows(found, price, args)
    ]
    output.print_table(COLUMNS, rows)
    for line in _equal_speed(results, costs, args):
        print(line)
    for note in notes:
        output.note(note)
    if args.out:
        from moelab.plan import pages

        lines = [*_equal_speed(results, costs, args), *notes]
        Path(args.out).write_text(pages.serving(results, COLUMNS, rows, lines), encoding="utf-8")
        output.note(f"wrote {args.out}")
    return 0


def price_of(gpu: str, basis: str):
    """Returns the price, or None where there is none of this basis: the rest is worth printing."""
    from moelab.plan import prices

    try:
        return prices.find(gpu, basis)
    except prices.PriceError as error:
        if basis not in prices.BASES:
            raise
        output.note(f"no cost: {error}")
        return None


def _costs(row: dict, found, price, args) -> dict:
    from moelab.plan import prices

    rate = row["gpu_tokens_per_s"]
    dollars = None if price is None else prices.per_million(price.value, rate, args.utilisation)
    return {
        "dollars_per_million": dollars,
        "joules_per_token": prices.joules(found.system.gpu.power.value, rate),
    }


def _chosen(found) -> list[int]:
    """Picks rows of the front, evenly."""
    front = found.front().tolist()
    if len(front) <= SHOWN:
        return front
    return [front[round(i * (len(front) - 1) / (SHOWN - 1))] for i in range(SHOWN)]


def _rows(found, price, args) -> list[tuple]:
    rows = []
    for i in _chosen(found):
        row = found.row(i)
        cost = _costs(row, found, price, args)
        dollars = cost["dollars_per_million"]
        rows.append(
            (
                found.system.name,
                found.recipe.name,
                *(row[n] for n in ("tp", "dp", "ep", "pp", "batch")),
                f"{row['tpot_ms']:.1f} [{row['tpot_ms_low']:.1f}, {row['tpot_ms_high']:.1f}]",
                f"{row['user_tokens_per_s']:.1f}",
                f"{row['gpu_tokens_per_s']:.0f}",
                f"{row['ttft_ms']:.0f}",
                f"{row['used_bytes'] / 1e9:.0f}",
                "-" if dollars is None else f"{dollars:.2f}",
                f"{cost['joules_per_token']:.3g}",
                "outside" if row["outside_calibrated_range"] else "ok",
            )
        )
    return rows


def _equal_speed(results, costs, args) -> list[str]:
    """Compares the systems at one speed: throughput, cost, and the price ratio at which they break even."""
    from moelab.plan import prices

    if not args.user:
        return []
    lines, best = [], []
    for found, price in zip(results, costs, strict=True):
        index = found.at_speed(args.user)
        name = f"{found.system.name} {found.recipe.name}"
        if index is None:
            lines.append(
                f"{name}: nowhere {args.user:g} tokens/s/user; at most {found.user.max():.1f}"
            )
            continue
        row = found.row(index)
        cost = _costs(row, found, price, args)["dollars_per_million"]
        money = "" if cost is None else f", {cost:.2f} $ per million tokens"
        lines.append(
            f"{name} at {args.user:g} tokens/s/user: {row['gpu_tokens_per_s']:.0f} tokens/s/GPU{money}"
        )
        best.append((name, row["gpu_tokens_per_s"]))
    for name, rate in best[1:]:
        ratio = prices.break_even(best[0][1], rate)
        lines.append(f"{best[0][0]} pays up to {ratio:.2f} times the GPU-hour of {name}")
    return lines


def _notes(results, costs, args, options) -> list[str]:
    """Says what the numbers stand on."""
    calibration, first = options.calibration, results[0]
    notes = [
        f"tokens are output tokens; {first.load.isl} in, {first.load.osl} out, {args.mode}, speculative decoding "
        f"{first.load.draft or 'off'}, overlap {first.load.overlap}, {args.engine} as of {args.software}; 80 % band",
        f"calibrated on {calibration.rows} measured rows ({calibration.source}, {calibration.date}); the time to the "
        "first token is no promise: measured ones are about five times as long under load",
    ]
    for found, price in zip(results, costs, strict=True):
        outside = sorted(
            {n for notes_ in found.notes for n in notes_ if "batch" not in n and "gpus" not in n}
        )
        if outside:
            notes.append(f"{found.system.name}: outside the calibrated range: {', '.join(outside)}")
        for name in found.system.gpu.unverified():
            notes.append(f"{found.system.name}: {name} {found.system.gpu.figures()[name]}")
        if price is not None:
            where = f"{price.source.text}, {price.source.date}"
            notes.append(f"{found.system.name}: {price}, basis {args.price} ({where})")
    return notes


def _plain(results, costs, args, notes) -> dict:
    systems = []
    for found, price in zip(results, costs, strict=True):
        front = [found.row(i) for i in found.front()]
        systems.append(
            {
                "system": found.system.name,
                "model": found.model.name,
                "precision": found.recipe.name,
                "price": None if price is None else dataclasses.asdict(price),
                "price_basis": args.price,
                "configurations": len(found.batch),
                "front": [row | _costs(row, found, price, args) for row in front],
            }
        )
    return {"systems": systems, "equal_speed": _equal_speed(results, costs, args), "notes": notes}
