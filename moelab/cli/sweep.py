"""`moelab sweep`: plans points, says what they cost, runs what is left."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
from pathlib import Path

from moelab import sweep_file
from moelab.cli import output
from moelab.errors import UserError

EXIT_FAILED, EXIT_PREEMPTED = 1, 75


def sweep(args: argparse.Namespace) -> int:
    """Runs, submits or lists the points of a sweep."""
    if not args.config:
        raise UserError(f"'{args.parser.prog}' wants --config=FILE")
    options = _slurm_options(args)
    from moelab.cli.running import start_jax

    start_jax()
    from moelab import sweep as sweeps
    from moelab.cli.sweep_display import Display

    points, duplicates = sweeps.plan(args.config, args.sweep, args.overrides, args.seeds)
    for line in duplicates:
        output.note(line)
    names = [*args.sweep, *(["seeds"] if args.seeds else [])]
    path = Path(args.workdir or _default_workdir(args.config, names))
    directory = sweeps.Directory(path, points, args.command, args.config, names)
    costs = _costs(directory, points)
    if args.list:
        return _list(args, directory, costs)
    output.note(_headline(directory, costs, args))
    if args.slurm:
        sweeps.submit(directory, args.jobs, retry=args.retry, parameters=options, note=output.note)
        return _end(args, directory, stopped=False)
    with Display(directory, not args.json) as display:
        stopped = sweeps.run(
            directory,
            args.jobs or 1,
            retry=args.retry,
            drop_checkpoints=args.drop_checkpoints,
            note=display.note,
            tick=display.tick,
        )
    return _end(args, directory, stopped)


def _default_workdir(source: str, names: list[str]) -> Path:
    stem = Path(source.partition(":")[0]).stem
    return Path("runs") / "-".join([stem, *names])


def _slurm_options(args: argparse.Namespace) -> dict[str, object]:
    if args.slurm_option and not args.slurm:
        raise UserError("--slurm_option is for --slurm")
    options: dict[str, object] = {}
    for text in args.slurm_option:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UserError(f"--slurm_option wants NAME=VALUE, got {text!r}")
        options[name] = int(value) if value.lstrip("-").isdigit() else value
    return options


@dataclasses.dataclass(frozen=True)
class _Costs:
    """FLOPs of each point by directory, and the measured rate if a run is finished."""

    flops: dict[str, float]
    rate: object | None

    def seconds(self, entries) -> float | None:
        """Estimates the seconds of some points one after another; None where no rate was measured."""
        if self.rate is None:
            return None
        return math.fsum(self.rate.seconds(self.flops[e.directory]) for e in entries)


def _costs(directory, points) -> _Costs:
    from moelab.sweep import cost

    flops = dict(zip((point.directory for point in points), cost.flops(points), strict=True))
    return _Costs(flops, directory.rate())


def _headline(directory, costs: _Costs, args: argparse.Namespace) -> str:
    """Says how many points there are, what is left and what it costs."""
    from moelab.report import formatting as fmt

    counts = [
        f"{len(found)} {status}"
        for status in sweep_file.STATUSES
        if (found := directory.with_status(status))
    ]
    left = directory.to_run(args.retry)
    text = f"{len(directory.entries)} points: {', '.join(counts)}"
    if left:
        work = math.fsum(costs.flops[e.directory] for e in left)
        text += f"; {len(left)} to run, {work:.3g} FLOPs of training"
        seconds = costs.seconds(left)
        if seconds is None:
            text += "; no time is known before one has finished here"
        elif args.slurm:
            text += f", about {fmt.duration(seconds)} one after the other, as here"
            text += f" (from {costs.rate.runs} finished)"
        else:
            jobs = args.jobs or 1
            text += f", about {fmt.duration(seconds / jobs)} with --jobs={jobs}"
            text += f" (from {costs.rate.runs} finished)"
    if directory.others:
        text += f"; {len(directory.others)} points of earlier commands are kept"
    return text


def _list(args: argparse.Namespace, directory, costs: _Costs) -> int:
    if args.json:
        output.print_json(_json(directory, costs))
        return 0
    rows = []
    for entry in directory.entries:
        seconds = costs.seconds([entry])
        took = entry.seconds if entry.status == sweep_file.FINISHED else seconds
        rows.append(
            (
                entry.name,
                entry.status,
                f"{costs.flops[entry.directory]:.3g}",
                "-" if took is None else f"{took:.0f}",
                entry.directory,
            )
        )
    output.print_table(("point", "status", "FLOPs", "seconds", "directory"), rows)
    _print_failed(directory)
    output.note(_headline(directory, costs, args))
    return 0


def _json(directory, costs: _Costs) -> dict[str, object]:
    points = [
        dataclasses.asdict(entry)
        | {"flops": costs.flops[entry.directory], "expected_seconds": costs.seconds([entry])}
        for entry in directory.entries
    ]
    return {"workdir": str(directory.path), "points": points}


def _end(args: argparse.Namespace, directory, stopped: bool) -> int:
    failed = directory.with_status(sweep_file.FAILED)
    unfinished = directory.with_status(sweep_file.WAITING, sweep_file.INTERRUPTED)
    if args.json:
        points = [dataclasses.asdict(entry) for entry in directory.entries]
        output.print_json({"workdir": str(directory.path), "points": points})
    else:
        _print_failed(directory)
        finished = len(directory.with_status(sweep_file.FINISHED))
        print(f"{directory.path}: {finished} of {len(directory.entries)} points finished")
        if unfinished:
            output.note("the same command goes on from here")
        elif finished > 1:
            output.note(
                f"compare: moelab report {shlex.quote(str(directory.path))} --out=report.html"
            )
    if stopped:
        return EXIT_PREEMPTED
    return EXIT_FAILED if failed else EXIT_PREEMPTED if unfinished else 0


def _print_failed(directory) -> None:
    failed = directory.with_status(sweep_file.FAILED)
    for entry in failed:
        output.note(f"failed: {entry.name}: {entry.error or 'no message'}")
        output.note(f"  see {directory.log(entry)}")
    if failed:
        output.note(f"{len(failed)} failed; --retry runs them again")
