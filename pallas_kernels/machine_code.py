"""The machine code of one kernel: assembled from PTX without a GPU, disassembled, and counted.

`ptxas` and `nvdisasm` come with the package triton. Its `ptxas-blackwell` is the newer of two and the one used here,
for every architecture: it knows sm_107a, and reads the PTX that triton writes for Blackwell.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

MOSAIC_SUFFIX = "_mosaic_gpu_kernel"  # of its entry functions
SPILLING = r"(LDL|STL)\b"  # loads and stores of a thread's local memory
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
_LABEL = re.compile(r"^(\.L\w+):")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel, compiled.

    Attributes:
      name: of its entry function.
      arch: "sm_100a".
      ptx, sass: the code, as text; no sass where nvdisasm does not know the architecture (sm_107a).
      registers: 32-bit registers of a thread.
      threads: of a block, where the PTX says so, else 0.
      stack_bytes, spill_bytes: local memory of a thread: arrays, and what did not fit into registers.
      shared_bytes: shared memory of a block, static and dynamic.
      tmem_columns: columns of tensor memory that it allocates.
    """

    name: str
    arch: str
    ptx: str = dataclasses.field(repr=False)
    sass: str = dataclasses.field(repr=False)
    registers: int = 0
    threads: int = 0
    stack_bytes: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    tmem_columns: int = 0

    def ptx_count(self, pattern: str) -> int:
        """Counts matches of a regular expression in the PTX."""
        return len(re.findall(pattern, self.ptx))

    def sass_count(self, pattern: str) -> int:
        """Counts instructions whose name (`UTCOMMA.4X`) begins as the regular expression says."""
        return sum(n for name, n in self.opcodes.items() if re.match(pattern, name))

    @functools.cached_property
    def opcodes(self) -> Counter[str]:
        """How often each instruction occurs, by its name with modifiers."""
        return Counter(name for _, name in instructions(self.sass))

    def per_step(self, pattern: str) -> int:
        """Counts instructions in the innermost loop that has any of them: those of one step, such as one k-step.

        A loop is what lies between a label and a branch back to it; 0 if the instructions are in no loop.
        """
        lines = [line for line, name in instructions(self.sass) if re.match(pattern, name)]
        for start, end in sorted(loops(self.sass), key=lambda loop: loop[1] - loop[0]):
            inside = sum(start <= line <= end for line in lines)
            if inside:
                return inside
        return 0


def instructions(sass: str) -> list[tuple[int, str]]:
    """Lists (line, name with modifiers) of every instruction of a disassembly."""
    found = []
    for number, line in enumerate(sass.splitlines()):
        match = _INSTRUCTION.match(line)
        if match:
            found.append((number, match.group(1)))
    return found


def loops(sass: str) -> list[tuple[int, int]]:
    """Lists (first line, last line) of what a branch jumps back over."""
    labels, found = {}, []
    for number, line in enumerate(sass.splitlines()):
        label = _LABEL.match(line)
        if label:
            labels[label.group(1)] = number
        match = _INSTRUCTION.match(line)
        if match and match.group(1).startswith(("BRA", "JMP")):
            jump = re.search(r"`\((\.L\w+)\)", match.group(2))
            if jump and jump.group(1) in labels:
                found.append((labels[jump.group(1)], number))
    return found


def tool(name: str) -> Path | None:
    """Returns a program of triton's package, or None if triton is not installed."""
    spec = importlib.util.find_spec("triton")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        program = Path(folder) / "backends" / "nvidia" / "bin" / name
        if program.exists():
            return program
    return None


def assembler() -> Path | None:
    """Returns the ptxas that everything is assembled with."""
    return tool("ptxas-blackwell") or tool("ptxas")


@functools.cache
def architectures() -> frozenset[str]:
    """Returns the architectures that ptxas knows."""
    return frozenset(re.findall(r"'(sm_\w+)'", _run([assembler(), "--help"])))


def assemble(ptx: str, shared_bytes: int = 0) -> Kernel:
    """Assembles the PTX of one kernel for the architecture that it names, and disassembles the result.

    Args:
      ptx: with one entry function.
      shared_bytes: dynamic shared memory that the kernel is launched with; the PTX does not say.

    Raises:
      ValueError: no or several entry functions.
      RuntimeError: ptxas refuses the code; what it says.
    """
    _entry(ptx)
    arch = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE).group(1)
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx, encoding="utf-8")
        said = _run([assembler(), "-v", "-O3", f"-arch={arch}", source, "-o", binary])
        return disassemble(ptx, binary, said, shared_bytes)


def disassemble(ptx: str, binary: Path, said: str, shared_bytes: int = 0) -> Kernel:
    """Reads machine code that is there already.

    Args:
      ptx: what it was assembled from.
      binary: the machine code.
      said: what ptxas said about it, with -v.
      shared_bytes: dynamic shared memory.

    Raises:
      ValueError: no or several entry functions.
    """
    threads = re.search(r"\.(?:maxntid|reqntid)\s+([\d, ]+)", ptx)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    return Kernel(
        name=_entry(ptx).removesuffix(MOSAIC_SUFFIX),
        arch=re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE).group(1),
        ptx=ptx,
        sass=_sass(binary),
        registers=_number(r"Used (\d+) registers", said),
        threads=math.prod(map(int, threads.group(1).split(","))) if threads else 0,
        stack_bytes=_number(r"(\d+) bytes stack frame", said),
        spill_bytes=int(spills.group(1)) + int(spills.group(2)),
        shared_bytes=shared_bytes + _number(r"(\d+) bytes smem", said, default=0),
        tmem_columns=allocated_tmem(ptx),
    )


def _sass(binary: Path) -> str:
    try:
        return _run([tool("nvdisasm"), "-c", binary])
    except RuntimeError as error:
        if "Cannot decode architecture" in str(error):
            return ""
        raise


def entries(ptx: str) -> list[str]:
    """Returns the names of the entry functions in PTX."""
    return re.findall(r"\.entry\s+(\w+)", ptx)


def _entry(ptx: str) -> str:
    names = entries(ptx)
    if len(names) != 1:
        raise ValueError(f"one entry function is read at a time, got {names}")
    return names[0]


def allocated_tmem(ptx: str) -> int:
    """Sums the columns of tensor memory that `tcgen05.alloc` asks for; registers are followed to their constants.

    Raises:
      ValueError: a count that is no constant.
    """
    total = 0
    for columns in re.findall(r"tcgen05\.alloc[^;]*?,\s*(%\w+|\d+)\s*;", ptx):
        if columns.startswith("%"):
            constants = set(re.findall(rf"mov\.[bu]32\s+{columns},\s*(\d+)\s*;", ptx))
            if len(constants) != 1:
                raise ValueError(f"tcgen05.alloc of {columns} columns, which is no constant")
            columns = constants.pop()
        total += int(columns)
    return total


def _number(pattern: str, text: str, default: int | None = None) -> int:
    match = re.search(pattern, text)
    if not match and default is None:
        raise RuntimeError(f"ptxas does not say {pattern!r}: {text[-400:]}")
    return int(match.group(1)) if match else default


def _run(command: list[object]) -> str:
    """Runs a program; returns what it prints, on either stream."""
    if command[0] is None:
        raise RuntimeError("triton is not installed: pip install 'moelab[aot]'")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-600:]
        raise RuntimeError(f"{Path(command[0]).name} failed: {said}")
    return done.stdout + done.stderr
