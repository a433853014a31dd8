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
    """Makes text safe in LaTeX.

    >>> escape("50 % of a_b")
    '50 \\\\% of a\\\\_b'
    """
    return "".join(_SPECIAL.get(letter, letter) for letter in text)


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
        " & ".join(map(escape, value.columns)) + r" \\",
        "\\midrule",
        *(" & ".join(escape(cell.line) for cell in row) + r" \\" for row in value.rows),
        "\\bottomrule",
        "\\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"
