"""`moelab run`, `eval` and `generate`: the commands that compute."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from moelab import config as configs
from moelab import environment, launch
from moelab.cli import output
from moelab.errors import UserError


def load_config(args: argparse.Namespace) -> configs.Loaded:
    """Loads --config with its overrides, and says on standard error which fields a new kind dropped."""
    if not args.config:
        raise UserError(
            f"'{args.parser.prog}' wants --config=FILE ('moelab config list' shows what there is)"
        )
    loaded = configs.load(args.config, args.overrides)
    for line in loaded.dropped:
        output.note(line)
    return loaded


def start_jax() -> None:
    """Prepares JAX, and sends the library's log to standard error."""
    environment.prepare()
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("moelab").setLevel(logging.INFO)


def run(args: argparse.Namespace) -> int:
    """Trains a config, or with --dry_run says what that would cost."""
    start_jax()
    if args.seed is not None:
        args.overrides.append(f"--config.seed={args.seed}")
    loaded = load_config(args)
    workdir = Path(args.workdir or launch.default_workdir(loaded.name, loaded.config))
    if args.dry_run:
        return _dry_run(args, loaded, workdir)
    result = launch.run(
        loaded.config,
        workdir,
        resume=args.resume,
        progress=sys.stderr.isatty() and not args.json,
        config_file=loaded.file,
        overrides=loaded.overrides,
        command=args.command,
    )
    if args.json:
        output.print_json(result.card)
    elif result.exit_code == 0:
        _print_result(result.directory)
    return result.exit_code


def _dry_run(args: argparse.Namespace, loaded: configs.Loaded, workdir: Path) -> int:
    launch.check(loaded.config)
    configs.check_directory(loaded.config, workdir)
    summary = launch.summary(loaded.config)
    summary = {"config_sha256": configs.sha256(loaded.config), "workdir": str(workdir), **summary}
    if args.json:
        output.print_json(summary)
        return 0
    parameters, flops = summary["parameters"], summary["flops_per_token"]
    nbytes = summary["bytes"]
    rows = [
        ("config", f"{loaded.file}, sha256 {summary['config_sha256'][:8]}"),
        ("run directory", workdir),
        ("parameters", f"{parameters['total']:,}"),
        ("  active per token", f"{parameters['active']:,}"),
        ("  in experts", f"{parameters['expert']:,}"),
        ("bytes of parameters", f"{nbytes['parameters']:,}"),
        ("bytes of optimizer state", f"{nbytes['optimizer']:,}"),
        ("FLOPs per token, forward", f"{flops['forward']:,}"),
        ("FLOPs per token, training", f"{flops['train']:,}"),
        ("steps", f"{summary['steps']:,}"),
        ("tokens", f"{summary['tokens']:,}"),
        ("FLOPs of the training", f"{flops['train'] * summary['tokens']:.3g}"),
    ]
    for name, value in rows:
        print(f"{name:<26}{value}")
    output.note("dry run: the config is right; nothing was trained")
    return 0


def _print_result(directory: Path) -> None:
    from moelab import report

    report.print_result(directory)
    for name in ("RESULT.md", "report.html"):
        path = Path(directory) / name
        if path.exists():
            print(path)


def _workdir(args: argparse.Namespace) -> Path:
    if not args.workdir:
        raise UserError(f"'{args.parser.prog}' wants --workdir=RUN, a run directory")
    return run_directory(args.workdir)


def run_directory(path: str) -> Path:
    """Returns the path of a run directory, or says that it is none."""
    directory = Path(path)
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} is no run directory: it holds no config.json")
    return directory


def evaluate(args: argparse.Namespace) -> int:
    """Evaluates a checkpoint in several precisions."""
    directory = _workdir(args)
    if args.precisions:
        check_precisions(args.precisions)
    if args.tasks:
        return _ask(args, directory)
    start_jax()
    from moelab import evaluate as evaluation

    section = evaluation.evaluate_run(
        directory, step=args.step, precisions=args.precisions, split=args.split
    )
    if args.json:
        output.print_json(section)
        return 0
    rows = section["rows"]
    domains = list(rows[0]["bits_per_byte"])
    output.print_table(
        ("precision", *(f"{domain} bits/byte" for domain in domains), "loss", "expert bytes"),
        [
            (
                row["precision"],
                *(f"{row['bits_per_byte'][domain]:.4f}" for domain in domains),
                f"{row['loss']:.4f}",
                f"{row['expert_bytes']:,}",
            )
            for row in rows
        ],
    )
    step, tokens, documents = section["step"], section["tokens"], section["documents"]
    output.note(f"step {step}, {args.split} split: {tokens:,} tokens of {documents:,} documents")
    return 0


def _ask(args: argparse.Namespace, directory: Path) -> int:
    """Asks a checkpoint the tasks of --tasks."""
    from moelab import spelling, tasks

    kinds = tasks.KINDS if args.tasks == ("all",) else args.tasks
    for kind in kinds:
        if kind not in tasks.KINDS:
            guess = spelling.hint(kind, tasks.KINDS, "--tasks=")
            raise UserError(
                f"--tasks has no {kind!r}{guess or f'; there are all, {", ".join(tasks.KINDS)}'}"
            )
    if args.split != "test":
        raise UserError("--tasks choose their text themselves; leave --split out")
    start_jax()
    from moelab import scoring
    from moelab.report import tables, task_table

    found = scoring.answer_run(
        directory, kinds, step=args.step, precisions=args.precisions or ("float32",)
    )
    if args.json:
        output.print_json(found)
        return 0
    if found["rows"]:
        tables.print_table(task_table.make(found["rows"]))
    for text in task_table.notes(found):
        output.note(text)
    return 0


def check_precisions(names: tuple[str, ...], option: str = "--precisions") -> None:
    """Refuses a name that is no recipe, with the one that was meant."""
    from moelab import spelling
    from moelab.quant import recipes

    for name in names:
        if name not in recipes.NAMES:
            guess = spelling.hint(name, recipes.NAMES, f"{option}=")
            raise UserError(
                f"{option} has no {name!r}{guess or f'; there are {", ".join(recipes.NAMES)}'}"
            )


def generate(args: argparse.Namespace) -> int:
    """Continues a prompt."""
    directory = _workdir(args)
    start_jax()
    from moelab import generate as generation

    text = generation.generate_run(
        directory,
        args.prompt,
        step=args.step,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    if args.json:
        output.print_json({"prompt": args.prompt, "text": text})
    else:
        print(text)
    return 0
