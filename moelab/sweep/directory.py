"""A sweep directory: which points are finished, failed or left."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from moelab import sweep_file
from moelab.report import card as cards
from moelab.sweep import cluster, cost
from moelab.sweep.points import Point
from moelab.sweep_file import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    RUNNING,
    SUBMITTED,
    WAITING,
    Entry,
    SweepError,
)

_PATIENCE = 120.0  # seconds that a run of a killed sweep may take to save its state and leave


class Directory:
    """The record of a sweep directory, brought up to date with what its run directories hold.

    Attributes:
      path: the sweep directory; it need not exist yet.
      entries: one per point, in the order of the points.
      others: entries of earlier commands that the points do not have; they are kept.
    """

    def __init__(
        self, path: Path | str, points: Sequence[Point], command: str, config: str, sweeps: list
    ):
        self.path, self._points = Path(path), list(points)
        self._head = (command, config, sweeps)
        # While another sweep runs here, its points may be starting: what it says of them holds.
        self.refresh(busy=_held(self.path / ".lock"))

    def refresh(self, busy: bool = False) -> None:
        """Reads the record and looks into the run directories; busy: another sweep is running here."""
        earlier = self._earlier()
        self.entries = [_entry(point, earlier) for point in self._points]
        mine = {entry.directory for entry in self.entries}
        self.others = [entry for name, entry in earlier.items() if name not in mine]
        for entry in (*self.entries, *self.others):
            if not (busy and entry.status == RUNNING):
                self._look(entry)

    def _earlier(self) -> dict[str, Entry]:
        if self.path.exists() and not self.path.is_dir():
            raise SweepError(f"{self.path} is a file; --workdir wants a directory")
        if sweep_file.is_sweep(self.path):
            return {entry.directory: entry for entry in sweep_file.read(self.path).points}
        strangers = (
            [p for p in self.path.iterdir() if p.name[0] != "."] if self.path.exists() else []
        )
        if strangers:
            raise SweepError(
                f"{self.path} is not empty and holds no sweep; choose another --workdir"
            )
        return {}

    def _look(self, entry: Entry) -> None:
        """The run directory decides what is finished; what was running when its sweep died is interrupted."""
        if is_finished(self.run_directory(entry), entry.config_sha256):
            entry.status, entry.error = FINISHED, ""
        elif entry.status == FINISHED:
            entry.status = WAITING  # its card is gone
        elif entry.status == RUNNING and not self._is_locked(entry):
            entry.status = INTERRUPTED
        elif entry.status == SUBMITTED and not cluster.alive(self.path, entry.job):
            entry.status = FAILED
            entry.error = f"job {entry.job} ended without a result (see {self.path}/logs)"

    def run_directory(self, entry: Entry) -> Path:
        """Returns where a point's run lies."""
        return self.path / entry.directory

    def log(self, entry: Entry) -> Path:
        """Returns where what a point printed lies."""
        return self.path / "logs" / f"{entry.directory}.log"

    def with_status(self, *statuses: str) -> list[Entry]:
        """Returns the entries of some statuses, in order."""
        return [entry for entry in self.entries if entry.status in statuses]

    def to_run(self, retry: bool) -> list[Entry]:
        """Returns what is left: all that is neither finished nor on its way; failed points on request."""
        return self.with_status(WAITING, INTERRUPTED, *([FAILED] if retry else []))

    def rate(self) -> cost.Rate | None:
        """Measures the finished runs of this directory."""
        done = [e for e in (*self.entries, *self.others) if e.status == FINISHED]
        once = ((self.run_directory(e), e.seconds if e.attempts == 1 else None) for e in done)
        return cost.measured(once)

    def write(self) -> None:
        """Writes sweep.json."""
        self.path.mkdir(parents=True, exist_ok=True)
        sweep_file.write(sweep_file.Sweep(*self._head, [*self.entries, *self.others]), self.path)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Holds the directory: two sweeps in one would start the same points twice.

        Raises:
          SweepError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SweepError(f"another sweep is running in {self.path}") from None
            yield

    def _is_locked(self, entry: Entry) -> bool:
        """Says whether a process works in the run directory (moelab.train holds its lock)."""
        return _held(self.run_directory(entry) / ".lock")

    def wait_for_orphans(self, note: Callable[[str], None]) -> None:
        """Waits until the runs of a sweep that was killed have saved their state and left."""
        end = time.monotonic() + _PATIENCE
        for entry in self.with_status(RUNNING):
            if self._is_locked(entry):
                note(f"waiting for the process that still works in {self.run_directory(entry)}")
            while self._is_locked(entry):
                if time.monotonic() > end:
                    raise SweepError(
                        f"another process is working in {self.run_directory(entry)}; end it, or wait"
                    )
                time.sleep(0.5)
            self._look(entry)


def _held(lock: Path) -> bool:
    """Says whether a process holds a lock file."""
    if not lock.is_file():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _entry(point: Point, earlier: dict[str, Entry]) -> Entry:
    known = earlier.get(point.directory)
    if known is not None and known.config_sha256 == point.sha256:
        return known
    return Entry(
        point.name, point.directory, point.source, list(point.overrides), config_sha256=point.sha256
    )


def is_finished(directory: Path, config_sha256: str) -> bool:
    """Says whether a run directory holds the card of a config."""
    try:
        return cards.read(directory)["config_sha256"] == config_sha256
    except cards.CardError:
        return False
