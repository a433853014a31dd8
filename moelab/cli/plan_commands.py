"""The commands of `moelab plan`: what serving and training would cost on hardware that is not here."""

from __future__ import annotations

import argparse

from moelab.cli import words

_EXAMPLES = """\
examples:
  moelab plan --model=deepseek_v3 --hardware=b200x8,h200x8 --precision=nvfp4,fp8 --isl=8192 --osl=1024
  moelab plan compare --before=h200x8:fp8 --after=b200x8:nvfp4 --user=50
  moelab plan train --model=qwen3_235b --hardware=gb200x256 --precision=mxfp8 --pp=8 --ep=32
  moelab plan claims --out=claims.html
  moelab plan validate                                  needs the extra plan-data
  moelab plan audit kernels.parquet
"""


def declare(commands) -> None:
    """Adds the command and those below it."""
    text = "what serving or training a model costs on GPUs that are not here"
    plan = words.add(commands, "plan", "plan:serve", text)
    plan.epilog = _EXAMPLES
    _model(plan)
    _many(plan, "hardware", "b200x8", "GPUS", "systems: b200x8,gb200x72, FILE.jsonx8")
    _many(plan, "precision", "fp8", "A,B", "one recipe, or one per system: fp8,nvfp4,...")
    _load(plan)
    _conditions(plan)
    plan.add_argument("--out", metavar="FILE", default="", help="a page with plots: FILE.html")
    below = plan.add_subparsers(metavar="COMMAND", title="commands", prog="moelab plan")
    _train(below)
    _compare(below)
    claims = words.add(
        below, "claims", "plan_reports:claims", "each claim, its test, evidence and verdict"
    )
    _point(claims)
    claims.add_argument("--out", metavar="FILE", default="", help="a page with plots: FILE.html")
    _validate(below)
    text = "rows of measured times that physics does not allow"
    audit = words.add(below, "audit", "plan_reports:audit", text)
    audit.add_argument(
        "files", nargs="*", metavar="FILE", help="Parquet, CSV or JSON (the wheel's tables)"
    )
    audit.add_argument("--gpu", type=words.names, default=(), metavar="A,B", help="only these")
    audit.add_argument("--rows", type=words.positive, default=20, metavar="N", help="to show (20)")
    text = "the figures of GPUs, models, recipes and prices, with their sources"
    facts = words.add(below, "facts", "plan_reports:facts", text)
    facts.add_argument(
        "what", metavar="WHAT", help="gpus, models, recipes, prices, clouds or calibration",
        choices=("gpus", "models", "recipes", "prices", "clouds", "calibration"),
    )  # fmt: skip


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="NAME",
        default="deepseek_v3",
        help="a published model, a config.json, or a moelab config or run (deepseek_v3)",
    )


def _many(parser, name: str, default: str, metavar: str, text: str) -> None:
    parser.add_argument(
        f"--{name}",
        type=words.names,
        default=(default,),
        metavar=metavar,
        help=f"{text} ({default})",
    )


def _load(parser: argparse.ArgumentParser) -> None:
    for name, default, text in (
        ("isl", 8192, "tokens of the prompt"),
        ("osl", 1024, "tokens of the answer"),
    ):
        parser.add_argument(
            f"--{name}",
            type=words.positive,
            default=default,
            metavar="N",
            help=f"{text} ({default})",
        )
    parser.add_argument(
        "--draft",
        type=words.integer,
        default=0,
        metavar="N",
        help="tokens of speculative decoding (0: none)",
    )
    parser.add_argument(
        "--acceptance",
        type=words.share,
        default=0.7,
        metavar="P",
        help="probability that a drafted token is accepted (0.7)",
    )


