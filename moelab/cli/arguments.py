"""The words of a command line: options, config overrides, and errors that say what was meant."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence

from moelab import spelling
from moelab.cli import commands
from moelab.errors import UserError


def parse(argv: Sequence[str]) -> argparse.Namespace | None:
    """Reads the command line; None if it asked for help or the version, which is then printed.

    Raises:
      UserError: one line with the word that was meant.
    """
    parser = commands.build()
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
