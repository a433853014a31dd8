"""From named generators in an experiment file to checked points: each a config, its name and how `moelab run` gets it.

Several names multiply. A point is a mapping of dotted fields (or nested sections) to values; two keys are no fields:
`name` is what the point is called in tables and directories, `config` starts it from another file or preset.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from moelab import config as configs
from moelab import config_file, launch, spelling
from moelab.errors import ConfigError
from moelab.sweep_file import SweepError

SEEDS = "seeds"  # the sweep that --seeds makes
_SHOWN = 12  # problems; a broken generator has the same one many times
_NOT_FIELDS = ("name", "config")


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep, before it runs.

    Attributes:
      name: readable, unique with the start of the hash.
      source: config file with its preset.
      overrides: spelt --config.a.b=value: with `source` they give exactly this config.
      config: locked and complete.
      sha256: the config's hash.
    """

    name: str
    source: str
    overrides: tuple[str, ...]
    config: ml_collections.ConfigDict
    sha256: str

    @property
    def directory(self) -> str:
        """The run directory's name below the sweep directory."""
        return f"{re.sub(r'[^A-Za-z0-9_.=+,-]+', '_', self.name)[:80]}-{self.sha256[:8]}"


@dataclasses.dataclass(frozen=True)
class _Part:
    """A named sweep's share of a point."""

    sweep: str
    name: str
    config: str
    fields: dict[str, Any]


def plan(
    source: str, sweeps: Sequence[str], overrides: Sequence[str] = (), seeds: Sequence[int] = ()
) -> tuple[list[Point], list[str]]:
    """Multiplies sweeps into points and checks all of them before anything starts.

    Points are ordered by seed first, so that an interrupted sweep leaves whole pairs.

    Args:
      source: experiment file, as `moelab run --config` takes it.
      sweeps: names of its generators, without `sweep_`.
      overrides: of every point.
      seeds: a sweep over the field `seed`; empty: none.

    Returns:
      The points, and one line for each point that was left out because another has the same config.

    Raises:
      SweepError: an unknown sweep, two sweeps that set one field, or points with problems: each is named.
      ConfigError: the file is broken.
    """
    twice = sorted({name for name in sweeps if list(sweeps).count(name) > 1})
    if twice:
        raise SweepError(f"--sweep names {twice[0]!r} twice")
    path, known = config_file.sweeps(source)
    parts = [_parts(path, name, known, source) for name in sweeps]
    if seeds:
        parts.append([_Part(SEEDS, f"seed={seed}", "", {"seed": seed}) for seed in seeds])
    if not parts:
        raise SweepError(f"a sweep wants --sweep=NAME or --seeds=0,1,...{_there_are(known)}")
    _check_disjoint(parts, overrides)
    found, problems = [], {}
    for chosen in itertools.product(*parts):
        name = "-".join(part.name for part in chosen)
        try:
            found.append(_point(name, chosen, source, path, overrides))
        except ConfigError as error:
            for line in str(error).splitlines():
                problems.setdefault(line, []).append(name)
    if problems:
        raise SweepError("\n".join(_problem_lines(problems)))
    found.sort(key=lambda point: point.config.seed)  # stable: the given order within a seed
    return _merged(found)


def _problem_lines(problems: Mapping[str, list[str]]) -> list[str]:
    lines = []
    for line, names in problems.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"point {names[0]}{more}: {line}")
    hidden = len(lines) - _SHOWN
    return lines[:_SHOWN] + ([f"and {hidden} more problems"] if hidden > 0 else [])


def _merged(points: list[Point]) -> tuple[list[Point], list[str]]:
    """Keeps the first of the points with one config; a second run of it would tell nothing new."""
    first: dict[str, Point] = {}
    notes = []
    for point in points:
        kept = first.setdefault(point.sha256, point)
        if kept is not point:
            notes.append(f"{point.name} has the config of {kept.name}: it runs once")
    return list(first.values()), notes


