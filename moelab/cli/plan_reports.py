"""`moelab plan compare, claims, validate, audit, facts`: what gains are due to, and how far numbers can be trusted."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from moelab.cli import output
from moelab.cli.plan import write_page, years
from moelab.errors import UserError


def _way(text: str, isl: int, osl: int, draft: int = 0, software: str = "2026-04-01"):
    from moelab.plan import hardware, recipes
    from moelab.plan.attribution import Way
    from moelab.plan.serving import Load

    system, precision = _pair(text)
    load = Load(isl, osl, draft=draft)
    return Way(hardware.system(system), recipes.named(precision), load, years(software))


def compare(args: argparse.Namespace) -> int:
    """Prints what a gain is due to, at equal configuration and at equal interactivity."""
    from moelab.plan import attribution, readers, serving
    from moelab.plan.work import Layout

    model = readers.model(args.model)
    a = _way(args.before, args.isl, args.osl, 0, args.software_before)
    b = _way(args.after, args.isl, args.osl, args.draft, args.software_after)
    if not attribution.causes(a, b):
        raise UserError(f"--before and --after are the same: {args.before}")
    count = min(a.system.count, b.system.count, 8)
    found = [
        attribution.equal_configuration(model, a, b, Layout(count), args.batch),
        attribution.equal_interactivity(model, a, b, args.user),
    ]
    for way in (a, b):
        most = float(
            serving.largest_batch(model, way.recipe, way.system.gpu, Layout(count), way.load)[0]
        )
        if most < args.batch:
            output.note(
                f"{way.system.name} {way.recipe.name}: {int(most)} sequences fit so, not --batch={args.batch}; its "
                "rate at equal configuration is what it would be with more memory"
            )
    if args.json:
        output.print_json([dataclasses.asdict(f) | {"gain": f.gain} for f in found])
        return 0
    for one in found:
        ends = f"{one.before:.0f} to {one.after:.0f} tokens/s/GPU"
        print(f"{one.basis}: {ends}, {one.gain:.2f}x {_interval(one.intervals['gain'])}")
        rows = [
            (n, f"{f:.2f}x", _interval(one.intervals[n]), attribution.CAUSES[n])
            for n, f in one.factors.items()
        ]
        output.print_table(("cause", "factor", "80 %", "what"), rows)
    output.note(
        "factors multiply to the gain: Shapley values of log throughput over all orders of the causes; intervals are "
        "over what the calibrated values could be, and not over what the form of the model gets wrong"
    )
    if found[1].missed:
        output.note(
            f"{found[1].missed} of {found[1].sets} sets of causes reach {args.user:g} tokens/s/user nowhere"
        )
    return 0


def claims(args: argparse.Namespace) -> int:
    """Prints every claim with its verdict, and quality beside cost."""
    from moelab.plan import calibration, joint, pages
    from moelab.plan import claims as tested

    point = tested.Point(
        args.model, args.isl, args.osl, args.user, _pair(args.before), _pair(args.after)
    )
    shared, found = tested.report(point)
    rows = joint.rows(shared)
    inside, outside = (calibration.shipped().bounds(beyond) for beyond in (False, True))
    notes = [
        f"operating point: {point}; from {args.before} to {args.after}",
        "modelled: by the shipped calibration; 80 % of the measured times per token are {:.2f} to {:.2f} of the "
        "predicted inside its range, taken as {:.2g} to {:.2g} outside".format(*inside, *outside),
    ]
    if args.json:
        output.print_json(
            {
                "point": dataclasses.asdict(point),
                "claims": [dataclasses.asdict(c) for c in found],
                "joint": rows,
            }
        )
    else:
        for claim in found:
            print(
                f"{claim.verdict.upper()}: {claim.claim}\n  test: {claim.test}\n  because {claim.because}"
            )
            for what, source in claim.evidence:
                print(f"  - {what} <{source}>")
        columns = (
            "format",
            "bits per byte lost",
            "interval",
            "tokens/s/GPU",
            "over FP8",
            "$/M tokens",
        )
        output.print_table(columns, [pages.joint_row(row) for row in rows])
        for note in notes:
            output.note(note)
    if args.out:
        write_page(args.out, pages.claims(shared, found, rows, notes))
    return 0


def _interval(bounds) -> str:
    return f"[{bounds[0]:.2f}, {bounds[1]:.2f}]"


def _pair(text: str) -> tuple[str, str]:
    system, colon, precision = text.rpartition(":")
    if not colon:
        raise UserError(f"wants SYSTEM:PRECISION, as b200x8:nvfp4; got {text!r}")
    return system, precision


def validate(args: argparse.Namespace) -> int:
    """Prints errors on held-out rows beside the plain roofline and aiconfigurator, or on rows of one's own."""
    if args.file:
        if args.peer_rows or args.write:
            raise UserError("--peer_rows and --write are for the wheel's rows: leave out the FILE")
        return _own_rows(args)
    from moelab.plan import calibrate, calibration, measured, named, validation

    rows, left = measured.rows()
    found = calibrate.all_data(rows)
    scores = [
        score
        for split in validation.SPLITS
        for score in validation.split_scores(found, split, args.peer_rows, output.note)
    ]
    bars = {
        split: next(
            s for s in scores if s.split == split and s.who == "moelab" and s.part == "all"
        ).meets()
        for split in validation.SPLITS
    }
    cases = named.outcomes()
    if args.write:
        calibration.save(args.write, validation.ship(found))
        output.note(f"wrote {args.write}")
    if args.json:
        output.print_json(
            {
                "used": len(rows),
                "left_out": left,
                "scores": [dataclasses.asdict(s) for s in scores],
                "bars": bars,
                "named": [_case(o) for o in cases],
            }
        )
        return 0
    print(f"{len(rows)} rows used of {len(rows) + sum(left.values())}; left out by rule:")
    output.print_table(("rows", "rule"), [(count, rule) for rule, count in left.items()])
    output.print_table(SCORE, [_score(s) for s in scores])
    for split, met in bars.items():
        words = ", ".join(f"{name} {'met' if ok else 'NOT met'}" for name, ok in met.items())
        print(f"{split}: {words}")
    columns = ("published rate, in no fit", "measured", "predicted", "80 % band", "ratio", "source")
    output.print_table(columns, [_case_cells(o) for o in cases])
    output.note(
        "bars: median error <= 20 %, rank correlation >= 0.88, 75 to 85 % in the 80 % band; the form of the model and "
        "the rules were chosen by people who had seen these rows"
    )
    return 0


