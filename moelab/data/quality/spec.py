"""The words of `data.inject` and `data.filter`: "KIND FIELD=VALUE FIELD=VALUE", several domains as a+b.

>>> parse_filters(("classifier keep=0.5 domains=code+verse",))[0].domains
('code', 'verse')
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from moelab import fields
from moelab.data.document import DataError
from moelab.spelling import hint

LARGEST = (1 << 32) - 1  # of an integer: scikit-learn takes no larger seed


def parse_injectors(texts: Sequence[str]) -> tuple[Any, ...]:
    """Makes the injectors that `data.inject` names.

    Raises:
      DataError: no such kind or field, or a value that is not as wanted; it names the text.
    """
    from moelab.data.quality import inject

    made = tuple(_parse(text, inject, "Injector", "data.inject") for text in texts)
    for place, one in enumerate(made):
        copied = [before.kind for before in made[:place] if before.copies_clean]
        if copied and one.in_place:
            raise DataError(
                f"data.inject: {one.kind} behind {copied[0]} would spoil what {copied[0]} has copied; "
                f"put {copied[0]} last"
            )
    return made


def parse_filters(texts: Sequence[str], where: str = "data.filter") -> tuple[Any, ...]:
    """Makes the filters that `data.filter` names; errors as in `parse_injectors`."""
    from moelab.data.quality import filters

    return tuple(_parse(text, filters, "Filter", where) for text in texts)


def _parse(text: str, folder, class_name: str, where: str):
    name, *words = text.split() or [""]
    if name not in folder.KINDS:
        guess = hint(name, folder.KINDS) or f"; there are {', '.join(folder.KINDS)}"
        raise DataError(f"{where}: no {class_name.lower()} {name!r}{guess}")
    made = getattr(folder.module(name), class_name)
    known = {path.partition(".")[2]: field for path, field in fields.of_class(name, made).items()}
    values = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            guess = hint(key, known) or f"; it has {', '.join(known)}"
            what = f"no field {key!r}" if equals else f"{word!r} is not FIELD=VALUE"
            raise DataError(f"{where}: {name}: {what}{guess}")
        if key in values:
            raise DataError(f"{where}: {name}: {key} is given twice")
        kind = known[key].type
        try:
            values[key] = fields.parse(
                kind, value.replace("+", ",") if kind.startswith("tuple") else value
            )
        except fields.FieldError as error:
            raise DataError(f"{where}: {name}: {key} {error}") from None
    return _checked(made(**values), where)


def _checked(made, where: str):
    """Checks every number: of no tool has a negative one a meaning, nor an integer beyond LARGEST."""
    for name in made.shares:
        value = getattr(made, name)
        if not 0 <= value <= 1:
            raise DataError(f"{where}: {made.kind}: {name} must be between 0 and 1, got {value:g}")
    for name in made.counts:
        if getattr(made, name) < 1:
            raise DataError(
                f"{where}: {made.kind}: {name} must be at least 1, got {getattr(made, name)}"
            )
    for field in dataclasses.fields(made):
        value = getattr(made, field.name)
        if type(value) in (int, float) and value < 0:
            raise DataError(f"{where}: {made.kind}: {field.name} must be at least 0, got {value}")
        if type(value) is int and value > LARGEST:
            raise DataError(
                f"{where}: {made.kind}: {field.name} must be at most {LARGEST}, got {value}"
            )
    for problem in made.problems():
        raise DataError(f"{where}: {made.kind}: {problem}")
    return made


def written(made: Any) -> str:
    """Writes an injector or filter as a config would, its defaults left out.

    >>> written(parse_filters(("minhash  threshold=0.70 ngram=5",))[0])
    'minhash'
    """
    words = [made.kind]
    for field in dataclasses.fields(made):
        value = getattr(made, field.name)
        if value != field.default:
            words.append(
                f"{field.name}={'+'.join(map(str, value)) if isinstance(value, tuple) else value}"
            )
    return " ".join(words)
