"""Finds what a mistyped word or dotted path was meant to be."""

from __future__ import annotations

from collections.abc import Iterable

_FAR = 3  # edits beyond which two names have nothing to do with each other


def distance(a: str, b: str, limit: int = 1000) -> int:
    """Counts the edits between two words: insert, delete, replace a letter, or swap two neighbours.

    Stops counting beyond the limit, and returns limit + 1.

    d[i, j] = min(d[i-1, j] + 1, d[i, j-1] + 1, d[i-1, j-1] + (a_i != b_j), d[i-2, j-2] + 1 if swapped).

    >>> distance("num_experts", "num_exprets")
    1
    """
    while a and b and a[0] == b[0]:
        a, b = a[1:], b[1:]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    if abs(len(a) - len(b)) > limit:
        return limit + 1
    before, row = [], list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        older, before, row = before, row, [i]
        for j, other in enumerate(b, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                cost = min(cost, older[j - 2] + 1)
            row.append(cost)
        if min(row) > limit:
            return limit + 1
    return min(row[-1], limit + 1)


def closest(typed: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Returns the known names nearest to what was typed, all ties of the best, or none if nothing is near.

    In a dotted path the right leaf in the wrong section is near too, and so are initials (`lr`) and lone words
    (`steps`).

    >>> closest("moe.num_expert", ["moe.num_experts", "model.num_heads"])
    ['moe.num_experts']
    >>> closest("optimizer.lr", ["optimizer.learning_rate", "optimizer.b1"])
    ['optimizer.learning_rate']
    """
    allowed = max(1.5, min(_FAR, len(typed.rpartition(".")[2]) // 3))
    scores = {name: _score(typed, name) for name in known}
    best = min(scores.values(), default=allowed + 1)
    if best > allowed:
        return []
    return sorted(name for name, score in scores.items() if score == best)[:limit]


def _score(typed: str, name: str) -> float:
    """Rates how unlike two names are, in edits; what people also get wrong counts about one."""
    score = distance(typed, name, _FAR)
    section, _, leaf = typed.rpartition(".")
    name_section, _, name_leaf = name.rpartition(".")
    elsewhere = min(distance(section, name_section, 2), 1.5)
    if min(len(leaf), len(name_leaf)) > 2:
        score = min(score, distance(leaf, name_leaf, _FAR) + elsewhere)
    words = name_leaf.split("_")
    if len(words) > 1 and leaf == "".join(word[:1] for word in words):
        score = min(score, elsewhere)  # initials
    if len(words) > 1 and leaf and f"_{name_leaf}_".find(f"_{leaf}_") >= 0:
        score = min(score, 1 + elsewhere)  # some of the words
    if typed.startswith(f"{name}."):
        score = min(score, 1)  # a field is taken for a section
    return score


def hint(typed: str, known: Iterable[str], prefix: str = "") -> str:
    """Returns "; did you mean X?" for an error message, or "" if nothing is near."""
    names = [prefix + name for name in closest(typed, known)]
    return f"; did you mean {' or '.join(names)}?" if names else ""
