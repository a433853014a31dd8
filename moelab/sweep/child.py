"""Between the start of a process and its command: `python -I -S child.py CORES PARENT COMMAND...`.

Takes its cores, asks glibc for huge pages unless the caller tunes malloc, asks Linux for SIGTERM when its parent dies,
ignores SIGUSR2 (Slurm sends it to every process of a job; it is meant for the one above), and becomes the command. A
script of its own, since what `subprocess` runs between fork and exec may dead-lock in a process with threads, as one
with JAX is.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
# glibc reads it when a program starts. XLA:CPU allocates a step's scratch memory anew in every step, and without huge
# pages a fifth of a small run is page faults: the step of experiments/families/routing.py takes 0.271 s or 0.202 s.
_MALLOC = ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")


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
    os.environ.setdefault(*_MALLOC)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
