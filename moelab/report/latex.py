"""Tables for papers: booktabs, a caption, nothing that a paper's preamble must define but \\usepackage{booktabs}."""

from __future__ import annotations

import re
from collections.abc import Sequence

from moelab.report.tables import Table

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "\N{MINUS SIGN}": r"$-$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{INFINITY}": r"$\infty$",
}


def escape(text: str) -> str:
    """Makes text safe in LaTeX; line breaks and control characters become spaces, as an empty line ends a row.

    >>> escape("50 % of a_b")
    '50 \\\\% of a\\\\_b'
    """
    line = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split())
    return "".join(_SPECIAL.get(letter, letter) for letter in line)


def table(value: Table, caption: Sequence[str], label: str) -> str:
    """Writes a floating table.

    Args:
      value: the table; its details are left out.
      caption: sentences behind the table's title.
      label: for \\ref, without the `tab:`.
    """
    columns = "l" + "r" * (len(value.columns) - 1)
    lines = [
        "% \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{escape(' '.join([value.title.rstrip('.') + '.', *caption]))}}}",
        f"\\label{{tab:{re.sub(r'[^A-Za-z0-9:-]+', '-', label)}}}",
        f"\\begin{{tabular}}{{{columns}}}",
        "\\toprule",
        _row(value.columns),
        "\\midrule",
        *(_row([cell.line for cell in row]) for row in value.rows),
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    """A row that no line before it, which may end in an optional argument or a star, takes for its own."""
    line = " & ".join(map(escape, cells)) + r" \\"
    return "{}" + line if line.startswith(("[", "*")) else line
