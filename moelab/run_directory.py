"""A run directory belongs to one config and to one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path

from moelab import atomic
from moelab.errors import ConfigError


def write_config(workdir: Path, entry: dict) -> None:
    """Writes config.json, whole or not at all, where there is none."""
    path = workdir / "config.json"
    if not path.exists():
        atomic.write_text(path, json.dumps(entry, indent=1) + "\n")


@contextlib.contextmanager
def exclusive(workdir: Path) -> Iterator[None]:
    """Holds the run directory's lock; the system releases it when the process ends, however it ends."""
    with (workdir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is working in {workdir}") from None
        yield
