"""Runs commands in local processes, some at a time, each on its share of the cores. Knows nothing of moelab's runs.

The processes are in groups of their own, so that Ctrl-C reaches this process alone, which then asks each of them to
stop (SIGTERM: they save their state). A second signal kills them. If this process dies without a word, as under
kill -9, Linux sends its children the same SIGTERM.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from moelab.sweep import child

_POLL = 0.1  # seconds between looks at the processes


@dataclasses.dataclass(frozen=True)
class Task:
    """A command to run.

    Attributes:
      key: what the caller knows it by.
      command: words.
      log: receives standard output and error, appended.
    """

    key: int
    command: tuple[str, ...]
    log: Path


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a task ended: the exit code (negative: a signal), its seconds, and whether it was asked to stop."""

    exit_code: int
    seconds: float
    stopped: bool


def run(
    tasks: Sequence[Task],
    jobs: int,
    *,
    started: Callable[[Task], None],
    ended: Callable[[Task, Outcome], None],
    tick: Callable[[dict[int, float]], None] = lambda running: None,
) -> bool:
    """Runs tasks in order, `jobs` at a time.

    Args:
      tasks: what to run.
      jobs: from 1.
      started, ended: called for each task, in this thread.
      tick: called all the while with the running tasks' keys and seconds.

    Returns:
      Whether a signal stopped it before all tasks had run.
    """
    waiting, running = deque(tasks), {}
    shares = deque(core_shares(jobs))
    with _stop_signals() as signals:
        try:
            while running or (waiting and not signals):
                while waiting and shares and not signals:
                    task, share = waiting.popleft(), shares.popleft()
                    started(task)
                    running[task.key] = _Process(task, share)
                for key, process in list(running.items()):
                    process.stop(len(signals))
                    if (outcome := process.outcome()) is not None:
                        shares.append(running.pop(key).cores)
                        ended(process.task, outcome)
                tick({key: process.seconds() for key, process in running.items()})
                time.sleep(_POLL if running else 0)
        finally:
            for process in running.values():  # an error of ours: nothing may go on unseen
                process.stop(1)
    return bool(signals)


def core_shares(jobs: int) -> list[list[int]]:
    """Deals this process's cores out; with more jobs than cores each may use all of them.

    >>> [len(share) for share in core_shares(1)] == [len(os.sched_getaffinity(0))]
    True
    """
    available = sorted(os.sched_getaffinity(0))
    return [available[job::jobs] if jobs <= len(available) else available for job in range(jobs)]


def start(
    task: Task, log: IO[bytes], cores: Sequence[int] = (), **options: Any
) -> subprocess.Popen:
    """Starts a task on some cores (empty: as they are), to be stopped with this process (child.py)."""
    prefix = (sys.executable, "-I", "-S", child.__file__)
    words = (*prefix, ",".join(map(str, cores)), str(os.getpid()), *task.command)
    return subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, **options
    )


class _Process:
    """A running task."""

    def __init__(self, task: Task, cores: list[int]):
        self.task, self.cores = task, cores
        self.began, self.signals = time.monotonic(), 0
        task.log.parent.mkdir(parents=True, exist_ok=True)
        with task.log.open("ab") as log:
            self.popen = start(task, log, cores, start_new_session=True)

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def stop(self, signals: int) -> None:
        """Passes on signals that it has not had yet: first the wish, then the order."""
        if signals > self.signals:
            self.signals = signals
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGTERM if signals == 1 else signal.SIGKILL)

    def outcome(self) -> Outcome | None:
        code = self.popen.poll()
        return None if code is None else Outcome(code, self.seconds(), self.signals > 0)


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying of them."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = [signal.signal(n, lambda number, frame: received.append(number)) for n in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
