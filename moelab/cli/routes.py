"""`moelab routes ...`: which experts tokens go to, recorded, replayed, compared and placed."""

from __future__ import annotations

import argparse
from pathlib import Path

from moelab import placement, trace
from moelab.cli import output
from moelab.cli.running import check_precisions, run_directory, start_jax
from moelab.errors import UserError
from moelab.report import formatting as fmt
from moelab.report import routes as reported


def record(args: argparse.Namespace) -> int:
    """Writes the routes of a run's evaluation text to a file."""
    directory = _prepared(args)
    if args.out and Path(args.out).suffix != ".npz":
        raise UserError(f"--out: wants FILE.npz, got {args.out!r}")
    from moelab import routes

    found = routes.record(
        directory,
        step=args.step,
        precision=args.precision,
        split=args.split,
        weights=args.weights,
        before_capacity=args.before_capacity,
    )
    usual = routes.default_path(directory, args.step, args.precision, args.split)
    path = Path(args.out or usual)
    trace.save(path, found)
    if args.json:
        shape = dict(zip(("layers", "tokens", "slots"), found.expert_MTK.shape, strict=True))
        output.print_json({"trace": path, "bytes": path.stat().st_size, **shape, **found.header})
    else:
        print(path)
        output.note(f"{reported.origin(found)}, {fmt.size(path.stat().st_size)}")
    return 0


def replay(args: argparse.Namespace) -> int:
    """Prints the loss of a run with its own routes and with those of a trace."""
    recorded = trace.load(args.trace)
    directory = _prepared(args)
    from moelab import routes

    found = routes.replay(directory, recorded, step=args.step, precision=args.precision)
    if args.json:
        output.print_json(found)
        return 0
    output.print_table(
        ("routes", "loss", "difference", "bits per byte", "tokens with a flip", "flips per layer"),
        [
            (
                "of the trace" if row["replayed"] else "its own",
                f"{row['loss']:.6f}",
                f"{row['loss_delta']:+.6f}",
                f"{row['bits_per_byte']['all']:.4f}",
                fmt.percent(row["token_flip_rate"], 2),
                ", ".join(fmt.percent(rate, 2) for rate in row["flip_rate"]),
            )
            for row in found["rows"]
        ],
    )
    output.note(
        f"run: step {found['step']}, {found['precision']}; trace: {reported.origin(recorded)}; "
        "flips are against the trace"
    )
    return 0


def diff(args: argparse.Namespace) -> int:
    """Prints how often two traces choose different experts, per MoE layer."""
    a, b = trace.load(args.a), trace.load(args.b)
    found = reported.differences(a, b)
    if args.json:
        output.print_json(found | {"a": a.header, "b": b.header})
        return 0
    output.print_table(
        ("layer", "tokens with other experts", "overlap (Jaccard)", "saturation of A against B"),
        [
            (
                f"block {row['layer']}",
                fmt.percent(row["flip_rate"], 2),
                f"{row['overlap']:.4f}",
                f"{row['saturation']:.4f}",
            )
            for row in found["rows"]
        ]
        + [("any layer", fmt.percent(found["token_flip_rate"], 2), "", "")],
    )
    output.note(f"A: {reported.origin(a)}\nB: {reported.origin(b)}")
    return 0


def show(args: argparse.Namespace) -> int:
    """Prints load, balance, specialisation and partners of a trace's experts."""
    found = trace.load(args.trace)
    rows = reported.summary(found)
    if args.json:
        buckets = {"quality": buckets} if (buckets := reported.quality(found)) else {}
        output.print_json({"header": found.header, "rows": rows} | buckets)
        return 0
    table = reported.table(rows, "")
    output.print_table(table.columns, [[cell.line for cell in row] for row in table.rows])
    print()
    output.print_table(
        ("load", *(f"block {row['layer']}" for row in rows)),
        [
            (f"expert {e}", *(f"{row['load'][e]:.4f}" for row in rows))
            for e in range(found.num_experts)
        ],
    )
    _print_quality(reported.quality(found), [row["layer"] for row in rows])
    output.note(reported.origin(found))
    return 0


def _print_quality(buckets: list[dict], layers: list[int]) -> None:
    """Prints how much of each quality bucket there is, and which experts have more of it than their part."""
    if not buckets:
        return
    print()
    output.print_table(
        ("quality bucket", "documents", "tokens", *(f"load, block {layer}" for layer in layers)),
        [
            (
                row["bucket"],
                row["documents"],
                row["tokens"],
                *(fmt.percent(s, 2) for s in row["share"]),
            )
            for row in buckets
        ],
    )
    for number, layer in enumerate(layers):
        print()
        output.print_table(
            (f"block {layer}: share over chance", *(row["bucket"] for row in buckets)),
            [
                (f"expert {e}", *(fmt.fixed(row["ratio"][number][e], 2) for row in buckets))
                for e in range(len(buckets[0]["ratio"][number]))
            ],
        )


def place(args: argparse.Namespace) -> int:
    """Prints how even devices are with experts in order, and placed by the load of half of the documents."""
    if args.devices is None:
        raise UserError(f"'{args.parser.prog}' wants --devices=N")
    found = trace.interleave(trace.load(args.trace))
    report = placement.evaluate_placement(
        found, args.devices, redundant=args.redundant, nodes=args.nodes, groups=args.groups
    )
    columns = ("before_fit", "after_fit", "before_held_out", "after_held_out")
    values_M = (report.before_fit_M, report.after_fit_M, report.before_held_M, report.after_held_M)
    rows = [
        {"layer": layer, **dict(zip(columns, map(float, values), strict=True))}
        for layer, *values in zip(found.layers, *values_M, strict=True)
    ]
    if args.json:
        experts = report.placement.expert_MDS.tolist()
        output.print_json({"documents": report.documents, "rows": rows, "experts": experts})
        return 0
    mean = {"layer": "mean"} | {c: sum(row[c] for row in rows) / len(rows) for c in columns}
    output.print_table(
        ("layer", "in order, fitted", "placed, fitted", "in order, held out", "placed, held out"),
        [
            (_layer(row["layer"]), *(f"{row[column]:.3f}" for column in columns))
            for row in [*rows, mean]
        ],
    )
    fit, held = report.documents
    output.note(
        f"imbalance: the busiest device's load over the mean, minus 1; fitted on {fit} documents of all domains, "
        f"held out {held}"
    )
    return 0


def _layer(layer: int | str) -> str:
    return layer if isinstance(layer, str) else f"block {layer}"


def _prepared(args: argparse.Namespace) -> Path:
    directory = run_directory(args.run)
    check_precisions((args.precision,), "--precision")
    start_jax()
    return directory
