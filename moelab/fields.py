"""Every field that a config can have: path, type, default and documentation, and how text becomes its value.

Closed sections come from `schema.py`. Routers and balancing mechanisms are open sets: a file in `routers/` is a router
kind whose fields are those of its linen class `Router`; a file in `balance/` is a mechanism whose fields are those of
its dataclass `Mechanism`. So adding one is adding a file.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import math
import re
import tokenize
from collections.abc import Mapping
from pathlib import Path

from moelab import schema

PACKAGE = Path(__file__).parent
SCALARS = (bool, int, float, str)
# Fields of a router or mechanism that the model or linen sets, never a config.
_NOT_CONFIGURED = ("parent", "name", "num_experts", "token_counts")


class FieldError(Exception):
    """A value that its field cannot take. The message says what was wanted and what came."""


@dataclasses.dataclass(frozen=True)
class Field:
    """One leaf of a config."""

    path: str  # dotted
    type: str  # bool, int, float, str, or tuple[<one of these>, ...]
    default: object
    doc: str
    kind: str = ""  # the kind that the field belongs to; empty: any


def router_kinds() -> tuple[str, ...]:
    """Returns the names of the files in routers/, without importing one."""
    return _files("routers")


def balance_mechanisms() -> tuple[str, ...]:
    """Returns the names of the files in balance/, without importing one."""
    return _files("balance")


def _files(folder: str) -> tuple[str, ...]:
    names = (path.stem for path in (PACKAGE / folder).glob("*.py"))
    return tuple(sorted(name for name in names if not name.startswith("_")))


def kinds(section: str) -> tuple[str, ...]:
    """Returns the kinds that a section can have."""
    return router_kinds() if section == "router" else tuple(schema.KINDS[section])


def table(chosen: Mapping[str, str]) -> dict[str, Field]:
    """Returns every field of a config by its path.

    Args:
      chosen: kind of each section of schema.DEFAULT_KIND.
    """
    fields = {
        "seed": Field("seed", "int", 0, "of parameters, data order and every other random choice")
    }
    for section, cls in schema.SECTIONS.items():
        fields |= of_class(section, cls)
    for section in schema.DEFAULT_KIND:
        fields |= of_kind(section, chosen[section])
    for mechanism in balance_mechanisms():
        cls = importlib.import_module(f"moelab.balance.{mechanism}").Mechanism
        fields |= of_class(f"balance.{mechanism}", cls)
    return fields


@functools.cache
def of_kind(section: str, kind: str) -> dict[str, Field]:
    """Returns the fields of one kind of a section, its `kind` first."""
    doc = "one of " + ", ".join(kinds(section))
    first = Field(f"{section}.kind", "str", schema.DEFAULT_KIND[section], doc)
    if section == "router":
        cls = importlib.import_module(f"moelab.routers.{kind}").Router
    else:
        cls = schema.KINDS[section][kind]
    fields = of_class(section, cls)
    rest = {p: dataclasses.replace(f, kind=kind) for p, f in fields.items() if p != first.path}
    return {first.path: first, **rest}


@functools.cache
def of_class(section: str, cls: type) -> dict[str, Field]:
    """Returns the fields of a dataclass by dotted path; functions among them are not configurable and left out."""
    docs, fields = _documentation(cls), {}
    hidden = () if section in schema.SECTIONS else _NOT_CONFIGURED
    for field in dataclasses.fields(cls):
        if field.name in hidden or callable(field.default):
            continue
        path = f"{section}.{field.name}"
        name = _type_name(path, field)
        fields[path] = Field(path, name, coerce(name, field.default), docs.get(field.name, ""))
    return fields


def _type_name(path: str, field: dataclasses.Field) -> str:
    if type(field.default) in SCALARS:
        # An int default under a float annotation is a float field.
        annotated = getattr(field.type, "__name__", str(field.type))
        return "float" if annotated == "float" else type(field.default).__name__
    element = re.fullmatch(r"tuple\[(bool|int|float|str), \.\.\.\]", str(field.type))
    if type(field.default) is tuple and element:
        return str(field.type)
    raise TypeError(
        f"{path}: a config field needs a default that is a bool, int, float, str, or a tuple annotated "
        f"tuple[<one of these>, ...]; got {field.type} with default {field.default!r}"
    )


def _documentation(cls: type) -> dict[str, str]:
    """Reads the comment after each field of a class, or its line under `Attributes:` in the docstring."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.partition(".")[0] == "moelab":
            docs |= _documented_in(Path(inspect.getsourcefile(base))).get(base.__qualname__, {})
    return docs


@functools.cache
def _documented_in(path: Path) -> dict[str, dict[str, str]]:
    with tokenize.open(path) as file:
        source = file.read()
    lines = iter(source.splitlines(keepends=True))
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(lambda: next(lines, ""))
        if token.type == tokenize.COMMENT
    }
    docs: dict[str, dict[str, str]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            attributes = r"^\s+(\w+): (.*(?:\n\s{6,}.*)*)"
            docs[node.name] = {
                name: " ".join(text.split())
                for name, text in re.findall(attributes, ast.get_docstring(node, False) or "", re.M)
            }
            for item in node.body:
                if isinstance(item, ast.AnnAssign):
                    lines = range(item.lineno, item.end_lineno + 1)
                    if text := " ".join(comments[line] for line in lines if line in comments):
                        docs[node.name][item.target.id] = text
    return docs


def parse(type_name: str, text: str) -> object:
    """Reads a value from the command line.

    >>> parse("float", "1"), parse("tuple[int, ...]", "(3,4)"), parse("bool", "True")
    (1.0, (3, 4), True)

    Raises:
      FieldError: the text is no such value; an int field does not take "16.0".
    """
    if type_name.startswith("tuple"):
        text = text.strip()
        if text[:1] + text[-1:] in ("()", "[]"):
            text = text[1:-1]
        parts = [part.strip().strip("'\"") for part in text.split(",")]
        if parts[-1] == "":
            parts.pop()
        return tuple(parse(_element(type_name), part) for part in parts)
    if type_name == "str":
        return text
    try:
        return _READ[type_name](text.strip())
    except (KeyError, ValueError):
        raise FieldError(f"wants {_WANTED[type_name]}, got {text!r}") from None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


_READ = {
    "bool": lambda text: {"true": True, "1": True, "false": False, "0": False}[text.lower()],
    "int": int,
    "float": _finite,
}
_WANTED = {
    "bool": "bool (true, false, 1 or 0)",
    "int": "int",
    "float": "float (a finite number)",
    "str": "str",
}


def coerce(type_name: str, value: object) -> object:
    """Checks a value that came from Python or JSON; ints become floats and lists become tuples where wanted.

    Raises:
      FieldError: the value has another type.
    """
    if type_name.startswith("tuple"):
        element = _element(type_name)
        if not isinstance(value, list | tuple):
            raise FieldError(f"wants {type_name}, got {type(value).__name__} {value!r}")
        return tuple(coerce(element, item) for item in value)
    if type_name == "float" and type(value) is int:
        return float(value)
    if type(value).__name__ != type_name or (type_name == "float" and not math.isfinite(value)):
        raise FieldError(f"wants {_WANTED[type_name]}, got {type(value).__name__} {value!r}")
    return value


def _element(type_name: str) -> str:
    return type_name[len("tuple[") : type_name.index(",")]
