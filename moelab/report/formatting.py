"""How numbers are written in tables and pages: one place, so that every view agrees.

A missing value is written as NOT_MEASURED, never as a zero; a non-finite one as what it is.
"""

from __future__ import annotations

import math
from typing import Any

NOT_MEASURED = "not measured"
_MINUS = "\N{MINUS SIGN}"


def number(value: Any) -> float | None:
    """Reads a number of a card: float("NaN") and float("Infinity") name the non-finite ones.

    Returns:
      The float, or None where the value is missing or no number.
    """
    if value is None or isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def fixed(value: Any, digits: int, *, sign: bool = False, suffix: str = "") -> str:
    """Writes a number with a fixed number of digits after the point.

    >>> fixed(2.14159, 3), fixed(-0.5, 2, sign=True), fixed(None, 1), fixed("NaN", 2)
    ('2.142', '−0.50', 'not measured', 'NaN')
    """
    x = number(value)
    if x is None:
        return NOT_MEASURED
    if math.isnan(x):
        return "NaN"
    if math.isinf(x):
        return "∞" if x > 0 else _MINUS + "∞"
    text = f"{abs(x):,.{digits}f}"
    negative = x < 0 and any(c in "123456789" for c in text)
    return (_MINUS if negative else "+" if sign else "") + text + suffix


def count(value: Any) -> str:
    """Writes a whole number with thousands separators."""
    return fixed(value, 0)


def compact(value: Any) -> str:
    """Writes a large count in three digits.

    >>> compact(1_234_567), compact(999), compact(5.2e10)
    ('1.23 M', '999', '52.0 B')
    """
    x = number(value)
    if x is None or not math.isfinite(x):
        return fixed(value, 0)
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= limit:
            return _three_digits(x / limit) + " " + unit
    return fixed(x, 0)


def size(value: Any) -> str:
    """Writes bytes in powers of 1000.

    >>> size(12_582_912), size(512)
    ('12.6 MB', '512 B')
    """
    x = number(value)
    if x is None or not math.isfinite(x):
        return fixed(value, 0)
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(x) >= limit:
            return _three_digits(x / limit) + " " + unit
    return fixed(x, 0) + " B"


def percent(value: Any, digits: int = 1) -> str:
    """Writes a share as a percentage; a share below 1 is never rounded up to 100."""
    x = number(value)
    if x is None:
        return NOT_MEASURED
    text = fixed(100 * x, digits, suffix=" %")
    if x < 1 and math.isfinite(x) and text == fixed(100, digits, suffix=" %"):
        return "> " + fixed(100 - 10**-digits, digits, suffix=" %")
    return text


def p_value(value: Any, digits: int = 3) -> str:
    """Writes a probability of a test with so many digits after the point; a small one is never 0.

    >>> p_value(0.0004), p_value(0.0625), p_value(7.6e-06, 4)
    ('<0.001', '0.062', '<0.0001')
    """
    x, least = number(value), 10.0**-digits
    return f"<{least:.{digits}f}" if x is not None and x < least else fixed(value, digits)


def duration(value: Any) -> str:
    """Writes seconds as a person would say them.

    >>> duration(9.5), duration(152), duration(7322)
    ('9.5 s', '2 min 32 s', '2 h 2 min')
    """
    x = number(value)
    if x is None or not math.isfinite(x):
        return fixed(value, 0)
    if x < 60:
        return f"{x:.1f} s"
    if x < 3600:
        return f"{round(x) // 60} min {round(x) % 60} s"
    return f"{round(x) // 3600} h {round(x) % 3600 // 60} min"


def bounds(low: Any, high: Any, digits: int = 4) -> str:
    """Writes the bounds of an interval.

    >>> bounds(0.0101, 0.0145), bounds(None, None)
    ('[+0.0101, +0.0145]', '[interval not measured]')
    """
    if number(low) is None or number(high) is None:
        return "[interval not measured]"
    return "[{}, {}]".format(*(fixed(bound, digits, sign=True) for bound in (low, high)))


def _three_digits(x: float) -> str:
    return fixed(x, 2 if abs(x) < 10 else 1 if abs(x) < 100 else 0)
