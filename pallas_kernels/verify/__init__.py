"""What is known of every GPU kernel without a GPU: it is compiled for each GPU, and its machine code is checked.

One file per kernel family, with a `FAMILY`: add a file, and `moelab kernels verify` compiles its cases. Files are read
without Triton or a CUDA plugin installed, so they import kernels inside `build`.

    case.py     Family, Case, and the families that there are
    shapes.py   arrays that cases take
    expect.py   what is expected of a compiled case: functions from `aot.Compiled` to problems
    runner.py   compiles cases in one process per GPU, collects facts and problems
"""

from pallas_kernels.verify.case import Case, Family, families

__all__ = ["Case", "Family", "families"]
