"""The words of the command line: subcommands, options, config overrides, and errors that say what was meant."""

from __future__ import annotations

import argparse
import functools
import re
import shlex
import shutil
from collections.abc import Callable, Sequence

import moelab
from moelab import spelling
from moelab.errors import UserError

_DESCRIPTION = "A research toolkit for sparse Mixture-of-Experts language models in JAX."
_EXAMPLES = """\
examples:
  moelab run --config=demo                              train, quantize, evaluate, report
  moelab run --config=demo --config.router.k=4          change any field; repeat for more
  moelab run --config=demo:smoke --dry_run              what would it cost?
  moelab config fields --config=demo                    every field: type, value, meaning
  moelab generate --workdir=runs/demo --prompt="Once"   let the trained model write
  moelab report runs/a runs/b --out=report.html         compare finished runs
  moelab routes record runs/demo                        which experts do the tokens go to?
  moelab quantize --workdir=runs/demo --out=packed      4-bit experts, stored and compared
  moelab kernels verify --target=b200,h100              compile the kernels for GPUs that are not here

exit codes: 0 done, 2 your error, 1 crash, 3 non-finite losses, 75 pre-empted (run again to resume)
'moelab COMMAND --help' explains one command.
"""
_CONFIG_HELP = (
    "a config file, FILE.py[:PRESET]; a bare name is looked up in experiments/; "
    "a run directory gives that run's config"
)


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting, and never takes a prefix for an option."""

    def __init__(self, **options):
        options.setdefault("formatter_class", _Help)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        invalid = re.match(
            r"(?:argument )?(\S+): invalid choice: '(.*)' \(choose from (.*)\)", message
        )
        if invalid:
            name, value, choices = invalid.groups()
            known = re.findall(r"'?([^', ]+)'?", choices)
            what = "command" if name == "COMMAND" else f"{name} choice"
            message = f"no {what} {value!r}" + (
                spelling.hint(
                    value, known, prefix=f"{self.prog} " if what == "command" else f"{name}="
                )
                or f"; there are {', '.join(known)}"
            )
        raise UserError(f"{message} ('{self.prog} --help' explains)")


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(
            prog, max_help_position=32, width=min(110, shutil.get_terminal_size((100, 24)).columns)
        )


@functools.cache
def build() -> argparse.ArgumentParser:
    """Returns the whole parser tree; completion tools read it too."""
    parser = _Parser(prog="moelab", description=_DESCRIPTION, epilog=_EXAMPLES)
    parser.add_argument("--version", action="version", version=f"moelab {moelab.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", prog="moelab")
    _running(commands)
    _results(commands)
    _quantize(commands)
    _routes(_group(commands, "routes", "record, replay, compare and place routes of tokens"))
    kernels = _group(commands, "kernels", "list the GPU kernels; verify them without a GPU")
    _kernels(kernels)
    _fit(kernels)
    _roofline(kernels)
    _bench(_group(commands, "bench", "time backends, layers and steps; compare with older times"))
    config = _group(commands, "config", "show, compare and list configs")
    _config(config)
    data = _group(commands, "data", "build or describe the data of a config")
    for name, text in (
        ("build", "build the data"),
        ("show", "describe the data; built first if need be"),
    ):
        _add(data, name, f"data_commands:{name}", text, _takes_config)
    _add(commands, "env", "inspecting:env", "packages, machine, devices, caches, kernels")
    return parser


def _running(commands) -> None:
    run = _add(commands, "run", "running:run", "train, evaluate and report a config", _takes_config)
    run.add_argument("--workdir", metavar="DIR", default="", help="run directory (runs/NAME-HASH)")
    run.add_argument(
        "--resume",
        choices=("auto", "never", "must"),
        default="auto",
        help="continue the run in --workdir: if there is one (default), never, or insist on it",
    )
    run.add_argument("--seed", type=_integer, metavar="N", help="short for --config.seed=N")
    run.add_argument(
        "--dry_run", action="store_true", help="check, print size and cost, touch no device"
    )
    evaluate = _add(commands, "eval", "running:evaluate", "evaluate a run's checkpoint again")
    _takes_workdir(evaluate)
    evaluate.add_argument(
        "--precisions", type=_names, default=(), metavar="A,B", help="recipes (those of the config)"
    )
    evaluate.add_argument(
        "--split", choices=("test", "validation"), default="test", help="which documents (test)"
    )
    generate = _add(
        commands, "generate", "running:generate", "continue a prompt with a run's model"
    )
    _takes_workdir(generate)
    generate.add_argument("--prompt", metavar="TEXT", default="", help="what to continue")
    for name, kind, default, text in (
        ("max_tokens", _positive, 128, "tokens to write"),
        ("temperature", _number, 0.8, "0: always the likeliest token"),
        ("top_p", _share, 0.95, "keep the likeliest tokens of this total probability"),
        ("seed", _integer, 0, "of the sampling"),
    ):
        generate.add_argument(
            f"--{name}", type=kind, default=default, metavar="N", help=f"{text} ({default})"
        )


def _results(commands) -> None:
    report = _add(commands, "report", "results:report", "report or compare finished runs")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run directories or result cards")
    report.add_argument(
        "--out", metavar="FILE", default="", help="FILE.html, .md or .csv; without it, a table"
    )
    verify = _add(commands, "verify", "results:verify", "check a run's card against its files")
    verify.add_argument("run", metavar="RUN", help="run directory")


def _quantize(commands) -> None:
    text = "pack a run's experts in 4 bits, store and export them, compare with the run"
    quantize = _add(commands, "quantize", "quantize:quantize", text)
    _takes_workdir(quantize)
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
        type=_names,
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
            f"--{name}", type=_positive, default=default, metavar="N", help=f"{meaning} ({default})"
        )
    quantize.add_argument(
        "--gate_weighted",
        action="store_true",
        help="weigh calibration rows by the router's weights",
    )


def _routes(routes) -> None:
    record = _add(routes, "record", "routes:record", "write which experts a run's tokens go to")
    _takes_run(record)
    record.add_argument(
        "--split", choices=("test", "validation"), default="test", help="which documents (test)"
    )
    record.add_argument("--out", metavar="FILE", default="", help="FILE.npz (RUN/routes.npz)")
    record.add_argument("--weights", action="store_true", help="keep the combine weights too")
    record.add_argument(
        "--before_capacity", action="store_true", help="also what a capacity dropped"
    )
    text = "evaluate a run with a trace's routes instead of its own"
    replay = _add(routes, "replay", "routes:replay", text)
    _takes_run(replay)
    replay.add_argument("trace", metavar="TRACE", help="file of 'moelab routes record'")
    diff = _add(routes, "diff", "routes:diff", "how often two traces of the same text differ")
    for name, text in (("a", "a trace"), ("b", "another; saturation counts it as the final one")):
        diff.add_argument(name, metavar=name.upper(), help=text)
    show = _add(routes, "show", "routes:show", "load, specialisation and partners of the experts")
    show.add_argument("trace", metavar="TRACE", help="file of 'moelab routes record'")
    text = "place a trace's experts on devices: imbalance before and after"
    place = _add(routes, "place", "routes:place", text)
    place.add_argument("trace", metavar="TRACE", help="file of 'moelab routes record'")
    for name, kind, default, text in (
        ("devices", _positive, None, "devices that share the experts; must be given"),
        ("redundant", _integer, 0, "extra slots per layer, for copies of busy experts (0)"),
        ("nodes", _positive, None, "nodes of the devices; with --groups"),
        ("groups", _positive, None, "groups of experts that stay on one node; with --nodes"),
    ):
        place.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=text)


def _kernels(kernels) -> None:
    text = "which GPU kernels there are, and what is proven of each"
    _add(kernels, "list", "kernels:listing", text)
    text = "compile kernels for GPUs that are not here and check the machine code"
    verify = _add(kernels, "verify", "kernels:verify", text)
    verify.add_argument(
        "--target", type=_names, default=(), metavar="A,B", help="GPUs: b200,h100,... (all of them)"
    )
    verify.add_argument(
        "--kernel", type=_names, default=(), metavar="A,B", help="kernels of 'kernels list' (all)"
    )


def _takes_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument(
        "--step", type=_step, default="latest", metavar="N", help="checkpoint (latest)"
    )
    parser.add_argument(
        "--precision", default="float32", metavar="NAME", help="recipe to compute in (float32)"
    )


def _bench(bench) -> None:
    for name, repeats, shape, text in (
        ("kernels", 15, "T,E,N,K", "the grouped matmul of every backend of this device"),
        ("layer", 21, "E,K[,T,D,F]", "MoE layers against a dense one of equal active FLOPs"),
        ("step", 7, "", "training steps against those of a dense model of equal active width"),
    ):
        command = _add(bench, name, f"bench:{name}", f"time {text}")
        command.add_argument(
            "--repeats", type=_positive, default=repeats, metavar="N", help=f"rounds ({repeats})"
        )
        if shape:
            command.add_argument(
                "--shape", action="append", metavar=shape, help="repeat for more (a list of ours)"
            )
        command.add_argument("--out", metavar="FILE", default="", help="write the rows, as JSON")
        command.add_argument(
            "--compare", metavar="FILE", default="", help="how much longer than an --out of before"
        )


def _config(config) -> None:
    text = "every field with its value; * marks what is not the default"
    _add(config, "show", "inspecting:show", text, _takes_config)
    diff = _add(config, "diff", "inspecting:diff", "fields in which two configs differ")
    for name in ("a", "b"):
        diff.add_argument(name, metavar=name.upper(), help="config file or run directory")
    _add(config, "list", "inspecting:listing", "the files in experiments/ and their presets")
    text = "path, type, default and meaning of every field; of one config's kinds with --config"
    _add(config, "fields", "inspecting:print_fields", text, _takes_config)


def _fit(kernels) -> None:
    text = "compile a config's whole model for GPUs that are not here; memory of a device"
    fit = _add(kernels, "fit", "fit:fit", text, _takes_config)
    fit.add_argument(
        "--target", metavar="GPU", default="b200", help="one of 'kernels verify' (b200)"
    )
    fit.add_argument("--devices", type=_positive, default=1, metavar="N", help="how many (1)")
    fit.add_argument(
        "--tokens",
        type=_positive,
        default=512,
        metavar="N",
        help="on each device, one sequence (512)",
    )
    fit.add_argument(
        "--format", choices=("nvfp4", "mxfp4"), default="nvfp4", help="of the experts (nvfp4)"
    )


def _roofline(kernels) -> None:
    text = "what bounds a grouped matmul for the experts of published models, by a model of the GPU"
    roofline = _add(kernels, "roofline", "roofline:roofline", text)
    roofline.add_argument(
        "--kernel",
        choices=("mosaic_sm100", "mosaic_sm90", "triton_w4a16"),
        default="mosaic_sm100",
        help="which kernel (mosaic_sm100)",
    )
    roofline.add_argument("--target", metavar="GPU", default="", help="b200, or h100 for W4A16")
    roofline.add_argument("--model", type=_names, default=(), metavar="A,B", help="models (all)")
    roofline.add_argument(
        "--format", choices=("nvfp4", "mxfp4"), default="nvfp4", help="of the weights (nvfp4)"
    )
    roofline.add_argument(
        "--tokens",
        type=_counts,
        default=(1, 8, 64, 512, 4096, 16384, 65536),
        metavar="N,M",
        help="tokens of the batch (1,8,64,512,4096,16384,65536)",
    )


def _group(commands, name: str, text: str):
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(handler="", parser=parser, overrides_allowed=False)
    return parser.add_subparsers(metavar="COMMAND", title="commands", prog=f"moelab {name}")


def _add(
    commands, name: str, handler: str, text: str, *extend: Callable
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(handler=handler, parser=parser, overrides_allowed=_takes_config in extend)
    for more in extend:
        more(parser)
    parser.add_argument("--json", action="store_true", help="results as JSON, for machines")
    parser.add_argument("--debug", action="store_true", help="tracebacks")
    return parser


def _takes_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", default="", help=_CONFIG_HELP)
    # Listed for --help alone: overrides are taken out before argparse sees them.
    parser.add_argument(
        "--config.SECTION.FIELD",
        metavar="VALUE",
        dest="_",
        help="override a field; repeat for more",
    )


def _takes_workdir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", metavar="DIR", default="", help="run directory")
    parser.add_argument(
        "--step", type=_step, default="latest", metavar="N", help="checkpoint (latest)"
    )


def parse(argv: Sequence[str]) -> argparse.Namespace | None:
    """Reads the command line; None if it asked for help or the version, which is then printed.

    Raises:
      UserError: one line with the word that was meant.
    """
    parser = build()
    words, overrides = split_overrides(argv)
    try:
        args, unknown = parser.parse_known_args(words)
    except SystemExit:
        return None
    chosen = getattr(args, "parser", parser)
    if unknown:
        raise UserError(_unknown(unknown[0], chosen))
    if not getattr(args, "handler", ""):
        chosen.print_help()
        return None
    if overrides and not args.overrides_allowed:
        raise UserError(
            f"{overrides[0].partition('=')[0]}: '{chosen.prog}' takes no config overrides"
        )
    args.overrides, args.command = overrides, " ".join(["moelab", *map(shlex.quote, argv)])
    return args


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes `--config.a.b=value` and `--config.a.b value` out of the words; a bool may stand alone.

    >>> split_overrides(["run", "--config.router.k", "4", "--config=demo", "--config.model.remat", "--json"])
    (['run', '--config=demo', '--json'], ['--config.router.k=4', '--config.model.remat'])
    """
    words, overrides = [], []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--config."):
            words.append(word)
        elif "=" in word or not rest or rest[0].startswith("--"):
            overrides.append(word)
        else:
            overrides.append(f"{word}={rest.pop(0)}")
    return words, overrides


