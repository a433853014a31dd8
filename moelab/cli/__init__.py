"""The command line: `moelab COMMAND`. Standard output carries results, standard error everything else.

Exit codes: 0 done, 2 the user's error, 1 a crash, 3 stopped after non-finite losses, 75 pre-empted and resumable, 130
interrupted. No command's imports are paid by another: jax is imported by the commands that compute.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from moelab.cli import arguments
from moelab.errors import UserError

USER_ERROR, CRASH, INTERRUPTED = 2, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the words after `moelab`; None: of this process.

    Returns:
      The exit code.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if hasattr(sys.stdout, "reconfigure"):  # what a terminal lacks is replaced, no traceback
        sys.stdout.reconfigure(errors="replace")
    try:
        args = arguments.parse(argv)
        if args is None:  # help or version was printed
            return 0
        module, _, function = args.handler.partition(":")
        return getattr(importlib.import_module(f"moelab.cli.{module}"), function)(args)
    except UserError as error:
        return _failed(argv, str(error), USER_ERROR)
    except KeyboardInterrupt:
        return _failed(argv, "interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        hint = "" if "--debug" in argv else " (--debug shows where)"
        return _failed(argv, text + hint, CRASH)


def _failed(argv: Sequence[str], message: str, code: int) -> int:
    """Prints an error of one or more lines; the traceback only with --debug."""
    if "--debug" in argv and code != INTERRUPTED:
        import traceback

        traceback.print_exc()
    for line in message.splitlines():
        print(f"moelab: {line}", file=sys.stderr)
    return code
