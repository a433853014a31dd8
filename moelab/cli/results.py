"""`moelab report` and `verify`: what reads finished runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from moelab import environment
from moelab.cli import output
from moelab.errors import UserError


def report(args: argparse.Namespace) -> int:
    """Writes a report, or prints the result tables where no file is asked for."""
    environment.prepare()
    from moelab import report as reports

    if args.out:
        path = reports.write(args.runs, args.out)
        if args.json:
            output.print_json({"report": path})
        else:
            print(path)
        return 0
    cards = [reports.load(run).card for run in args.runs]
    if args.json:
        output.print_json(cards)
        return 0
    for run in args.runs:
        reports.print_result(run)
        reports.print_coefficients(run)
    return 0


def verify(args: argparse.Namespace) -> int:
    """Prints each way in which a card and its files disagree; exit code 1 if there is one."""
    environment.prepare()
    from moelab.report.verify import verify as problems_of

    if not Path(args.run).exists():
        raise UserError(f"no such run: {args.run}")
    problems = problems_of(args.run)
    if args.json:
        output.print_json({"run": args.run, "problems": problems})
    else:
        for problem in problems:
            print(problem)
        print(f"{args.run}: {len(problems)} problems" if problems else f"{args.run}: verified")
    return 1 if problems else 0
