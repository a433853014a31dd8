"""Between the start of a process and its command: `python -I -S child.py CORES PARENT COMMAND...`.

Takes its cores, asks Linux for SIGTERM when its parent dies, ignores SIGUSR2 (Slurm sends it to every process of a job;
it is meant for the one above), and becomes the command. A script of its own, since what `subprocess` runs between fork
and exec may dead-lock in a process with threads, as one with JAX is.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Becomes the command."""
    cores, parent, *command = sys.argv[1:]
    if cores:
        os.sched_setaffinity(0, map(int, cores.split(",")))
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):  # it died before we could ask
            sys.exit(75)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
