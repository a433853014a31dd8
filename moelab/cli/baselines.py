"""`moelab baselines add | render | list`, and `moelab verify --rerun`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from moelab import config_file
from moelab.cli import output
from moelab.errors import UserError
from moelab.report import formatting as fmt


def _folder(args: argparse.Namespace) -> Path:
    """The folder that was named, or that of the experiments: here, or beside the package."""
    from moelab.report import baselines

    if args.folder:
        known = [Path(args.folder)]
    else:
        known = [folder / "baselines" for folder in config_file.folders()]
    for folder in known:
        if (folder / baselines.FAMILIES).is_file():
            return folder
    raise UserError(f"no {baselines.FAMILIES} in {known[0] if known else 'experiments/baselines'}")


def add(args: argparse.Namespace) -> int:
    """Writes cards, and the leaderboard."""
    from moelab.report import baselines, leaderboard, load_all

    folder = _folder(args)
    if not args.family:
        there = ", ".join(baselines.families(folder))
        raise UserError(f"'{args.parser.prog}' wants --family=NAME; there are {there}")
    baselines.family(args.family, folder)
    runs, notes = load_all(args.runs)
    for line in notes:
        output.note(line)
    written = leaderboard.add(runs, args.family, folder)
    if args.json:
        output.print_json({"written": written})
    else:
        print(*written, sep="\n")
    return 0


def render(args: argparse.Namespace) -> int:
    """Writes the leaderboard and its pictures; with --check compares them, exit code 1 where one is stale."""
    from moelab.report import baselines, leaderboard

    folder = _folder(args)
    if not args.check:
        print(*leaderboard.write(folder), sep="\n")
        return 0
    stale = leaderboard.stale(folder)
    if args.json:
        output.print_json({"stale": stale})
    elif stale:
        print(*(f"{path}: stale; moelab baselines render" for path in stale), sep="\n")
    else:
        print(f"{folder / baselines.README}: up to date")
    return int(bool(stale))


def listing(args: argparse.Namespace) -> int:
    """Lists families with their arms and seeds."""
    from moelab.report import arm_file, baselines

    folder = _folder(args)
    rows = []
    for family in baselines.families(folder):
        arms = [n for n in baselines.names(folder) if n.startswith(f"{family}/")]
        for name in arms:
            entries = arm_file.read(baselines.find(name, folder)).entries
            rows.append((name, ",".join(map(str, sorted(entries)))))
        if not arms:
            rows.append((family, "no run yet"))
    if args.json:
        output.print_json([{"name": name, "seeds": seeds} for name, seeds in rows])
    else:
        output.print_table(("baseline", "seeds"), rows)
    return 0


def rerun(args: argparse.Namespace) -> int:
    """Runs a baseline again; exit code 1 where it does not land where it must."""
    from moelab.cli.running import start_jax

    if args.run:
        raise UserError("--rerun names a baseline; a RUN is verified without it")
    folder = _folder(args)
    start_jax()
    from moelab import rerun as reruns
    from moelab.report import arm_file, baselines
    from moelab.report import card as cards

    found = reruns.rerun(
        args.rerun,
        seed=args.seed,
        workdir=args.workdir,
        folder=folder,
        progress=sys.stderr.isatty() and not args.json,
        command=args.command,
    )
    if args.record:
        entries = arm_file.read(baselines.find(args.rerun, folder)).entries
        kept = reruns.record(found, entries, cards.read(found.directory), folder)
        output.note("drift recorded" if kept else "the same kind of machine: no drift to record")
    if args.json:
        output.print_json(dataclasses.asdict(found))
    else:
        verdict = {True: "within", False: "OUTSIDE", None: "not judged:"}[found.passed]
        bounds = f"[{fmt.fixed(found.expected.low, 6)}, {fmt.fixed(found.expected.high, 6)}]"
        print(f"{found.name}, seed {found.seed}: {found.bits_per_byte:.6f} bits per byte")
        if found.difference is not None:
            print(f"difference to the card {found.difference:+.2e}")
        print(f"expected {found.expected.estimate:.6f} {bounds}: {verdict} {found.rule}")
    return 1 if found.passed is False else 0
