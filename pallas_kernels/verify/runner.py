"""Compiles cases for GPUs that are not here, in processes of their own, and collects facts and problems.

A process ends when LLVM meets an instruction that the architecture does not have; its case has failed then, and the
others go on in a new process.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import queue
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence

from pallas_kernels import aot, device, machine_code
from pallas_kernels.aot import Compiled, Kernel, Target
from pallas_kernels.verify import expect
from pallas_kernels.verify.case import Case, families

_CHUNK = 10  # cases of one process: starting one takes as long as compiling one
# Architectures whose code is looked at as another's: no disassembler knows sm_107a yet.
_ALIKE = {"sm_107a": "sm_100a"}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What people want to see of one kernel's machine code.

    Attributes:
      kernel: name of its entry function.
      mma_ptx, mma: MMAs and how often they occur, in PTX and in machine code.
      scale_copies, tma_loads: how often these occur, in machine code or, without a disassembler, in PTX.
      registers, threads: of a thread, and how many threads a block has.
      spill_bytes: stack and local memory of a thread included.
      shared_bytes, tmem_columns: of a block.
    """

    kernel: str
    mma_ptx: dict[str, int]
    mma: dict[str, int]
    scale_copies: int
    tma_loads: int
    registers: int
    threads: int
    spill_bytes: int
    shared_bytes: int
    tmem_columns: int


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of one case on one GPU.

    Attributes:
      target, arch: "b200", "sm_100a".
      family, case, format: which case.
      kernels: facts of each kernel.
      temp_bytes: temporary device memory of the program, None if it did not compile.
      problems: what was not as expected; the case has passed if there are none.
      seconds: what compiling took.
    """

    target: str
    arch: str
    family: str
    case: str
    format: str
    kernels: tuple[Facts, ...]
    temp_bytes: int | None
    problems: tuple[str, ...]
    seconds: float


def verify(names: Sequence[str], kernels: Sequence[str] = ()) -> Iterator[Result]:
    """Compiles and checks every case of these kernels that runs on these GPUs; yields results as they come.

    Args:
      names: of targets.
      kernels: of families; none: all.
    """
    chunks = [
        (name, chunk)
        for name, cases in cases_for([aot.targets()[name] for name in names], kernels).items()
        for chunk in _chunks(cases, _CHUNK)
    ]
    results: queue.SimpleQueue = queue.SimpleQueue()

    def work(name: str, cases: list[tuple[str, int]]) -> None:
        for result in _in_processes(name, cases):
            results.put(result)

    workers = len(os.sched_getaffinity(0))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        working = [pool.submit(work, *chunk) for chunk in chunks]
        try:
            for _ in range(sum(len(cases) for _, cases in chunks)):
                yield _next(results, working)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _next(results: queue.SimpleQueue, working: list[concurrent.futures.Future]) -> Result:
    """Waits for a result; a worker's own error is raised here, not waited for."""
    while True:
        try:
            return results.get(timeout=0.2)
        except queue.Empty:
            for future in working:
                if future.done() and not future.cancelled():
                    future.result()


def cases_for(
    targets: Sequence[Target], kernels: Sequence[str] = ()
) -> dict[str, list[tuple[str, int]]]:
    """Returns what is compiled: name of the GPU -> (family, index of the case)."""
    seen, found = set(), {}
    for target in targets:
        arch = _ALIKE.get(target.arch, target.arch)
        found[target.name] = [
            (family.name, index)
            for family in families().values()
            for index, case in enumerate(family.cases)
            if (not kernels or family.name in kernels)
            and case.runs_on(target)
            and (case.each_gpu or arch not in seen)
        ]
        seen.add(arch)
    return found


def _chunks(values: list, size: int) -> list[list]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def _in_processes(target: str, cases: list[tuple[str, int]]) -> Iterator[Result]:
    """Yields a result for every case, with as many processes as it takes."""
    while cases:
        start = time.perf_counter()
        try:
            for found in aot.in_process(target, f"{__name__}:check_all", cases):
                yield _from_plain(found)
                cases, start = cases[1:], time.perf_counter()
        except RuntimeError as error:
            if not cases:
                return
            seconds = time.perf_counter() - start
            yield _failed(aot.targets()[target], *cases[0], str(error), seconds)
            cases = cases[1:]


def check_all(target: Target, cases: Sequence[tuple[str, int]]) -> Iterator[dict]:
    """Compiles and checks cases in this process; yields results as plain values."""
    for family, index in cases:
        start = time.perf_counter()
        try:
            result = check(target, family, families()[family].cases[index])
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            result = _failed(target, family, index, text, time.perf_counter() - start)
        yield dataclasses.asdict(result)


def check(target: Target, family: str, case: Case) -> Result:
    """Compiles a case and applies its expectations."""
    start = time.perf_counter()
    with device.assume(target.device):
        fn, args = case.build(target)
    compiled = aot.compile(fn, args, target)
    return Result(
        target=target.name,
        arch=target.arch,
        family=family,
        case=case.name,
        format=case.format,
        kernels=tuple(map(facts, compiled.kernels)),
        temp_bytes=compiled.memory.temp_bytes,
        problems=problems(case, compiled),
        seconds=time.perf_counter() - start,
    )


def problems(case: Case, compiled: Compiled) -> tuple[str, ...]:
    """Applies a case's expectations; a program without kernels has failed, whatever was expected."""
    found = [] if compiled.kernels else ["no Mosaic or Triton kernel in the program"]
    for expectation in case.expectations:
        found += expectation(compiled)
    return tuple(found)


def facts(kernel: Kernel) -> Facts:
    """Sums up a kernel's machine code."""
    sass = Counter()
    for _, name in machine_code.instructions(kernel.sass):
        if re.match(expect.MMA, name):
            sass[name] += 1

    def count(in_sass: str, in_ptx: str) -> int:
        return kernel.sass_count(in_sass) if kernel.sass else kernel.ptx_count(in_ptx)

    return Facts(
        kernel=kernel.name,
        mma_ptx=dict(Counter(re.findall(expect.PTX_MMA, kernel.ptx))),
        mma=dict(sass),
        scale_copies=count(expect.SCALE_COPY, expect.PTX_SCALE_COPY),
        tma_loads=count(expect.TMA_LOAD, expect.PTX_TMA_LOAD),
        registers=kernel.registers,
        threads=kernel.threads,
        spill_bytes=kernel.spill_bytes + kernel.stack_bytes,
        shared_bytes=kernel.shared_bytes,
        tmem_columns=kernel.tmem_columns,
    )


def _failed(target: Target, family: str, index: int, problem: str, seconds: float) -> Result:
    case = families()[family].cases[index]
    return Result(
        target.name, target.arch, family, case.name, case.format, (), None, (problem,), seconds
    )


def _from_plain(values: dict) -> Result:
    kernels = tuple(Facts(**kernel) for kernel in values.pop("kernels"))
    return Result(kernels=kernels, problems=tuple(values.pop("problems")), **values)
