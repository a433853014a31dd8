"""Prints results: rich tables for people at a terminal, plain aligned text in pipes and files, JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence


def print_json(value: object) -> None:
    """Prints one JSON document."""
    from moelab import metrics

    print(json.dumps(metrics.plain(value), indent=2, allow_nan=False))


def note(text: str) -> None:
    """Prints a line about the work, not a result, on standard error."""
    print(text, file=sys.stderr, flush=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints rows under their column names."""
    text = [[as_text(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _rich(columns, text)
    else:
        _plain(columns, text)


def print_pairs(pairs: Mapping[str, object]) -> None:
    """Prints names and values below each other; nested ones under their dotted names."""
    flat = list(_flatten(pairs))
    width = max((len(name) for name, _ in flat), default=0)
    for name, value in flat:
        print(f"{name:<{width}}  {as_text(value)}".rstrip())


def _flatten(pairs: Mapping[str, object], prefix: str = ""):
    for name, value in pairs.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _rich(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def _plain(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = [list(columns), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


def as_text(value: object) -> str:
    """Writes a value as an override would: true, 0.1, a,b."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list | tuple):
        return ",".join(map(as_text, value))
    return str(value)
