"""Cases to compile, by kernel family."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Sequence

from pallas_kernels.aot import Compiled, Target

Program = tuple[Callable, Sequence[object]]
Expectation = Callable[[Compiled], list[str]]
_MACHINERY = ("case", "expect", "runner", "shapes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One program to compile, for each GPU that it is meant for.

    Attributes:
      name: what sets it apart within its family: "2 CTAs, 256x256".
      format: of what is multiplied or made: "nvfp4".
      runs_on: whether a GPU is one that the kernel is for.
      each_gpu: whether it is compiled for each GPU; if not, for one of each architecture, since the code that comes out
        is the same but for the number of multiprocessors.
      build: Target -> (function, pytrees of `jax.ShapeDtypeStruct`). Called while the target is assumed.
      expectations: each looks at what came out and returns problems, as sentences; none where all is well.
    """

    name: str
    format: str
    runs_on: Callable[[Target], bool]
    build: Callable[[Target], Program]
    expectations: tuple[Expectation, ...]
    each_gpu: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A kernel and what is proven of it.

    Attributes:
      name: of the kernel: "mosaic_sm100".
      about: one line for people.
      interpreted: what the tests show in interpret mode.
      cases: what is compiled.
    """

    name: str
    about: str
    interpreted: str
    cases: tuple[Case, ...]

    def __post_init__(self):
        names = [(case.name, case.format) for case in self.cases]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"{self.name} has two cases called {' '.join(min(twice))}")


@functools.cache
def families() -> dict[str, Family]:
    """Returns every kernel family, by name; the folder is the registry."""
    from pallas_kernels import verify

    found = {}
    for module in sorted(module.name for module in pkgutil.iter_modules(verify.__path__)):
        if module not in _MACHINERY:
            family = importlib.import_module(f"{verify.__name__}.{module}").FAMILY
            found[family.name] = family
    return found


def capability(*majors: int) -> Callable[[Target], bool]:
    """Returns a `runs_on` for these major compute capabilities."""
    return lambda target: target.capability[0] in majors
