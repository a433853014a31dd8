"""What a person sees of a running sweep: on a terminal the running points with their step and loss, else lines."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Self

from moelab import sweep_file
from moelab.cli import output
from moelab.report import formatting as fmt

_EVERY = 1.0  # seconds between drawings


class Display:
    """Draws on standard error if that is a terminal; what happens is told in lines anyway."""

    def __init__(self, directory, enabled: bool):
        self._directory, self._live, self._last = directory, None, 0.0
        if enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(stderr=True, highlight=False)
            self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def note(self, text: str) -> None:
        """Tells one event."""
        if self._live:
            self._live.console.print(text, markup=False)
        else:
            output.note(text)

    def tick(self, running: dict[str, float]) -> None:
        """Draws the running points, given their seconds by directory."""
        now = time.monotonic()
        if not self._live or now - self._last < _EVERY:
            return
        self._last = now
        self._live.update(self._table(running), refresh=True)

    def _table(self, running: dict[str, float]):
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        entries = {entry.directory: entry for entry in self._directory.entries}
        for name, seconds in running.items():
            told = last_step(self._directory.path / name / "metrics.jsonl")
            cells = entries[name].name, fmt.duration(seconds), told
            table.add_row(*map(Text, cells))
        finished = len(self._directory.with_status(sweep_file.FINISHED))
        failed = len(self._directory.with_status(sweep_file.FAILED))
        text = f"{finished} of {len(entries)} finished" + (f", {failed} failed" if failed else "")
        table.add_row(Text(text, style="bold"), "", "")
        return table


def last_step(journal: Path) -> str:
    """Says how far a run is, from the end of its metrics.jsonl; the last line may be half written."""
    try:
        with journal.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 65536))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return "starting"
    for line in reversed(lines):
        try:
            record = json.loads(line)
            if record["kind"] == "train":
                return f"step {record['step']}, loss {fmt.fixed(record['loss'], 3)}"
        except (ValueError, KeyError, TypeError):
            continue
    return "compiling"
