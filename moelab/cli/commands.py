"""The commands of `moelab` and their options; those about kernels and plans are in files of their own."""

from __future__ import annotations

import argparse
import functools

import moelab
from moelab.cli import (
    baselines_commands,
    data_commands,
    kernel_commands,
    plan_commands,
    sweep_commands,
    words,
)

_DESCRIPTION = "A research toolkit for sparse Mixture-of-Experts language models in JAX."
_EXAMPLES = """\
examples:
  moelab run --config=demo                              train, quantize, evaluate, report
  moelab run --config=demo --config.router.k=4          change any field; repeat for more
  moelab run --config=demo:smoke --dry_run              what would it cost?
  moelab config fields --config=demo                    every field: type, value, meaning
  moelab generate --workdir=runs/demo --prompt="Once"   let the trained model write
  moelab data score --config=FILE --tool=classifier      which documents would a filter remove?
  moelab sweep --config=FILE --sweep=A --seeds=0-4       many runs; what is finished is skipped
  moelab report runs/a runs/b --out=report.html         compare finished runs
  moelab routes record runs/demo                        which experts do the tokens go to?
  moelab quantize --workdir=runs/demo --out=packed      4-bit experts, stored and compared
  moelab kernels verify --target=b200,h100              compile the kernels for GPUs that are not here
  moelab plan --model=deepseek_v3 --hardware=b200x8     what serving it would cost there

exit codes: 0 done, 2 your error, 1 crash, 3 non-finite losses, 75 pre-empted (run again to resume)
'moelab COMMAND --help' explains one command.
"""


@functools.cache
def build() -> argparse.ArgumentParser:
    """Returns the whole parser tree; completion tools read it too."""
    parser = words.Parser(prog="moelab", description=_DESCRIPTION, epilog=_EXAMPLES)
    parser.add_argument("--version", action="version", version=f"moelab {moelab.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", prog="moelab")
    _running(commands)
    sweep_commands.declare(commands)
    _results(commands)
    _quantize(commands)
    _routes(words.group(commands, "routes", "record, replay, compare and place routes of tokens"))
    kernel_commands.declare(commands)
    plan_commands.declare(commands)
    config = words.group(commands, "config", "show, compare and list configs")
    _config(config)
    data_commands.declare(words.group(commands, "data", "build, describe, score, filter data"))
    words.add(commands, "env", "inspecting:env", "packages, machine, devices, caches, kernels")
    return parser


def _running(commands) -> None:
    run = words.add(
        commands, "run", "running:run", "train, evaluate and report a config", words.takes_config
    )
    run.add_argument("--workdir", metavar="DIR", default="", help="run directory (runs/NAME-HASH)")
    run.add_argument(
        "--resume",
        choices=("auto", "never", "must"),
        default="auto",
        help="continue the run in --workdir: if there is one (default), never, or insist on it",
    )
    run.add_argument("--seed", type=words.integer, metavar="N", help="short for --config.seed=N")
    run.add_argument(
        "--dry_run", action="store_true", help="check, print size and cost, touch no device"
    )
    evaluate = words.add(commands, "eval", "running:evaluate", "evaluate a run's checkpoint again")
    words.takes_workdir(evaluate)
    evaluate.add_argument(
        "--precisions",
        type=words.names,
        default=(),
        metavar="A,B",
        help="recipes (those of the config)",
    )
    evaluate.add_argument(
        "--split", choices=("test", "validation"), default="test", help="which documents (test)"
    )
    evaluate.add_argument(
        "--tasks",
        type=words.names,
        default=(),
        metavar="A,B",
        help="ask the model these instead: all, or some of facts, minimal_pairs, recall, induction, ...",
    )
    generate = words.add(
        commands, "generate", "running:generate", "continue a prompt with a run's model"
    )
    words.takes_workdir(generate)
    generate.add_argument("--prompt", metavar="TEXT", default="", help="what to continue")
    for name, kind, default, text in (
        ("max_tokens", words.positive, 128, "tokens to write"),
        ("temperature", words.number, 0.8, "0: always the likeliest token"),
        ("top_p", words.share, 0.95, "keep the likeliest tokens of this total probability"),
        ("seed", words.integer, 0, "of the sampling"),
    ):
        generate.add_argument(
            f"--{name}", type=kind, default=default, metavar="N", help=f"{text} ({default})"
        )


def _results(commands) -> None:
    report = words.add(commands, "report", "results:report", "report or compare finished runs")
    report.add_argument(
        "runs", nargs="+", metavar="RUN", help="run directories, sweep directories, result cards"
    )
    report.add_argument(
        "--out", metavar="FILE", default="", help="FILE.html, .md, .csv, .tex; without it, a table"
    )
    for name, default, text in (
        ("reference", "", "arm that the others are compared with (the first)"),
        ("precision", "float32", "in which arms are compared (float32)"),
        ("fit", "", "a curve through the arms: isoflop or granularity"),
    ):
        report.add_argument(f"--{name}", default=default, metavar="NAME", help=text)
    report.add_argument(
        "--split",
        choices=("test", "validation"),
        default="test",
        help="of arms: validation is for tuning, so that nothing is chosen on what is reported",
    )
    for name, text in (
        ("different_tokens", "compare runs that trained on different numbers of tokens"),
        ("bibtex", "BibTeX of the methods; with --out into FILE.bib too"),
    ):
        report.add_argument(f"--{name}", action="store_true", help=text)
    verify = words.add(commands, "verify", "results:verify", "check a run's card against its files")
    verify.add_argument(
        "run", nargs="?", default="", metavar="RUN", help="run directory, or committed cards"
    )
    baselines_commands.takes_rerun(verify)
    baselines_commands.declare(
        words.group(commands, "baselines", "committed cards and the leaderboard made from them")
    )


