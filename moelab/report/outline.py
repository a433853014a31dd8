"""What kinds of values a JSON document must hold where reports read them.

An outline maps places to kinds. A place is a dotted path; `*` is every element of a list or value of an object. A kind
is one of KINDS; with `?` null is one, too; with `!` the place must exist where its object does. What is not there is
fine otherwise, and what lies in a value of another kind is not looked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

_NAMED = ("NaN", "Infinity", "-Infinity")  # how metrics.plain writes numbers that JSON has not
_MISSING = object()

KINDS = {  # kind -> (what it is called, whether a value is one)
    "object": ("an object", lambda v: isinstance(v, dict)),
    "list": ("a list", lambda v: isinstance(v, list)),
    "text": ("text", lambda v: isinstance(v, str)),
    "words": ("text with a word in it", lambda v: isinstance(v, str) and bool(v.strip())),
    "numbers": (
        "a list of nothing but numbers",
        lambda v: isinstance(v, list) and all(map(_is_number, v)),
    ),
    "flag": ("true or false", lambda v: isinstance(v, bool)),
    "number": ("a number", lambda v: _is_number(v) or (isinstance(v, str) and v in _NAMED)),
    "finite": ("a finite number", lambda v: _is_number(v) and math.isfinite(v)),
    "whole": ("a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool)),
}


def problems(value: Any, outline: Mapping[str, str]) -> list[str]:
    """Lists what is of another kind, the first of each place of the outline.

    >>> problems({"a": {"b": [1, "x"]}, "c": None}, {"a.b.*": "number", "c": "object?", "a.d": "text!"})
    ['a.b[1] wants a number, not text', 'a.d wants text, not nothing']
    """
    found: dict[str, str] = {}
    for place, kind in outline.items():
        name, holds = KINDS[kind.rstrip("?!")]
        for where, inner in _places(value, place.split("."), "!" in kind):
            if holds(inner) or (inner is None and "?" in kind):
                continue
            if not where.startswith(tuple(found)):  # else it lies in what is wrong itself
                found[where] = f"{where} wants {name}, not {_called(inner)}"
            break
    return [" ".join(text.split()) for text in found.values()]


def _places(
    value: Any, parts: list[str], required: bool, where: str = ""
) -> Iterator[tuple[str, Any]]:
    if not parts:
        yield where, value
        return
    head, *rest = parts
    dotted = f"{where}." if where else ""
    if isinstance(value, list) and head == "*":
        for i, inner in enumerate(value):
            yield from _places(inner, rest, required, f"{where}[{i}]")
    elif isinstance(value, dict):
        for key in value if head == "*" else [head]:
            if key in value:
                yield from _places(value[key], rest, required, f"{dotted}{key}")
            elif required and not rest:
                yield f"{dotted}{key}", _MISSING


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _called(value: Any) -> str:
    """What a value is called, in one word or two: the value itself may be long."""
    if value is None or value is _MISSING:
        return "nothing" if value is _MISSING else "null"
    if isinstance(value, str):
        return "text" if value.strip() else "empty text"
    kinds = ("flag", "whole", "number", "list", "object")
    return next((KINDS[kind][0] for kind in kinds if KINDS[kind][1](value)), type(value).__name__)
