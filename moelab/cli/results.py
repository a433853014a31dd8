"""`moelab report` and `verify`: what reads finished runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from moelab import atomic, environment
from moelab.cli import output
from moelab.errors import UserError


def report(args: argparse.Namespace) -> int:
    """Writes a report, or prints the result tables where no file is asked for."""
    environment.prepare()
    from moelab import report as reports
    from moelab.report import arms

    if args.split == "validation" and args.precision != "float32":
        raise UserError("--split=validation is as trained; it takes no --precision")
    precision = arms.VALIDATION if args.split == "validation" else args.precision
    options = {"reference": args.reference, "precision": precision}
    options["different_tokens"] = args.different_tokens
    if args.out:
        reports.check_out(args.out)
        bib = Path(args.out).with_suffix(".bib")
        if args.bibtex:
            _check_bib(bib)
        written = {"report": reports.write(args.runs, args.out, fit=args.fit, **options)}
        if args.bibtex:
            written["bibtex"] = atomic.write_text(bib, reports.bibtex(args.runs))
        if args.json:
            output.print_json(written)
        else:
            print(*written.values(), sep="\n")
        return 0
    if args.bibtex:
        given = {
            "reference": args.reference,
            "fit": args.fit,
            "different_tokens": args.different_tokens,
            "precision": args.precision != "float32",
            "split": args.split != "test",
        }
        for name, value in given.items():
            if value:
                raise UserError(
                    f"--bibtex alone prints papers; --{name} is for a report, --out=FILE"
                )
        text = reports.bibtex(args.runs)
        if args.json:
            output.print_json({"bibtex": text})
        else:
            print(text, end="")
        return 0
    runs, notes = reports.load_all(args.runs)
    compared = reports.compared_arms(runs, **options)
    fitted = reports.fit_of(compared, args.fit)
    if args.json:
        _print_json(runs, compared, fitted)
        return 0
    for note in notes:
        output.note(note)
    if compared is not None:
        _print_arms(compared)
        if fitted is not None:
            print(fitted.sentence)
        return 0
    for run in runs:
        reports.print_result(run)
        reports.print_coefficients(run)
    return 0


def _check_bib(path: Path) -> None:
    """Refuses to replace a file of references that somebody else wrote."""
    from moelab.report import citations

    atomic.check_target(path, make_folders=True)
    if path.exists() and not path.read_bytes().startswith(citations.HEAD.encode()):
        raise UserError(f"{path} is there and moelab did not write it; name --out otherwise")


def _print_json(runs, compared, fitted) -> None:
    if compared is None:
        output.print_json([run.card for run in runs])
        return
    from moelab.report import arms_rows

    rows = arms_rows.rows(compared)
    output.print_json(rows if fitted is None else {"arms": rows, fitted.kind: fitted.result})


def _print_arms(compared) -> None:
    from moelab.report import arms_measures, arms_tables, crossing, tables

    tables.print_table(arms_tables.main_table(compared))
    tables.print_table(arms_tables.points_table(compared))
    for table in arms_measures.all_tables(compared):
        tables.print_table(table)
    told = [arms_tables.PAIRED, *arms_tables.notes(compared), *crossing.notes(compared)]
    for note in (*told, arms_tables.limits(compared)):
        output.note(note)


def verify(args: argparse.Namespace) -> int:
    """Prints each way in which a card and its files disagree; exit code 1 if there is one."""
    if args.rerun:
        from moelab.cli import baselines

        return baselines.rerun(args)
    if args.seed is not None or args.record or args.workdir:
        raise UserError("--seed, --workdir and --record are for --rerun=NAME")
    if not args.run:
        raise UserError(f"'{args.parser.prog}' wants RUN, or --rerun=NAME")
    environment.prepare()
    if not Path(args.run).exists():
        raise UserError(f"no such run: {args.run}")
    problems = _problems(Path(args.run))
    if args.json:
        output.print_json({"run": args.run, "problems": problems})
    else:
        for problem in problems:
            print(problem)
        print(f"{args.run}: {len(problems)} problems" if problems else f"{args.run}: verified")
    return 1 if problems else 0


def _problems(path: Path) -> list[str]:
    """Checks a run directory, an arm's committed cards, those of a folder, or every card of the baselines."""
    from moelab.report import arm_file, baseline_checks, baselines
    from moelab.report import card as cards
    from moelab.report.verify import verify as problems_of

    files = arm_file.files(path)
    if (path / baselines.FAMILIES).is_file():  # whatever lies among its cards is to be one
        files = sorted((path / baselines.CARDS).rglob("*.json"))
        if not files:
            return [f"{path / baselines.CARDS}: there are no cards"]
    if files:
        return [problem for arm in files for problem in baseline_checks.problems(arm)]
    if not path.is_file():
        return problems_of(path)
    try:
        cards.read_json(path)
    except cards.CardError as error:
        return [f"{path.parent}/{error}"]
    if path.name == cards.NAME:
        return [f"{path}: the card of a run; verify the run: {path.parent}"]
    return [f"{path}: holds no cards of an arm"]