def _quantize(commands) -> None:
    text = "pack a run's experts in 4 bits, store and export them, compare with the run"
    quantize = words.add(commands, "quantize", "quantize:quantize", text)
    words.takes_workdir(quantize)
    for name, default, meaning in (
        ("out", "", "folder to write to; new or empty"),
        ("format", "nvfp4", "of the experts' weights (nvfp4)"),
        ("rule", "", "how block scales are rounded (the format's own)"),
        ("method", "rtn", "how weights are rounded: rtn, gptq, awq, ... (rtn)"),
        ("export", "", "also write a checkpoint: nvfp4-pack-quantized or mxfp4-pack-quantized"),
    ):
        quantize.add_argument(f"--{name}", metavar="NAME", default=default, help=meaning)
    quantize.add_argument(
        "--recipe",
        type=words.names,
        default=("w4a16",),
        metavar="A,B",
        help="what computes in 4 bits, each a row: w4a16, w4a8, w4a4; the first is exported (w4a16)",
    )
    quantize.add_argument(
        "--method_field",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of the method; repeat for more",
    )
    for name, choices, meaning in (
        ("activation_scale", ("per_token", "static"), "of NVFP4 activations under w4a4"),
        ("rest", ("float32", "bfloat16"), "dtype of what is not packed"),
        ("split", ("test", "validation"), "which documents the comparison is about"),
        ("fallback", ("siblings", "all_tokens"), "statistics of experts with too few tokens"),
    ):
        quantize.add_argument(
            f"--{name}", choices=choices, default=choices[0], help=f"{meaning} ({choices[0]})"
        )
    for name, default, meaning in (
        ("calibration_tokens", 65536, "tokens of the training split to calibrate on"),
        ("min_tokens", 64, "fewest tokens of an expert for statistics of its own"),
    ):
        quantize.add_argument(
            f"--{name}",
            type=words.positive,
            default=default,
            metavar="N",
            help=f"{meaning} ({default})",
        )
    quantize.add_argument(
        "--gate_weighted",
        action="store_true",
        help="weigh calibration rows by the router's weights",
    )


def _routes(routes) -> None:
    record = words.add(
        routes, "record", "routes:record", "write which experts a run's tokens go to"
    )
    words.takes_run(record)
    record.add_argument(
        "--split",
        choices=("test", "validation", "train"),
        default="test",
        help="which documents (test); labels of quality are in train alone",
    )
    record.add_argument("--out", metavar="FILE", default="", help="FILE.npz (RUN/routes.npz)")
    record.add_argument("--weights", action="store_true", help="keep the combine weights too")
    record.add_argument(
        "--before_capacity", action="store_true", help="also what a capacity dropped"
    )
    text = "evaluate a run with a trace's routes instead of its own"
    replay = words.add(routes, "replay", "routes:replay", text)
    words.takes_run(replay)
    replay.add_argument("trace", metavar="TRACE", help="file of 'moelab routes record'")
    diff = words.add(routes, "diff", "routes:diff", "how often two traces of the same text differ")
    for name, text in (("a", "a trace"), ("b", "another; saturation counts it as the final one")):
        diff.add_argument(name, metavar=name.upper(), help=text)
    show = words.add(
        routes, "show", "routes:show", "load, specialisation and partners of the experts"
    )
    show.add_argument("trace", metavar="TRACE", help="file of 'moelab routes record'")
    text = "place a trace's experts on devices: imbalance before and after"
    place = words.add(routes, "place", "routes:place", text)
    place.add_argument("trace", metavar="TRACE", help="file of 'moelab routes record'")
    for name, kind, default, text in (
        ("devices", words.positive, None, "devices that share the experts; must be given"),
        ("redundant", words.integer, 0, "extra slots per layer, for copies of busy experts (0)"),
        ("nodes", words.positive, None, "nodes of the devices; with --groups"),
        ("groups", words.positive, None, "groups of experts that stay on one node; with --nodes"),
    ):
        place.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=text)


def _config(config) -> None:
    text = "every field with its value; * marks what is not the default"
    words.add(config, "show", "inspecting:show", text, words.takes_config)
    diff = words.add(config, "diff", "inspecting:diff", "fields in which two configs differ")
    for name in ("a", "b"):
        diff.add_argument(name, metavar=name.upper(), help="config file or run directory")
    words.add(config, "list", "inspecting:listing", "the files in experiments/ and their presets")
    text = "path, type, default and meaning of every field; of one config's kinds with --config"
    words.add(config, "fields", "inspecting:print_fields", text, words.takes_config)