SCORE = (
    "held out",
    "rows of",
    "who",
    "rows",
    "median error",
    "90 % below",
    "bias",
    "rank",
    "in band",
)


def _own_rows(args: argparse.Namespace) -> int:
    from moelab.plan import own_rows

    rows = own_rows.predict(Path(args.file))
    score = own_rows.score(rows, args.file)
    if args.json:
        output.print_json(
            {"score": dataclasses.asdict(score), "rows": [dataclasses.asdict(r) for r in rows]}
        )
        return 0
    columns = ("row", "measured ms", "predicted ms", "80 %", "ratio", "range")
    cells = [
        (
            r.what,
            f"{1e3 * r.measured:.2f}",
            f"{1e3 * r.predicted:.2f}",
            f"[{1e3 * r.low:.2f}, {1e3 * r.high:.2f}]",
            f"{r.predicted / r.measured:.2f}",
            "outside" if r.outside else "ok",
        )
        for r in rows
    ]
    output.print_table(columns, cells)
    output.print_table(("file", *SCORE[1:]), [_score(score)])
    return 0


def _case(o) -> dict:
    return {
        "name": o.case.name,
        "measured": o.case.rate,
        "predicted": o.rate,
        "low": o.low,
        "high": o.high,
        "batch": o.batch,
        "source": f"{o.case.source.text}, {o.case.source.date}",
    }


def _case_cells(o) -> tuple:
    band = f"[{o.low:.0f}, {o.high:.0f}]"
    source = f"{o.case.source.text}, {o.case.source.date}"
    return (o.case.name, f"{o.case.rate:.0f}", f"{o.rate:.0f}", band, f"{o.ratio:.2f}", source)


def _score(s) -> tuple:
    inside = "-" if s.coverage is None else f"{100 * s.coverage:.0f} %"
    errors = (f"{100 * s.median:.1f} %", f"{100 * s.p90:.0f} %", f"{s.bias:.2f}", f"{s.rank:.3f}")
    return (s.split, s.part, s.who, s.rows, *errors, inside)


def audit(args: argparse.Namespace) -> int:
    """Prints the rows that physics does not allow."""
    from moelab.plan import audit as auditing
    from moelab.plan import hardware, measured, physics

    gpus = tuple(hardware.find(name).name for name in args.gpu)
    if args.files:
        found = auditing.run([Path(f) for f in args.files])
    else:
        root = measured.need() / "systems" / "data"
        found = auditing.run(auditing.wheel_tables(gpus), root)
    if gpus:
        found = auditing.of_gpus(found, gpus)
    bad = found.impossible
    if args.json:
        output.print_json(
            {
                "checked": [
                    {"gpu": g, "kind": k, "kernel": n, "rows": c}
                    for (g, k, n), c in found.checked.items()
                ],
                "skipped": found.skipped,
                "explained": found.explained,
                "rules": physics.FALSE_POSITIVES,
                "impossible": [dataclasses.asdict(row) | {"factor": row.factor} for row in bad],
            }
        )
        return 0
    auditing_rows = auditing.by_gpu(found)
    output.print_table(("GPU", "rows judged", "impossible", "kernels", "up to"), auditing_rows)
    shown = bad[: args.rows]
    if shown:
        columns = ("GPU", "kernel", "dtype", "shape", "measured us", "least us", "factor")
        output.print_table((*columns, "bound by"), [_impossible(row) for row in shown])
    if len(bad) > len(shown):
        output.note(f"{len(bad) - len(shown)} more; --rows=N or --json")
    print("false positives that are not counted:")
    for rule in physics.FALSE_POSITIVES:
        print(f"- {rule}")
    for rule, count in found.explained.items():
        print(f"  ({rule}: {count} rows would have been)")
    for why, count in found.skipped.items():
        output.note(f"{count} rows not judged: {why}")
    return 0


def _impossible(row) -> tuple:
    times = (f"{1e6 * row.seconds:.1f}", f"{1e6 * row.least:.1f}", f"{row.factor:.2f}")
    return (row.gpu, row.kernel, row.dtype, row.shape, *times, row.reason)


def facts(args: argparse.Namespace) -> int:
    """Prints constants with their sources and what contradicts them."""
    from moelab.plan import facts as listing

    columns, rows = listing.rows(args.what)
    if args.json:
        output.print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        output.print_table(columns, rows)
    return 0
