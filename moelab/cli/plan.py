"""`moelab plan`: what serving a model would cost on GPUs that are not here."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
from pathlib import Path

from moelab.cli import output, plan_speed
from moelab.errors import UserError

COLUMNS = ("system", "precision", "tp", "dp", "ep", "pp", "batch", "ms/token [80 %]", "tok/s/user")
COLUMNS += ("tok/s/GPU", "first token ms", "GB/GPU", "$/M tok [80 %]", "J/tok", "range")
SHOWN = 7  # rows of a front in a table; JSON has them all


def years(text: str) -> float:
    """Reads a date as years after 2026-01-01.

    Raises:
      UserError: no date, or one so far from the measured rows that the fitted decline means nothing.
    """
    try:
        day = datetime.date.fromisoformat(text)
    except ValueError:
        raise UserError(f"a date of software wants YYYY-MM-DD, got {text!r}") from None
    if not datetime.date(2024, 1, 1) <= day <= datetime.date(2028, 12, 31):
        raise UserError(
            f"a date of software wants 2024-01-01 to 2028-12-31, got {text}: what a year of software takes off was "
            "fitted on measurements of 2025-10 to 2026-04"
        )
    return (day - datetime.date(2026, 1, 1)).days / 365.25


def write_page(path: str, text: str) -> None:
    """Writes a page.

    Raises:
      UserError: it cannot be written there.
    """
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out={path} cannot be written: {error.strerror}") from None
    output.note(f"wrote {path}")


def paired(systems, precisions) -> list[tuple[str, str]]:
    """Gives every system its precision: one for all, or one each.

    Raises:
      UserError: other numbers.
    """
    if not systems or not precisions:
        raise UserError(f"--{'precision' if systems else 'hardware'} wants one name at least")
    if len(precisions) not in (1, len(systems)):
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
    speeds = plan_speed.compared(results, costs, args)
    rows = [
        row
        for found, price in zip(results, costs, strict=True)
        for row in _rows(found, price, args)
    ]
    lines = list(map(plan_speed.line, speeds))
    if args.json:
        output.print_json(_plain(results, costs, args) | {"equal_speed": speeds, "notes": notes})
    else:
        output.print_table(COLUMNS, rows)
        for line in lines:
            print(line)
        for note in notes:
            output.note(note)
    if args.out:
        from moelab.plan import pages

        write_page(args.out, pages.serving(results, COLUMNS, rows, [*lines, *notes]))
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

    def dollars(name: str) -> float | None:
        return price and prices.per_million(price.value, row[name], args.utilisation)

    def joules(name: str) -> float:
        return prices.joules(found.system.gpu.power.value, row[name])

    rate = (
        "gpu_tokens_per_s"  # the more tokens, the fewer dollars: the ends of the band change places
    )
    return {
        "dollars_per_million": dollars(rate),
        "dollars_per_million_low": dollars(f"{rate}_high"),
        "dollars_per_million_high": dollars(f"{rate}_low"),
        "joules_per_token": joules(rate),
        "joules_per_token_low": joules(f"{rate}_high"),
        "joules_per_token_high": joules(f"{rate}_low"),
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
        dollars = [cost[f"dollars_per_million{end}"] for end in ("", "_low", "_high")]
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
                "-" if price is None else "{} [{}, {}]".format(*map(plan_speed.money, dollars)),
                f"{cost['joules_per_token']:.3g}",
                "outside" if row["outside_calibrated_range"] else "ok",
            )
        )
    return rows


def _notes(results, costs, args, options) -> list[str]:
    """Says what the numbers stand on."""
    from moelab.plan import prices

    calibration, first = options.calibration, results[0]
    notes = [
        f"tokens are output tokens; {first.load.isl} in, {first.load.osl} out, {args.mode}, speculative decoding "
        f"{first.load.draft or 'off'}, overlap {first.load.overlap}, {args.engine} as of {args.software}; 80 % band, "
        "the same for tokens/s/GPU, $ and J, at a price taken as exact",
        f"calibrated on {calibration.rows} measured rows ({calibration.source}, {calibration.date}); the time to the "
        "first token is no promise: measured ones are about five times as long under load",
    ]
    wall, pue = prices.WALL, prices.PUE
    notes.append(
        f"joules at the wall: what the GPU is sold with x {wall.value:g} x a PUE of {pue.value:g} "
        f"({pue.source.status}); {wall.source.text}, {wall.source.date}"
    )
    if args.routes:
        notes.append(f"experts as unequal as in {args.routes}")
    if not first.load.draft and args.acceptance != 0.7:
        notes.append("--acceptance changes nothing without --draft=N")
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
            notes.append(
                f"{found.system.name}: {price}, basis {args.price} ({where}){_others(price)}"
            )
    return notes


def _others(price) -> str:
    found = ", ".join(f"{value:g} {why}" for value, why in price.others)
    return f"; others: {found}" if found else ""


def _plain(results, costs, args) -> dict:
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
    return {"systems": systems}
