"""`moelab plan train`: time, MFU and memory of a training step on GPUs that are not here."""

from __future__ import annotations

import argparse
import dataclasses

from moelab.cli import output
from moelab.cli.plan import paired, price_of
from moelab.errors import UserError

COLUMNS = ("system", "precision", "tp", "pp", "ep", "dp", "tokens/s/GPU [80 %]", "TFLOP/s/GPU")
COLUMNS += (
    "MFU",
    "MFU of bf16",
    "s/step",
    "bubble",
    "exchange",
    "GB/GPU",
    "$/B tokens [80 %]",
    "range",
)


def train(args: argparse.Namespace) -> int:
    """Prints one row per system."""
    from moelab.plan import hardware, readers, training

    if args.search and (args.tp, args.pp, args.ep) != (1, 1, 1):
        raise UserError("--search chooses --tp, --pp and --ep: leave them out, or leave it out")
    model, rows = readers.model(args.model), []
    for name, precision in paired(args.hardware, args.precision):
        system = hardware.system(name)
        job = training.Job(
            *(precision, args.length, args.batch, args.micro_batch, args.tp, args.pp, args.ep),
            recompute=args.recompute,
        )
        if args.search:
            job, step = training.search(model, system, job)
        else:
            step = training.step(model, system, job)
            if not step.fits:
                raise UserError(training.does_not_fit(model, system, step))
        rows.append(_row(model, system, job, step, args))
    if args.json:
        output.print_json(rows)
        return 0
    output.print_table(COLUMNS, [_cells(row) for row in rows])
    output.note(
        f"{model.name}, {args.batch} sequences of {args.length} tokens; FLOPs count half of the keys; the band "
        "is what 18 published rows scatter by, in sample: recipes of the same chip differ by two"
    )
    for row in rows:
        for note in row["notes"]:
            output.note(note)
    return 0


def _row(model, system, job, step, args) -> dict:
    from moelab.plan import training

    price = price_of(system.gpu.name, args.price)
    rate = step.tokens_per_gpu
    dollars = lambda tokens: price and price.value / 3600 / tokens * 1e9  # noqa: E731
    beyond = training.outside(model, system, job)
    low, high = training.band(beyond)
    notes = [f"{system.name}: outside the calibrated range: {', '.join(beyond)}"] if beyond else []
    notes += [
        f"{system.name}: {name} {system.gpu.figures()[name]}" for name in system.gpu.unverified()
    ]
    if price is not None:
        notes.append(
            f"{system.name}: {price}, basis {args.price} ({price.source.text}, {price.source.date})"
        )
    return {
        "system": system.name,
        "model": model.name,
        **dataclasses.asdict(job),
        "dp": system.count // (job.tp * job.pp),
        "tokens_per_s_gpu": rate,
        "low": rate * low,
        "high": rate * high,
        "flops_per_gpu": step.flops_per_gpu,
        "mfu": step.mfu,
        "mfu_bf16": step.mfu_bf16,
        "seconds": step.seconds,
        "parts": step.parts,
        "memory": step.memory,
        "dollars_per_billion": dollars(rate),
        "dollars_per_billion_low": dollars(rate * high),
        "dollars_per_billion_high": dollars(rate * low),
        "outside_calibrated_range": list(beyond),
        "notes": notes,
    }


def _cells(row: dict) -> tuple:
    share = lambda name: f"{100 * row['parts'][name] / row['seconds']:.0f} %"  # noqa: E731
    dollars = [row[f"dollars_per_billion{end}"] for end in ("", "_low", "_high")]
    return (
        row["system"],
        row["precision"],
        *(row[n] for n in ("tp", "pp", "ep", "dp")),
        f"{row['tokens_per_s_gpu']:.0f} [{row['low']:.0f}, {row['high']:.0f}]",
        f"{row['flops_per_gpu'] / 1e12:.0f}",
        f"{100 * row['mfu']:.1f} %",
        f"{100 * row['mfu_bf16']:.1f} %",
        f"{row['seconds']:.2f}",
        share("bubble"),
        share("exchange between experts' ranks, not hidden"),
        f"{sum(row['memory'].values()) / 1e9:.0f}",
        "-" if None in dollars else "{:.0f} [{:.0f}, {:.0f}]".format(*dollars),
        "outside" if row["outside_calibrated_range"] else "ok",
    )
