"""Keeps the machine code that XLA assembles, so that it can be read.

XLA calls the `ptxas` that it finds first. Inside `keeping` that is a script, which calls the real one and keeps the
PTX, the machine code and the messages of every kernel.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pallas_kernels import machine_code
from pallas_kernels.machine_code import Kernel

# Called by XLA in the place of ptxas: keeps what it reads, writes and says, under names that sort by time.
_ASSEMBLER = """#!/bin/sh
if [ -z "$KEEP" ]; then exec "{ptxas}" "$@"; fi
kept="$KEEP/$(date +%s%N)-$$"
for word in "$@"; do
  if [ "$before" = -o ]; then binary="$word"; elif [ -f "$word" ]; then cp "$word" "$kept.ptx"; fi
  before="$word"
done
if [ -z "$binary" ]; then exec "{ptxas}" "$@"; fi
"{ptxas}" -v "$@" 2>"$kept.txt"
code=$?
cat "$kept.txt" >&2
cp "$binary" "$kept.cubin" 2>/dev/null
exit $code
"""
_KEEP = "PALLAS_KERNELS_KEEP_CODE"


@contextlib.contextmanager
def keeping(folder: str) -> Iterator[None]:
    """Has XLA find an assembler that keeps the code of every kernel in a folder."""
    path = f"{_assembler_folder()}{os.pathsep}{os.environ.get('PATH', '')}"
    wanted = {_KEEP: folder, "PATH": path}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    """A folder for as long as the process lives."""
    return tempfile.TemporaryDirectory(prefix="ptxas-")


def _assembler_folder() -> Path:
    """Returns a folder with a program `ptxas`, the name that XLA looks for."""
    program = Path(_folder().name) / "ptxas"
    if not program.exists():
        text = _ASSEMBLER.replace("{ptxas}", str(machine_code.assembler())).replace("KEEP", _KEEP)
        program.write_text(text, encoding="utf-8")
        program.chmod(0o755)
    return program.parent


def kernels(
    folder: Path, mosaic: Mapping[str, int], triton: Sequence[tuple[str, int]]
) -> Iterator[Kernel]:
    """Reads the kernels of Mosaic and Triton, in the order in which they were assembled.

    Args:
      folder: what the assembler kept; XLA's own kernels too.
      mosaic: function -> dynamic shared memory.
      triton: (PTX, dynamic shared memory); assembled here where XLA leaves that to the first launch.
    """
    shared_of = dict(triton)
    for path in sorted(folder.glob("*.cubin")):
        ptx = path.with_suffix(".ptx").read_text(encoding="utf-8")
        name = "".join(machine_code.entries(ptx)).removesuffix("_kernel")
        shared = shared_of.pop(ptx, mosaic.get(name))
        if shared is not None:
            said = path.with_suffix(".txt").read_text(encoding="utf-8")
            yield machine_code.disassemble(ptx, path, said, shared)
    for ptx, shared in shared_of.items():
        yield machine_code.assemble(ptx, shared)
