"""`moelab kernels`: which GPU kernels there are, and whether their machine code is what it should be."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping, Sequence

from moelab import environment, spelling
from moelab.cli import output
from moelab.errors import UserError

COLUMNS = (
    "gpu",
    "kernel",
    "case",
    "format",
    "MMA in PTX",
    "MMA in SASS",
    "scale copies",
    "TMA loads",
    "registers",
    "spilled",
    "shared",
    "TMEM",
    "temp",
    "verdict",
)


def verify(args: argparse.Namespace) -> int:
    """Compiles kernels for GPUs that are not here, and prints what came out and what is wrong with it."""
    environment.prepare()
    from pallas_kernels import aot
    from pallas_kernels.targets import SHORT_NAMES
    from pallas_kernels.verify import families, runner

    reason = aot.missing()
    if reason:
        output.note(f"skipped: {reason}")
        if args.json:
            output.print_json({"skipped": reason, "results": []})
        return 0
    targets = args.target or tuple(name for name in SHORT_NAMES if name in aot.targets())
    _known("GPU", targets, tuple(aot.targets()))
    _known("kernel", args.kernel, tuple(families()))
    results = []
    for result in runner.verify(targets, args.kernel):
        verdict = "; ".join(result.problems) or "ok"
        output.note(
            f"{result.target} {result.family} {result.case} {result.format}: {verdict} ({result.seconds:.0f} s)"
        )
        results.append(result)
    results.sort(key=lambda r: (targets.index(r.target), r.family, r.format, r.case))
    if args.json:
        output.print_json({"skipped": "", "results": [dataclasses.asdict(r) for r in results]})
    else:
        _print(results)
    return 1 if any(result.problems for result in results) else 0


def _known(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            hint = spelling.hint(name, known) or f"; there are {', '.join(known)}"
            raise UserError(f"no {what} {name!r}{hint}")


def _print(results: Sequence[object]) -> None:
    output.print_table(COLUMNS, [row for result in results for row in rows(result)])
    failed = [result for result in results if result.problems]
    for result in failed:
        for problem in result.problems:
            print(f"{result.target} {result.family} {result.case} {result.format}: {problem}")
    print(f"{len(results) - len(failed)} of {len(results)} as expected; not yet run on hardware")


def rows(result) -> list[tuple]:
    """Returns a result's rows, one for each kernel of the program."""
    first = (f"{result.target} {result.arch}", result.family, result.case, result.format)
    verdict = "FAILED" if result.problems else "ok"
    if not result.kernels:
        return [(*first, *[None] * (len(COLUMNS) - 5), verdict)]
    return [
        (
            *first,
            counted({short(name): count for name, count in kernel.mma_ptx.items()}),
            counted(kernel.mma),
            kernel.scale_copies,
            kernel.tma_loads,
            kernel.registers,
            kernel.spill_bytes,
            kernel.shared_bytes,
            kernel.tmem_columns,
            result.temp_bytes,
            verdict,
        )
        for kernel in result.kernels
    ]


def short(mma: str) -> str:
    """Leaves out of a PTX instruction's name what is the same for all of its kind.

    >>> short("tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.scale_vec::4X")
    'kind::mxf4nvf4.block_scale.scale_vec::4X'
    """
    return re.sub(r"^(tcgen05\.mma\.cta_group::\d\.|wgmma\.mma_async\.sync\.aligned\.)", "", mma)


def counted(names: Mapping[str, int]) -> str:
    """Writes how often each name occurs: `4 UTCOMMA.4X`."""
    return ", ".join(f"{count} {name}" for name, count in names.items()) or "-"


def listing(args: argparse.Namespace) -> int:
    """Prints the GPU kernels and what is proven of each."""
    environment.prepare()
    from pallas_kernels.grouped_matmul.kernels import HARDWARE
    from pallas_kernels.verify import families

    found = [
        {
            "kernel": family.name,
            "about": family.about,
            "formats": sorted({case.format for case in family.cases}),
            "interpreted": family.interpreted,
            "compiled_for": _compiled_for(family),
            "cases": len(family.cases),
            "hardware": HARDWARE,
        }
        for family in families().values()
    ]
    if args.json:
        output.print_json(found)
        return 0
    columns = ("kernel", "what", "formats", "interpret mode shows", "compiled for", "hardware")
    shown = [tuple(v or None for k, v in row.items() if k != "cases") for row in found]
    output.print_table(columns, shown)
    return 0


def _compiled_for(family) -> list[str]:
    """Names the GPUs that a family's cases are compiled for; without the plugin, none is known."""
    from pallas_kernels import aot
    from pallas_kernels.targets import SHORT_NAMES, plugin

    if plugin() is None:
        return []
    known = [target for name, target in aot.targets().items() if name in SHORT_NAMES]
    return [t.name for t in known if any(case.runs_on(t) for case in family.cases)]
