"""The options of `moelab baselines`, and of `moelab verify --rerun`."""

from __future__ import annotations

import argparse

from moelab.cli import words


def declare(baselines) -> None:
    """Adds the commands."""
    add = words.add(baselines, "add", "baselines:add", "commit finished runs as cards of a family")
    add.add_argument("runs", nargs="+", metavar="RUN", help="sweep directories or run directories")
    add.add_argument("--family", default="", metavar="NAME", help="of families.json; must be given")
    render = words.add(
        baselines, "render", "baselines:render", "write the leaderboard from the cards"
    )
    render.add_argument("--check", action="store_true", help="only say whether it is stale")
    listing = words.add(baselines, "list", "baselines:listing", "families and their arms")
    for command in (add, render, listing):
        _takes_folder(command)


def takes_rerun(verify: argparse.ArgumentParser) -> None:
    """Adds the options that run a baseline again."""
    verify.add_argument(
        "--rerun", metavar="NAME", default="", help="run a committed arm again: FAMILY/ARM"
    )
    verify.add_argument(
        "--seed",
        type=words.integer,
        metavar="N",
        help="with --rerun: one of its seeds (the first), or a new one",
    )
    verify.add_argument("--workdir", metavar="DIR", default="", help="with --rerun: of the run")
    verify.add_argument(
        "--record", action="store_true", help="with --rerun: keep the drift of another machine"
    )
    _takes_folder(verify)


def _takes_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder", default="", metavar="DIR", help="of the baselines (experiments/baselines)"
    )
