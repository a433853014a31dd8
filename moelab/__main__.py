"""`python -m moelab` is the console script `moelab`."""

import os
import sys

from moelab.cli import main

_TRAIN = ("run", "verify")
# glibc reads it when a program starts. XLA:CPU allocates a step's scratch memory anew in every step, and without huge
# pages a quarter of a small run goes to page faults: a step of experiments/families/routing.py takes 0.271 s against
# 0.202 s.
_MALLOC, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def console() -> int:
    """Runs this process's command; one that trains starts itself again with huge pages.

    Not where malloc is tuned already (GLIBC_TUNABLES, be it empty), under a debugger, or without glibc.
    """
    trains = len(sys.argv) > 1 and sys.argv[1] in _TRAIN
    if trains and _MALLOC not in os.environ and sys.executable and not sys.gettrace() and _glibc():
        os.environ[_MALLOC] = _HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return main()


def _glibc() -> bool:
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, OSError, ValueError):  # another operating system or C library
        return False


if __name__ == "__main__":
    sys.exit(console())
