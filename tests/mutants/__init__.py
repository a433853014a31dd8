"""Seeded bugs: each file here lists mutants of one kernel, and tests show that every one is caught."""

from __future__ import annotations

import dataclasses
import importlib.util
import linecache
import sys
import types
from collections.abc import Sequence
from typing import Any

import pytest

QUICK = 5


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One bug.

    Attributes:
      name: what is wrong.
      old: source text that must occur exactly once in the module.
      new: what replaces it.
      caught_by: "race" (the race detector or a barrier's check raises), "numerics" (a wrong result), or "either".
    """

    name: str
    old: str
    new: str
    caught_by: str = "either"


def parameters(mutants: Sequence[Any]) -> list:
    """Five of a kernel's mutants, spread over the list, for every test run; the others are slow: about 30 in all.

    Args:
      mutants: of one kernel, or tuples that end in one.
    """
    quick = {round(i * (len(mutants) - 1) / (QUICK - 1)) for i in range(QUICK)}
    found = []
    for number, mutant in enumerate(mutants):
        values = mutant if isinstance(mutant, tuple) else (mutant,)
        marks = () if number in quick else pytest.mark.slow
        found.append(pytest.param(*values, id=values[-1].name, marks=marks))
    return found


def mutated(module: str, mutant: Mutant) -> types.ModuleType:
    """Returns a copy of a module with the mutant's bug; the real one is untouched.

    Raises:
      ValueError: the text to replace does not occur exactly once.
    """
    spec = importlib.util.find_spec(module)
    with open(spec.origin, encoding="utf-8") as file:
        source = file.read()
    if source.count(mutant.old) != 1:
        raise ValueError(
            f"mutant {mutant.name!r}: {mutant.old!r} occurs {source.count(mutant.old)} times in {module}"
        )
    source = source.replace(mutant.old, mutant.new)
    name = f"{module}__{mutant.name.replace(' ', '_')}"
    copy = types.ModuleType(name)
    copy.__file__, copy.__package__ = f"<{name}>", module.rpartition(".")[0]
    sys.modules[name] = copy
    # Pallas looks up the source of a kernel for its error messages.
    linecache.cache[copy.__file__] = (len(source), None, source.splitlines(True), copy.__file__)
    exec(compile(source, copy.__file__, "exec"), copy.__dict__)
    return copy
