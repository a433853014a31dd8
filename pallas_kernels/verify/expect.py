"""Expectations of compiled kernels: each function here returns one, a function from `Compiled` to a list of problems.

`kernel` says which kernel of the program is meant, by the beginning of its name; "" if there is only one. Where no
disassembler knows the architecture, what is counted in machine code elsewhere is counted in PTX alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from pallas_kernels import hlo_text, machine_code
from pallas_kernels.aot import Compiled
from pallas_kernels.formats import FORMATS
from pallas_kernels.machine_code import Kernel

Expectation = Callable[[Compiled], list[str]]
# Instructions of tensor cores, by generation: tcgen05, wgmma, mma.sync.
TCGEN05, WGMMA, MMA_SYNC = r"UTC[A-Z]*MMA", r"[A-Z]GMMA", r"([HQIOBD]MMA|MMA)\b"
MMA = rf"({TCGEN05}|{WGMMA}|{MMA_SYNC})"
SCALE_COPY, TMA_LOAD = "UTCCP", "UTMALDG"
_BY_16 = r"UTCOMMA.*\.(4X|BLOCK16)\b"
PTX_SCALE_COPY = r"\btcgen05\.cp\b"
PTX_TMA_LOAD = r"\bcp\.async\.bulk\.tensor\.\dd\.shared::\w+\.global\b"
PTX_MMA = r"\b(?:tcgen05\.mma|wgmma\.mma_async|mma\.sync)[\w.:]*"
_KERNEL_CALLS = ("mosaic_gpu", "triton_kernel_call")
_MOST_REGISTERS = 255  # of one thread


def _for_kernel(check: Callable[[Kernel], list[str]], kernel: str) -> Expectation:
    """Applies a check to one kernel of a program; that it is not there is a problem too."""

    def expectation(compiled: Compiled) -> list[str]:
        try:
            found = compiled.kernel(kernel)
        except ValueError as error:
            return [str(error)]
        return [f"{found.name}: {problem}" for problem in check(found)]

    return expectation


def _counted(what: str, found: int, wanted: int) -> list[str]:
    return [] if found == wanted else [f"{found} {what} instead of {wanted}"]


def _in_sass(found: Kernel, name: str, wanted: int) -> list[str]:
    """Counts an instruction in machine code, and in the innermost loop that has it: both must be so many."""
    if not found.sass:
        return []
    return [
        *_counted(name, found.sass_count(name), wanted),
        *_counted(f"{name} in its innermost loop", found.per_step(name), wanted),
    ]


def block_scaled_mma(format: str, count: int, *, ctas: int = 1, kernel: str = "") -> Expectation:
    """Expects `count` block-scaled FP4 MMAs of tcgen05 in each step, in one loop, and no other MMA at all.

    In PTX: kind::mxf4nvf4.block_scale.scale_vec::4X (a scale per 16) or ::2X (per 32); in machine code UTCOMMA, for the
    former with .4X (sm_100) or .BLOCK16 (sm_103).
    """
    vector = "4X" if FORMATS[format].block == 16 else "2X"
    name = f"kind::mxf4nvf4.block_scale.scale_vec::{vector}"
    pattern = rf"tcgen05\.mma\.cta_group::{ctas}\.{re.escape(name)}\b"

    def check(found: Kernel) -> list[str]:
        what = f"tcgen05.mma.cta_group::{ctas}.{name} in PTX"
        problems = [
            *_counted(what, found.ptx_count(pattern), count),
            *_counted("MMAs of any kind in PTX", found.ptx_count(PTX_MMA), count),
            *_in_sass(found, "UTCOMMA", count),
        ]
        if found.sass:
            by_16 = sum(n for code, n in found.opcodes.items() if re.match(_BY_16, code))
            problems += _counted("UTCOMMA by blocks of 16", by_16, count if vector == "4X" else 0)
            problems += _counted("MMAs of any kind", found.sass_count(MMA), count)
        return problems

    return _for_kernel(check, kernel)


def mma(ptx: str, sass: str, *, kernel: str = "", count: int | None = None) -> Expectation:
    """Expects MMAs whose PTX and machine code match, and none that do not.

    Args:
      ptx, sass: regular expressions for the whole of an instruction's name: r"wgmma\\.mma_async.*", "HGMMA.*".
      kernel: which.
      count: how many, in both; None: at least one.
    """

    def check(found: Kernel) -> list[str]:
        problems = []
        in_ptx = re.findall(PTX_MMA, found.ptx)
        in_sass = [code for _, code in machine_code.instructions(found.sass) if re.match(MMA, code)]
        looked_at = [("PTX", ptx, in_ptx), ("machine code", sass, in_sass)]
        for what, pattern, names in looked_at[: 2 if found.sass else 1]:
            others = sorted({name for name in names if not re.fullmatch(pattern, name)})
            right = sum(bool(re.fullmatch(pattern, name)) for name in names)
            if others:
                problems.append(f"MMAs in {what} that are not {pattern}: {', '.join(others)}")
            if count is not None:
                problems += _counted(f"{pattern} in {what}", right, count)
            elif not right:
                problems.append(f"no {pattern} in {what}")
        return problems

    return _for_kernel(check, kernel)


def no_mma(kernel: str = "") -> Expectation:
    """Expects no tensor core to be used."""

    def check(found: Kernel) -> list[str]:
        return [
            *_counted("MMAs of any kind in PTX", found.ptx_count(PTX_MMA), 0),
            *_counted("MMAs of any kind", found.sass_count(MMA), 0),
        ]

    return _for_kernel(check, kernel)


def scale_copies(count: int, *, kernel: str = "") -> Expectation:
    """Expects this many copies of scales to tensor memory in each step: 32 columns of 128 rows and 4 scales each."""

    def check(found: Kernel) -> list[str]:
        return [
            *_counted("tcgen05.cp in PTX", found.ptx_count(PTX_SCALE_COPY), count),
            *_in_sass(found, SCALE_COPY, count),
        ]

    return _for_kernel(check, kernel)


def tma_loads(count: int, *, kernel: str = "") -> Expectation:
    """Expects this many TMA loads in each step, and no others."""

    def check(found: Kernel) -> list[str]:
        return [
            *_counted("TMA loads in PTX", found.ptx_count(PTX_TMA_LOAD), count),
            *_in_sass(found, TMA_LOAD, count),
        ]

    return _for_kernel(check, kernel)


def instructions(pattern: str, *, at_least: int = 1, at_most: int = 10**9, kernel: str = ""):
    """Expects a number of instructions whose names begin like a regular expression, in machine code."""

    def check(found: Kernel) -> list[str]:
        n = found.sass_count(pattern)
        if not found.sass:
            return []
        return [] if at_least <= n <= at_most else [f"{n} {pattern}, not {at_least} to {at_most}"]

    return _for_kernel(check, kernel)


def no_spills(compiled: Compiled) -> list[str]:
    """Expects no kernel to use local memory: no spills, no stack, no instruction that reads or writes it."""
    problems = []
    for kernel in compiled.kernels:
        local = kernel.sass_count(machine_code.SPILLING)
        if kernel.spill_bytes or kernel.stack_bytes or local:
            problems.append(
                f"{kernel.name}: {kernel.spill_bytes} bytes spilled, {kernel.stack_bytes} bytes of stack, "
                f"{local} loads and stores of local memory"
            )
    return problems


def within_limits(compiled: Compiled) -> list[str]:
    """Expects every kernel to fit the GPU: registers of a thread and a block, shared memory, tensor memory."""
    problems, target = [], compiled.target
    for kernel in compiled.kernels:
        # A warp gets registers in units of 256.
        block = -(-kernel.registers // 8) * 8 * kernel.threads
        for what, used, most in (
            ("registers of a thread", kernel.registers, _MOST_REGISTERS),
            ("registers of a block", block, target.registers),
            ("bytes of shared memory", kernel.shared_bytes, target.shared_bytes),
            ("columns of tensor memory", kernel.tmem_columns, target.tmem_columns),
        ):
            if used > most:
                problems.append(f"{kernel.name}: {used} {what}, of {most}")
    return problems


def memories(*, shared_at_most: int, tmem_columns: int = 0, kernel: str = "") -> Expectation:
    """Expects no more shared memory, and exactly the tensor memory, that the tiling says.

    Args:
      shared_at_most: bytes of a block.
      tmem_columns: that it needs; powers of two from 32 are allocated.
      kernel: which.
    """
    allocated = max(32, 1 << (tmem_columns - 1).bit_length()) if tmem_columns else 0

    def check(found: Kernel) -> list[str]:
        problems = _counted("columns of tensor memory", found.tmem_columns, allocated)
        if found.shared_bytes > shared_at_most:
            problems.append(f"{found.shared_bytes} bytes of shared memory, not {shared_at_most}")
        return problems

    return _for_kernel(check, kernel)


def num_kernels(count: int) -> Expectation:
    """Expects this many Mosaic or Triton kernels in the program."""

    def expectation(compiled: Compiled) -> list[str]:
        names = ", ".join(kernel.name for kernel in compiled.kernels) or "none"
        found = len(compiled.kernels)
        return [] if found == count else [f"{found} kernels instead of {count}: {names}"]

    return expectation


def packed_as_they_are(*parameters: str) -> Expectation:
    """Expects packed operands to reach kernels through bitcasts alone: no copy, no unpacking, no other reader.

    Args:
      *parameters: what parameters are called, or begin with: "args[1]"; none: every uint8 parameter.
    """

    def meant(parameter: hlo_text.Instruction) -> bool:
        if parameters:
            return parameter.source.startswith(parameters)
        return parameter.type.startswith("u8[")

    def expectation(compiled: Compiled) -> list[str]:
        program = hlo_text.parse(compiled.hlo)
        found = [parameter for parameter in program.parameters if meant(parameter)]
        problems = [] if found else [f"no packed parameter {', '.join(parameters) or 'u8[...]'}"]
        for parameter in found:
            uses = program.uses(parameter)
            readers = [f"{use.opcode} {use.name}" for use in uses if not _is_kernel_call(use)]
            if readers or not uses:
                what = f"read by {', '.join(readers)}" if readers else "not read"
                problems.append(
                    f"packed {parameter.source} {parameter.type.split('{')[0]} is {what}"
                )
        return problems

    return expectation


def _is_kernel_call(use: hlo_text.Instruction) -> bool:
    target = re.search(r'custom_call_target="([^"]*)"', use.attributes)
    return bool(target and target.group(1).startswith(_KERNEL_CALLS))


def temp_at_most(count: int) -> Expectation:
    """Expects no more bytes of temporary device memory."""

    def expectation(compiled: Compiled) -> list[str]:
        found = compiled.memory.temp_bytes
        return [] if found <= count else [f"{found} bytes of temporary memory, not {count}"]

    return expectation