def _there_are(known: Mapping[str, object]) -> str:
    if not known:
        return "; the file has no sweeps: write def sweep_NAME(): yield {field: value}"
    return f"; the file has {', '.join(known)}"


def _parts(path: Path | None, name: str, known: Mapping, source: str) -> list[_Part]:
    if name not in known:
        guess = spelling.hint(name, known, "--sweep=") or _there_are(known)
        raise SweepError(f"{path or source} has no sweep {name!r}{guess}")
    return [_part(name, i, values) for i, values in enumerate(known[name](), 1)]


def _part(sweep: str, number: int, values: Mapping) -> _Part:
    special = {key: values[key] for key in _NOT_FIELDS if key in values}
    for key, value in special.items():
        if not isinstance(value, str) or not value:
            got = f"{type(value).__name__} {value!r}"
            raise SweepError(f"sweep_{sweep}, point {number}: {key} wants a str, got {got}")
    fields = dict(configs.flatten({k: v for k, v in values.items() if k not in special}))
    for path, value in fields.items():
        if isinstance(value, list | tuple) and any("," in str(item) for item in value):
            raise SweepError(f"sweep_{sweep}, point {number}: an item of {path} has a comma")
        if value is None or isinstance(value, Mapping | ml_collections.ConfigDict):
            raise SweepError(f"sweep_{sweep}, point {number}: {path} has no value")
    name = special.get("name") or _readable(fields) or special.get("config", f"{sweep}{number}")
    return _Part(sweep, name, special.get("config", ""), fields)


def _readable(fields: Mapping[str, Any]) -> str:
    """Names a point by its fields: the last word where that is clear."""
    leaves = [path.rpartition(".")[2] for path in fields]
    return ",".join(
        f"{leaf if leaves.count(leaf) == 1 and leaf != 'kind' else path}={spell(value)}"
        for leaf, (path, value) in zip(leaves, fields.items(), strict=True)
    )


def spell(value: Any) -> str:
    """Writes a value as an override has it: true, 0.001, a,b."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(spell, value))
    return str(value)


def _check_disjoint(parts: Sequence[Sequence[_Part]], overrides: Sequence[str]) -> None:
    """Refuses what would silently win over something else: a field, or the config, set in two places."""
    setters: dict[str, str] = {}
    given = {text.removeprefix("--config.").partition("=")[0] for text in overrides}
    for sweep in parts:
        paths = {path for part in sweep for path in part.fields}
        paths |= {"config"} if any(part.config for part in sweep) else set()
        for path in sorted(paths):
            if path in given:
                raise SweepError(
                    f"--config.{path} is set by the sweep {sweep[0].sweep!r} too; give one of them"
                )
            if path in setters:
                raise SweepError(
                    f"the sweeps {setters[path]!r} and {sweep[0].sweep!r} both set {path}; they cannot be multiplied"
                )
            setters[path] = sweep[0].sweep


def _point(
    name: str, parts: Sequence[_Part], source: str, path: Path | None, overrides: Sequence[str]
) -> Point:
    other = next((part.config for part in parts if part.config), "")
    source = _other_source(source, path, other) if other else source
    fields = {field: value for part in parts for field, value in part.fields.items()}
    spelt = [*overrides, *(f"--config.{field}={spell(v)}" for field, v in fields.items())]
    loaded = configs.load(source, spelt)
    launch.check(loaded.config)
    return Point(name, source, loaded.overrides, loaded.config, configs.sha256(loaded.config))


def _other_source(source: str, path: Path | None, other: str) -> str:
    """Resolves a point's `config`: :PRESET of the same file, a file beside it, or what --config would take."""
    file, _, preset = other.partition(":")
    if not file:
        own = str(path) if path else source
        return f"{own}:{preset}"
    beside = path.parent / file if path else Path(file)
    if beside.is_file():
        shown = beside.resolve()
        here = Path.cwd()
        shown = shown.relative_to(here) if shown.is_relative_to(here) else shown
        return f"{shown}:{preset}" if preset else str(shown)
    return other
