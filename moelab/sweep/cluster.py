"""A sweep as a Slurm job array, through submitit (extra `cluster`), which also has local stand-ins for trials.

A job that nears its time limit, or is pre-empted, gets SIGUSR2 from Slurm: its run is asked to save its state, and the
job is queued again, to go on from there.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moelab.sweep.local import Task, start
from moelab.sweep_file import SweepError

_MISSING = "a cluster wants the extra `cluster` (pip install 'moelab[cluster]')"
_ALIVE = ("PENDING", "RUNNING", "REQUEUE", "SUSPENDED", "COMPLETING", "CONFIGURING", "RESIZING")
_UNKNOWN_FOR = 600.0  # seconds for which a job that Slurm does not know is taken for on its way


class Job:
    """A task as a node runs it; submitit pickles it, and calls `checkpoint` when time is short."""

    def __init__(self, task: Task):
        self.task = task
        self.process: subprocess.Popen | None = None

    def __call__(self) -> int:
        self.task.log.parent.mkdir(parents=True, exist_ok=True)
        with self.task.log.open("ab") as log:
            self.process = start(self.task, log)
        code = self.process.wait()
        if code:
            raise RuntimeError(f"exit code {code}; see {self.task.log}")
        return code

    def checkpoint(self):
        """Stops the run, which saves its state, and asks for another job that goes on.

        submitit calls this in a signal handler, within __call__'s wait(), which holds the lock of a second wait().
        """
        import submitit

        if self.process is not None:
            self.process.terminate()
            with contextlib.suppress(ChildProcessError):  # it had ended, and wait() has its code
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(Job(self.task))


def submit(
    tasks: Sequence[Task], folder: Path, jobs: int | None, cluster: str, parameters: dict[str, Any]
) -> list[str]:
    """Submits tasks as one array of which `jobs` run at a time (None: as many as there is room for); returns their ids.

    Raises:
      SweepError: submitit or the cluster is missing, or a parameter is unknown.
    """
    try:
        import submitit
    except ImportError:
        raise SweepError(_MISSING) from None
    try:
        executor = submitit.AutoExecutor(folder=_folder(folder), cluster=cluster)
        limit = {"slurm_array_parallelism": jobs or len(tasks)} if cluster == "slurm" else {}
        executor.update_parameters(**{"name": "moelab", **limit, **parameters})
        with executor.batch():
            submitted = [executor.submit(Job(task)) for task in tasks]
        if cluster == "debug":  # it runs a job, here, when asked how it went
            for job in submitted:
                job.exception()
    except (RuntimeError, NameError, TypeError, ValueError, OSError, AssertionError) as error:
        raise SweepError(f"{cluster}: {' '.join(str(error).split())[:400]}") from None
    return [f"{cluster}:{job.job_id}" for job in submitted]


def _folder(folder: Path) -> Path:
    return folder.absolute() / "slurm"


def alive(folder: Path, job: str) -> bool:
    """Says whether a job still waits or runs.

    Args:
      folder: the sweep directory.
      job: as `submit` returned it.

    Raises:
      SweepError: submitit is missing.
    """
    cluster, _, job_id = job.partition(":")
    if cluster == "local":  # a job is named after its process
        return os.path.exists(f"/proc/{job_id}")
    if cluster != "slurm":
        return False
    try:
        import submitit
    except ImportError:
        raise SweepError(_MISSING) from None
    found = submitit.SlurmJob(folder=_folder(folder), job_id=job_id)
    state = found.state.upper()
    if state != "UNKNOWN":
        return state.startswith(_ALIVE)
    # Slurm's accounting learns of a job with a delay.
    submitted = found.paths.submitted_pickle
    return submitted.exists() and time.time() - submitted.stat().st_mtime < _UNKNOWN_FOR
