"""sweep.json: what a sweep directory holds, point by point. Written by `moelab.sweep`, read by reports too.

The file is a record for people and reports. Whether a point is finished is decided by the result card in its run
directory, so that nothing is lost or repeated when a process dies between two writes.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from moelab import atomic
from moelab.errors import UserError

NAME = "sweep.json"
SCHEMA = 1
WAITING, RUNNING, SUBMITTED = "waiting", "running", "submitted"
FINISHED, FAILED, INTERRUPTED = "finished", "failed", "interrupted"
STATUSES = (WAITING, RUNNING, SUBMITTED, FINISHED, FAILED, INTERRUPTED)


class SweepError(UserError):
    """A sweep that cannot be read, planned or run; the message is ready for the user."""


@dataclasses.dataclass
class Entry:
    """One point of a sweep and how far it is.

    Attributes:
      name: readable: the arm and the seed.
      directory: of its run, below the sweep directory.
      source: the config file, with its preset.
      overrides: as `moelab run` takes them.
      config_sha256: of the whole config.
      status: one of STATUSES.
      exit_code: of the last attempt; negative: the signal that ended it.
      attempts: how often it was started.
      seconds: of the last attempt.
      error: the last line that a failed attempt printed.
      job: of the cluster; empty for local runs.
    """

    name: str
    directory: str
    source: str
    overrides: list[str]
    config_sha256: str
    status: str = WAITING
    exit_code: int | None = None
    attempts: int = 0
    seconds: float | None = None
    error: str = ""
    job: str = ""


@dataclasses.dataclass
class Sweep:
    """A sweep directory's record.

    Attributes:
      command: the last one that planned it.
      config: the experiment file.
      sweeps: names of the generators that were multiplied.
      points: in the order in which they run.
    """

    command: str
    config: str
    sweeps: list[str]
    points: list[Entry]


def is_sweep(directory: Path | str) -> bool:
    """Says whether a path is a sweep directory."""
    return (Path(directory) / NAME).is_file()


def read(directory: Path | str) -> Sweep:
    """Reads a sweep directory's record.

    Raises:
      SweepError: none there, damaged, or of another schema.
    """
    path = Path(directory) / NAME
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        schema = value["schema"]
        if schema != SCHEMA:
            raise SweepError(f"{path}: schema is {schema!r}; this moelab reads {SCHEMA}")
        points = [Entry(**point) for point in value["points"]]
        for point in points:
            for name in ("name", "directory", "status"):
                if not isinstance(text := getattr(point, name), str):
                    raise TypeError(f"a point's {name} is {text!r}, no text")
        wrong = [point.status for point in points if point.status not in STATUSES]
        if wrong:
            raise SweepError(f"{path}: no status {wrong[0]!r}; there are {', '.join(STATUSES)}")
        return Sweep(value["command"], value["config"], value["sweeps"], points)
    except FileNotFoundError:
        raise SweepError(f"{directory} is no sweep directory: it holds no {NAME}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = f"{type(error).__name__}: {error}"
        raise SweepError(f"{path}: damaged ({' '.join(text.split())})") from None


def write(sweep: Sweep, directory: Path | str) -> None:
    """Writes the record by an atomic replacement."""
    text = json.dumps({"schema": SCHEMA, **dataclasses.asdict(sweep)}, indent=1, allow_nan=False)
    atomic.write_text(Path(directory) / NAME, text + "\n")
