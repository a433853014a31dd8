"""A progress bar for a terminal: step, loss, tokens/s, time left, the worst layer's load. Silent elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainProgress:
    """Draws on standard error, and only when that is a terminal and `enabled`."""

    def __init__(self, num_steps: int, enabled: bool):
        self._bar = None
        if enabled and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("[bold]train"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("train", total=num_steps, numbers="compiling")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, record: dict) -> None:
        """Shows a train record of metrics.jsonl."""
        if not self._bar:
            return
        numbers = f"loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tok/s"
        violations = record["router"]["max_violation"]
        if violations:
            numbers += f"  max load {1 + max(violations):.2f}x"
        if record["nonfinite_steps"]:
            numbers += f"  [red]{record['nonfinite_steps']} skipped[/red]"
        self._bar.update(self._task, completed=record["step"], numbers=numbers)


def data_progress(enabled: bool) -> Callable[[str, int, int], None] | None:
    """Returns a callback (text, done, total) that redraws one line on a terminal, or None elsewhere."""
    if not (enabled and sys.stderr.isatty()):
        return None

    def show(text: str, done: int, total: int) -> None:
        share = f" {done:,} of {total:,}" if total else (f" {done:,}" if done else "")
        end = "\n" if total and done == total else ""
        print(f"\r\x1b[K{text}{share}", end=end, file=sys.stderr, flush=True)

    return show


def note(text: str) -> None:
    """Prints one line for a person to standard error."""
    print(text, file=sys.stderr, flush=True)
