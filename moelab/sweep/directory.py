"""A sweep directory: which points are finished, failed or left, and the running of those that are left."""

from __future__ import annotations

import contextlib
import fcntl
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moelab import sweep_file
from moelab.report import card as cards
from moelab.sweep import cluster, cost, local
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

EXIT_PREEMPTED = 75  # of a run that was asked to stop and saved its state
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
        if _finished(self.run_directory(entry), entry.config_sha256):
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


def _finished(directory: Path, config_sha256: str) -> bool:
    try:
        return cards.read(directory)["config_sha256"] == config_sha256
    except cards.CardError:
        return False


def command_of(entry: Entry, run_directory: Path) -> tuple[str, ...]:
    """Returns the words that run a point."""
    words = (f"--config={entry.source}", *entry.overrides, f"--workdir={run_directory}")
    return (sys.executable, "-m", "moelab", "run", *words)


def run(
    directory: Directory,
    jobs: int = 1,
    *,
    retry: bool = False,
    drop_checkpoints: bool = False,
    note: Callable[[str], None] = lambda text: None,
    tick: Callable[[dict[str, float]], None] = lambda running: None,
    command_of: Callable[[Entry, Path], Sequence[str]] = command_of,
) -> bool:
    """Runs what is left in local processes and keeps sweep.json up to date.

    Args:
      directory: the sweep directory.
      jobs: processes at a time, each with its share of the cores.
      retry: run failed points again.
      drop_checkpoints: delete a finished run's checkpoints.
      note: receives one line per event.
      tick: called all the while with the seconds of the running points, by directory.
      command_of: the command of a point.

    Returns:
      Whether a signal stopped it; the same call goes on from there.

    Raises:
      SweepError: another process works in the directory.
    """
    with directory.exclusive():
        directory.refresh()  # another sweep may have ended here since
        directory.wait_for_orphans(note)
        chosen = directory.to_run(retry)
        directory.write()
        total = len(chosen)
        tasks = [
            local.Task(i, tuple(command_of(e, directory.run_directory(e))), directory.log(e))
            for i, e in enumerate(chosen)
        ]
        done = 0

        def started(task: local.Task) -> None:
            entry = chosen[task.key]
            entry.status, entry.attempts = RUNNING, entry.attempts + 1
            entry.exit_code, entry.error = None, ""
            with _appended(task.log) as log:
                print("$", shlex.join(task.command), file=log)
            directory.write()
            note(f"{entry.name}: started")

        def ended(task: local.Task, outcome: local.Outcome) -> None:
            nonlocal done
            entry = chosen[task.key]
            _end(directory, entry, outcome)
            done += entry.status != INTERRUPTED
            directory.write()
            if drop_checkpoints and entry.status == FINISHED:
                shutil.rmtree(directory.run_directory(entry) / "checkpoints", ignore_errors=True)
            note(f"[{done}/{total}] {entry.name}: {_told(directory, entry)}")

        def ticked(running: dict[int, float]) -> None:
            tick({chosen[key].directory: seconds for key, seconds in running.items()})

        return local.run(tasks, jobs, started=started, ended=ended, tick=ticked)


def _end(directory: Directory, entry: Entry, outcome: local.Outcome) -> None:
    entry.exit_code, entry.seconds = outcome.exit_code, outcome.seconds
    if _finished(directory.run_directory(entry), entry.config_sha256):
        entry.status = FINISHED
    elif outcome.stopped or outcome.exit_code == EXIT_PREEMPTED:
        entry.status = INTERRUPTED
    else:
        entry.status, entry.error = FAILED, _last_line(directory.log(entry))


def _last_line(log: Path) -> str:
    """Returns the last line that was printed; our own, with the command, is none."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode("utf-8", "replace").splitlines()
    told = [line.strip() for line in lines if line.strip() and not line.startswith("$ ")]
    return told[-1][:300] if told else ""


def _told(directory: Directory, entry: Entry) -> str:
    if entry.status == FAILED:
        return f"failed with exit code {entry.exit_code}: {entry.error or 'it printed nothing'}"
    if entry.status == INTERRUPTED:
        return "stopped; the same command goes on from there"
    rows = cards.read(directory.run_directory(entry))["evaluation"]["rows"]
    bits = rows[0]["bits_per_byte"].get("all") if rows else None
    quality = f", {bits:.4f} bits per byte" if isinstance(bits, float) else ""
    return f"finished in {entry.seconds:.0f} s{quality}"


@contextlib.contextmanager
def _appended(log: Path) -> Iterator[Any]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        yield file


def submit(
    directory: Directory,
    jobs: int,
    *,
    retry: bool = False,
    cluster_name: str = "slurm",
    parameters: dict[str, Any] | None = None,
    note: Callable[[str], None] = lambda text: None,
    command_of: Callable[[Entry, Path], Sequence[str]] = command_of,
) -> list[str]:
    """Submits what is left as one job array; returns the jobs' ids. Later calls see how far they are.

    Args:
      directory: the sweep directory, on a file system that the nodes share.
      jobs: how many run at a time.
      retry: submit failed points again.
      cluster_name: slurm; or submitit's local and debug, for trying things out.
      parameters: of submitit, as timeout_min or slurm_partition.
      note: receives one line per event.
      command_of: the command of a point.

    Raises:
      SweepError: submitit or Slurm is missing, or a parameter is wrong.
    """
    with directory.exclusive():
        directory.refresh()
        chosen = directory.to_run(retry)
        directory.write()
        if not chosen:
            return []
        tasks = [
            local.Task(
                i, tuple(command_of(e, directory.run_directory(e).absolute())), directory.log(e)
            )
            for i, e in enumerate(chosen)
        ]
        ids = cluster.submit(tasks, directory.path, jobs, cluster_name, parameters or {})
        for entry, job in zip(chosen, ids, strict=True):
            entry.status, entry.job, entry.error = SUBMITTED, job, ""
            entry.attempts += 1
        directory.write()
        note(f"submitted {len(ids)} jobs: {ids[0]} to {ids[-1]}")
        return ids
