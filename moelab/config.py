"""From a config file and overrides to a locked, complete, checked ConfigDict, and to its hash.

A file gives some fields; the rest are filled in with their defaults before the config is locked, so that every
field can be overridden and every misspelt one is caught. A saved config (`config.json` of a run) is read as data:
no code runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ml_collections

from moelab import atomic, config_file, fields, schema, spelling
from moelab.errors import ConfigError
from moelab.validation import Problem, validate

__all__ = [
    "ConfigError",
    "Loaded",
    "Problem",
    "canonical",
    "check_directory",
    "differences",
    "flatten",
    "from_dict",
    "load",
    "record",
    "sha256",
    "table",
    "validate",
    "vocab_size",
]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A config and where it came from."""

    config: ml_collections.ConfigDict  # locked, every default filled in
    name: str  # of the file and preset, for naming run directories
    file: str  # as found, with its preset
    overrides: tuple[str, ...]  # as given, spelt --config.a.b=value
    dropped: tuple[
        str, ...
    ]  # one line for each field of the file that an overridden kind does not have


def load(source: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Reads an experiment file (or a run directory, or its config.json) and applies overrides, kinds first.

    Args:
      source: `path.py`, `path.py:preset`, the bare name of a file in experiments/, or a run directory.
      overrides: `--config.a.b=value` or `a.b=value`; a bool may stand alone and means true.

    Raises:
      ConfigError: whatever is wrong with the file or an override, as one line.
    """
    file, name, values = config_file.read(str(source))
    given = [_split(override) for override in overrides]
    spelt = tuple(f"--config.{path}" + ("" if text is None else f"={text}") for path, text in given)
    config, dropped = _build(values, given, file)
    return Loaded(config, name, file, spelt, tuple(dropped))


def from_dict(values: Mapping) -> ml_collections.ConfigDict:
    """Makes a locked config from nested values, the defaults filled in. Never executes code.

    Raises:
      ConfigError: an unknown field or a value of another type.
    """
    return _build(values, [], "config")[0]


def _split(override: str) -> tuple[str, str | None]:
    path, equals, text = override.removeprefix("--config.").partition("=")
    return path, text if equals else None


def _build(values: Mapping, overrides: list[tuple[str, str | None]], file: str):
    flat = dict(flatten(values))
    before = _kinds([(p, v, f"{file}: ") for p, v in flat.items()], schema.DEFAULT_KIND)
    after = _kinds([(p, v, "--config.") for p, v in overrides], before)
    known, had = fields.table(after), fields.table(before)
    result, dropped = {path: field.default for path, field in known.items()}, []
    for path, value in flat.items():
        if _is_section(value) and _below(path, had):
            continue  # an empty section of a right name
        checked = _coerce(path, value, had, f"{file}: ")
        if path in known and known[path].type == had[path].type:
            result[path] = checked
        else:
            section = path.partition(".")[0]
            dropped.append(
                f"{path}={checked!r} dropped: {section}.kind={after[section]} does not have it"
            )
    for section, kind in after.items():
        result[f"{section}.kind"] = kind
    for path, text in overrides:
        result[path] = _parse(path, text, known)
    return _nest(result), dropped


def flatten(values: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields (dotted path, value) of every leaf. An empty section is yielded too, since its name may be wrong."""
    for key, value in values.items():
        path = f"{prefix}{key}"
        if _is_section(value) and len(value):
            yield from flatten(value, f"{path}.")
        else:
            yield path, value


def _is_section(value: object) -> bool:
    return isinstance(value, Mapping | ml_collections.ConfigDict)


def _nest(flat: Mapping[str, object]) -> ml_collections.ConfigDict:
    nested: dict = {}
    for path, value in flat.items():
        *sections, leaf = path.split(".")
        node = nested
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    nested.setdefault("balance", {})  # there are no mechanisms
    return _config_dict(nested).lock()


def _config_dict(nested: Mapping) -> ml_collections.ConfigDict:
    """Keeps the order of the fields, which ConfigDict would otherwise sort."""
    config = ml_collections.ConfigDict(sort_keys=False)
    for key, value in nested.items():
        config[key] = _config_dict(value) if isinstance(value, dict) else value
    return config


def _kinds(settings: Sequence[tuple[str, object, str]], start: Mapping[str, str]) -> dict[str, str]:
    """Returns the kind of each section after the settings (path, value, where), the last one winning."""
    chosen = dict(start)
    for path, kind, where in settings:
        section, _, leaf = path.partition(".")
        if section in schema.DEFAULT_KIND and leaf == "kind":
            names = fields.kinds(section)
            if kind not in names:
                prefix = where if where == "--config." else ""
                guess = spelling.hint(str(kind), names, prefix=f"{prefix}{path}=")
                raise ConfigError(f"{where}{path}: no kind {kind!r}{guess or _one_of(names)}")
            chosen[section] = kind
    return chosen


def _one_of(names: Sequence[str]) -> str:
    return f"; there are {', '.join(names)}" if names else "; there are none"


def _coerce(path: str, value: object, known: Mapping[str, fields.Field], where: str) -> object:
    field = _find(path, known, where)
    try:
        return fields.coerce(field.type, value)
    except fields.FieldError as error:
        raise ConfigError(f"{where}{path} {error}") from None


def _parse(path: str, text: str | None, known: Mapping[str, fields.Field]) -> object:
    field = _find(path, known, "--config.")
    if text is None:
        if field.type != "bool":
            raise ConfigError(
                f"--config.{path} wants {field.type}, got no value; write --config.{path}=..."
            )
        return True
    try:
        return fields.parse(field.type, text)
    except fields.FieldError as error:
        raise ConfigError(f"--config.{path} {error}") from None


def _find(path: str, known: Mapping[str, fields.Field], where: str) -> fields.Field:
    if path in known:
        return known[path]
    prefix = "--config." if where == "--config." else ""
    inside = _below(path, known)
    if inside:
        raise ConfigError(f"{where}{path} is a section, not a field; it has {', '.join(inside)}")
    other = _kind_with(path)
    if other:
        kind = known[f"{path.partition('.')[0]}.kind"].path
        raise ConfigError(f"{where}{path}: no such field; it belongs to {prefix}{kind}={other}")
    guess = spelling.hint(path, known, prefix)
    if not guess:
        section = path.rpartition(".")[0]
        inside = _below(section, known) if section else []
        if inside:
            guess = f"; {section} has {', '.join(inside)}"
        else:
            guess = _one_of(sorted({name.partition(".")[0] for name in known}))
    raise ConfigError(f"{where}{path}: no such field{guess}")


def _below(path: str, known: Mapping[str, fields.Field]) -> list[str]:
    return [name.removeprefix(f"{path}.") for name in known if name.startswith(f"{path}.")]


def _kind_with(path: str) -> str | None:
    section = path.partition(".")[0]
    if section not in schema.DEFAULT_KIND:
        return None
    owners = (kind for kind in fields.kinds(section) if path in fields.of_kind(section, kind))
    return next(owners, None)


def vocab_size(config: ml_collections.ConfigDict) -> int:
    """Returns the number of token ids that the model is made for, without building the data."""
    if config.data.kind == "tokens":
        return config.data.vocab_size
    return 257 if config.tokenizer.kind == "byte" else config.tokenizer.vocab_size


def table(config: ml_collections.ConfigDict) -> dict[str, fields.Field]:
    """Returns the fields of a config by dotted path: type, default, documentation."""
    return fields.table({section: config[section].kind for section in schema.DEFAULT_KIND})


def canonical(config: ml_collections.ConfigDict) -> str:
    """Writes a whole config as JSON with sorted keys and no spaces: equal configs, equal text."""
    return _json(config.to_dict())


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256(config: ml_collections.ConfigDict) -> str:
    """Hashes what can change a result: fields that differ from their default, and the schema's number.

    Sections in `schema.UNHASHED` do not count, and a new field with a default leaves the hash as it was.
    """
    known = table(config)
    changed = {
        path: value
        for path, value in flatten(config)
        if path in known
        and path.partition(".")[0] not in schema.UNHASHED
        and value != known[path].default
    }
    text = _json({"schema": schema.SCHEMA, "config": changed})
    return hashlib.sha256(text.encode()).hexdigest()


def record(
    config: ml_collections.ConfigDict, file: str = "", overrides: Sequence[str] = ()
) -> dict[str, object]:
    """Returns what a run directory's config.json holds."""
    return {
        "schema": schema.SCHEMA,
        "config_sha256": sha256(config),
        "config": json.loads(canonical(config)),
        "file": file,
        "overrides": list(overrides),
    }


def differences(
    a: ml_collections.ConfigDict, b: ml_collections.ConfigDict
) -> list[tuple[str, object, object]]:
    """Returns (path, value in a, value in b) wherever two configs differ; None where one lacks the field."""
    left, right = dict(flatten(a)), dict(flatten(b))
    paths = [*left, *(path for path in right if path not in left)]
    pairs = ((path, left.get(path), right.get(path)) for path in paths)
    return [(path, x, y) for path, x, y in pairs if x != y]


def schema_of(workdir: str | Path) -> object:
    """Returns the number of the schema under which a run directory's config.json was written; `load` reads it first."""
    return json.loads((Path(workdir) / "config.json").read_text(encoding="utf-8")).get("schema")


def check_directory(config: ml_collections.ConfigDict, workdir: str | Path) -> None:
    """Refuses a directory that holds a run of another config, or files that are no run.

    Raises:
      ConfigError: with the fields that differ.
    """
    workdir = Path(workdir)
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"{workdir} is a file; --workdir wants a directory")
    if not workdir.is_dir():
        return
    if not (workdir / "config.json").is_file():
        # A run that was killed at once left no more than its lock, and config.json half written.
        there = [p for p in workdir.iterdir() if p.name != ".lock" and not atomic.is_leftover(p)]
        if not there:
            return
        raise ConfigError(f"{workdir} is not empty and holds no run; choose another --workdir")
    saved = load(workdir).config
    written = schema_of(workdir)
    if written != schema.SCHEMA:
        raise ConfigError(
            f"{workdir} holds a run under schema {written!r} of configs; this moelab has {schema.SCHEMA}, where "
            "defaults or meanings differ; choose another --workdir"
        )
    if sha256(saved) != sha256(config):
        pairs = [
            f"{path} ({old} there, {new} now)"
            for path, old, new in differences(saved, config)
            if path.partition(".")[0] not in schema.UNHASHED
        ]
        raise ConfigError(
            f"{workdir} holds a run of another config; choose another --workdir; differing: "
            + ", ".join(pairs)
        )
