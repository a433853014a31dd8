"""Runs or submits what is left of a sweep directory, and keeps its record."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moelab.report import card as cards
from moelab.sweep import cluster, local
from moelab.sweep.directory import Directory, is_finished
from moelab.sweep_file import FAILED, FINISHED, INTERRUPTED, RUNNING, SUBMITTED, Entry

EXIT_PREEMPTED = 75  # of a run that was asked to stop and saved its state


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
    if is_finished(directory.run_directory(entry), entry.config_sha256):
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
    jobs: int | None,
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
      jobs: how many run at a time; None: as many as the cluster has room for.
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