def _conditions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mode",
        choices=("aggregated", "disaggregated"),
        default="aggregated",
        help="prompts and answers on the same GPUs, or not (aggregated)",
    )
    parser.add_argument(
        "--overlap",
        choices=("none", "two_batch"),
        default="none",
        help="of the exchange between experts' ranks (none)",
    )
    parser.add_argument(
        "--engine",
        choices=("trtllm", "sglang", "vllm"),
        default="trtllm",
        help="whose fixed latencies (trtllm)",
    )
    parser.add_argument(
        "--software",
        metavar="DATE",
        default="2026-04-01",
        help="date of the software, YYYY-MM-DD (2026-04-01)",
    )
    for name, text in (("ttft", "the first token"), ("tpot", "each further token")):
        parser.add_argument(
            f"--most_{name}",
            type=words.number,
            default=0.0,
            metavar="MS",
            help=f"limit for {text} (none)",
        )
    parser.add_argument(
        "--user",
        type=words.number,
        default=0.0,
        metavar="N",
        help="also the best throughput at so many tokens/s/user",
    )
    parser.add_argument(
        "--price",
        metavar="BASIS",
        default="owner",
        help="owner, low, neocloud, blended, hyperscaler, aws, azure, google, or $ per GPU-hour (owner)",
    )
    parser.add_argument(
        "--utilisation", type=words.share, default=1.0, metavar="P", help="share of busy time (1)"
    )
    parser.add_argument(
        "--routes",
        metavar="TRACE",
        default="",
        help="how unequal the experts are, from 'moelab routes record'",
    )


def _train(below) -> None:
    train = words.add(
        below, "train", "plan_training:train", "time, MFU and memory of a training step"
    )
    _model(train)
    _many(train, "hardware", "gb200x256", "GPUS", "systems")
    _many(train, "precision", "bf16", "A,B", "bf16, fp8, mxfp8, nvfp4: one, or one per system")
    for name, default, text in (
        ("length", 4096, "tokens of a sequence"),
        ("batch", 2048, "sequences of a step"),
        ("micro_batch", 1, "sequences of a micro-batch"),
        ("tp", 1, "tensor parallelism"),
        ("pp", 1, "pipeline stages"),
        ("ep", 1, "ranks that share the experts"),
    ):
        train.add_argument(
            f"--{name}",
            type=words.positive,
            default=default,
            metavar="N",
            help=f"{text} ({default})",
        )
    train.add_argument("--recompute", action="store_true", help="recompute activations")
    train.add_argument(
        "--search", action="store_true", help="try tp, pp and ep; the best that fits"
    )
    train.add_argument(
        "--price", metavar="BASIS", default="owner", help="owner, ..., or $ per GPU-hour (owner)"
    )


def _point(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    for name, default, text in (
        ("before", "h200x8:fp8", "from which system and precision"),
        ("after", "b200x8:nvfp4", "to which"),
    ):
        parser.add_argument(
            f"--{name}", metavar="SYSTEM:PRECISION", default=default, help=f"{text} ({default})"
        )
    for name, default, text in (("isl", 8192, "prompt"), ("osl", 1024, "answer")):
        parser.add_argument(
            f"--{name}",
            type=words.positive,
            default=default,
            metavar="N",
            help=f"{text} ({default})",
        )
    parser.add_argument(
        "--user", type=words.number, default=50.0, metavar="N", help="tokens/s/user (50)"
    )


def _compare(below) -> None:
    compare = words.add(
        below, "compare", "plan_reports:compare", "what a gain between two systems is due to"
    )
    _point(compare)
    compare.add_argument(
        "--draft",
        type=words.integer,
        default=0,
        metavar="N",
        help="drafted tokens of --after (0)",
    )
    compare.add_argument(
        "--batch",
        type=words.positive,
        default=32,
        metavar="N",
        help="sequences, at equal configuration (32)",
    )
    for name in ("software_before", "software_after"):
        compare.add_argument(
            f"--{name}",
            metavar="DATE",
            default="2026-04-01",
            help="date of the software (2026-04-01)",
        )


def _validate(below) -> None:
    text = "errors on measured rows of models and GPUs that were held out, or on your own"
    validate = words.add(below, "validate", "plan_reports:validate", text)
    validate.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        default="",
        help="your own rows: model, gpu, precision, tp, batch, isl, osl, tpot_ms (the wheel's)",
    )
    validate.add_argument(
        "--peer_rows",
        type=words.integer,
        default=0,
        metavar="N",
        help="also ask aiconfigurator for so many rows of each split; a second each (0)",
    )
    validate.add_argument(
        "--write", metavar="FILE", default="", help="fit all rows and write the calibration"
    )
