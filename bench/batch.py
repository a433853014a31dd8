"""Runs many small trainings, several at a time, each on its share of the cores."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_chains(chains: Iterable[Sequence[Callable[[list[int]], bool]]], jobs: int) -> int:
    """Runs chains beside each other; a chain stops where one of its tasks fails.

    Args:
      chains: sequences of tasks; a task takes the cores that it may use and returns whether it went well.
      jobs: how many chains at a time.

    Returns:
      The number of chains that stopped.
    """
    shares = queue.SimpleQueue()
    available = sorted(os.sched_getaffinity(0))
    for job in range(jobs):
        shares.put(available[job::jobs] or available)

    def follow(chain: Sequence[Callable[[list[int]], bool]]) -> bool:
        mine = shares.get()
        try:
            return all(task(mine) for task in chain)
        finally:
            shares.put(mine)

    with futures.ThreadPoolExecutor(jobs) as pool:
        return sum(not good for good in pool.map(follow, list(chains)))


def moelab(*words: str, cores: list[int]) -> bool:
    """Runs a moelab command from the repository's root on some cores; returns whether it went well."""
    done = subprocess.run(
        [sys.executable, "-m", "moelab", *words],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    return done.returncode == 0
