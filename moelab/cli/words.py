"""The command line's tools: a parser whose errors say what was meant, groups, commands, and the types of values."""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Callable

from moelab import spelling
from moelab.errors import UserError

_CONFIG_HELP = (
    "a config file, FILE.py[:PRESET]; a bare name is looked up in experiments/; "
    "a run directory gives that run's config"
)


class Parser(argparse.ArgumentParser):
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


def group(commands, name: str, text: str):
    """Adds a command of commands, as `moelab data`, and returns where its commands are added."""
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(handler="", parser=parser, overrides_allowed=False)
    return parser.add_subparsers(metavar="COMMAND", title="commands", prog=f"moelab {name}")


def add(commands, name: str, handler: str, text: str, *extend: Callable) -> argparse.ArgumentParser:
    """Adds a command.

    Args:
      commands: where: the root's or a group's.
      name: its word.
      handler: MODULE:FUNCTION in moelab.cli, imported when the command runs.
      text: what it does, for the help; lower case, without a full stop.
      *extend: functions that add options, as `takes_config`.

    Returns:
      Its parser, for more options.
    """
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(handler=handler, parser=parser, overrides_allowed=takes_config in extend)
    for more in extend:
        more(parser)
    parser.add_argument("--json", action="store_true", help="results as JSON, for machines")
    parser.add_argument("--debug", action="store_true", help="tracebacks")
    return parser


def takes_config(parser: argparse.ArgumentParser) -> None:
    """Adds --config and its overrides."""
    parser.add_argument("--config", metavar="FILE", default="", help=_CONFIG_HELP)
    # Listed for --help alone: overrides are taken out before argparse sees them.
    parser.add_argument(
        "--config.SECTION.FIELD",
        metavar="VALUE",
        dest="_",
        help="override a field; repeat for more",
    )


def takes_workdir(parser: argparse.ArgumentParser) -> None:
    """Adds --workdir and --step."""
    parser.add_argument("--workdir", metavar="DIR", default="", help="run directory")
    parser.add_argument(
        "--step", type=step, default="latest", metavar="N", help="checkpoint (latest)"
    )


def takes_run(parser: argparse.ArgumentParser) -> None:
    """Adds a run directory, --step and --precision."""
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument(
        "--step", type=step, default="latest", metavar="N", help="checkpoint (latest)"
    )
    parser.add_argument(
        "--precision", default="float32", metavar="NAME", help="recipe to compute in (float32)"
    )


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


integer = _converter(int, lambda x: 0 <= x < 2**32, "an int from 0")
positive = _converter(int, lambda x: x > 0, "an int from 1")
number = _converter(float, lambda x: 0 <= x < float("inf"), "a number from 0")
share = _converter(float, lambda x: 0 < x <= 1, "a number above 0 and at most 1")
step = _converter(
    lambda text: text if text == "latest" else int(text),
    lambda x: x == "latest" or x >= 0,
    "'latest' or a step's number",
)


def names(text: str) -> tuple[str, ...]:
    """Reads A,B,C."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


_MOST_SEEDS = 10_000


def seeds(text: str) -> tuple[int, ...]:
    """Reads seeds: 0,1,2 or 0-4 or both.

    >>> seeds("0-2,7")
    (0, 1, 2, 7)
    """
    found: list[int] = []
    for part in names(text):
        first, dash, last = part.partition("-")
        low = integer(first)
        more = range(low, integer(last) + 1) if dash else [low]
        if len(found) + len(more) > _MOST_SEEDS:
            raise argparse.ArgumentTypeError(f"wants at most {_MOST_SEEDS} seeds, got {text!r}")
        found += more
    if not found or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"wants seeds, each once, as 0,1,2 or 0-4, got {text!r}")
    return tuple(found)


def counts(text: str) -> tuple[int, ...]:
    """Reads N,M,...; each from 1."""
    return tuple(positive(name) for name in names(text))