def _unknown(word: str, parser: argparse.ArgumentParser) -> str:
    if not word.startswith("-"):
        return (
            f"{word!r} is one word too many for '{parser.prog}' ('{parser.prog} --help' explains)"
        )
    name, mark, rest = re.match(r"([^.=]*)([.=]?)(.*)", word).groups()
    known = [option for option in _options(parser) if "." not in option]
    nearest = spelling.closest(name, known)
    if nearest == ["--config"] and mark == ".":
        nearest = [f"--config.{rest.partition('=')[0]}"]
    guess = (
        f"; did you mean {' or '.join(nearest)}?"
        if nearest
        else f" ('{parser.prog} --help' lists them)"
    )
    return f"'{parser.prog}' has no option {name}{guess}"


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings]


def _converter(read: Callable, right: Callable, wanted: str) -> Callable:
    def convert(text: str):
        try:
            value = read(text)
        except ValueError:
            value = None
        if value is None or not right(value):
            raise argparse.ArgumentTypeError(f"wants {wanted}, got {text!r}")
        return value

    return convert


_integer = _converter(int, lambda x: 0 <= x < 2**32, "an int from 0")
_positive = _converter(int, lambda x: x > 0, "an int from 1")
_number = _converter(float, lambda x: 0 <= x < float("inf"), "a number from 0")
_share = _converter(float, lambda x: 0 < x <= 1, "a number above 0 and at most 1")
_step = _converter(
    lambda text: text if text == "latest" else int(text),
    lambda x: x == "latest" or x >= 0,
    "'latest' or a step's number",
)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_positive(name) for name in _names(text))
