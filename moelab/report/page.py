"""The shell of the HTML report: markup, style and the few lines of script, all inside one file.

Every value goes through `escape`; the page's content security policy forbids any request.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from moelab.report.canvas import Figure
from moelab.report.tables import Cell, Table

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)


def escape(value: Any) -> str:
    """Makes text safe inside elements and quoted attributes."""
    return html.escape(str(value), quote=True)


def document(title: str, body: Iterable[str]) -> str:
    """Wraps the body into a complete page."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def header(title: str, kicker: str, meta: Sequence[str]) -> str:
    """Writes the head of the page: what it is, and the line of where and when."""
    items = "".join(f"<li>{escape(item)}</li>" for item in meta)
    return (
        f'<header><p class="kicker">{escape(kicker)}</p><h1>{escape(title)}</h1>'
        f'<ul class="meta">{items}</ul></header>'
    )


def notice(text: str) -> str:
    """Writes a warning that nobody should scroll past."""
    return f'<p class="notice" role="note">{escape(text)}</p>'


def tiles(figures: Sequence[tuple[str, str, str]]) -> str:
    """Writes key figures as (label, value, detail) tiles."""
    cells = (
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}<small>{escape(detail)}</small></dd></div>"
        for label, value, detail in figures
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def section(heading: str, *content: str) -> str:
    """Writes a section with its heading."""
    return f"<section><h2>{escape(heading)}</h2>\n" + "\n".join(content) + "\n</section>"


def paragraph(text: str) -> str:
    """Writes a quiet paragraph of explanation."""
    return f'<p class="explain">{escape(text)}</p>'


def table(value: Table) -> str:
    """Writes a sortable table that scrolls inside its own box on a narrow screen."""
    heads = "".join(
        f'<th scope="col"><button type="button">{_heading(name)}</button></th>'
        for name in value.columns
    )
    rows = "".join(f"<tr>{_row(row)}</tr>" for row in value.rows)
    label = escape(value.title)
    return (
        f'<div class="table"><p class="caption">{label}</p>'
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">'
        f'<table class="sortable" aria-label="{label}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></div>"
    )


def _heading(name: str) -> str:
    return escape(name).replace(" %", "&nbsp;%")


def _row(row: Sequence[Cell]) -> str:
    cells = []
    for i, cell in enumerate(row):
        tag, scope = ("th", ' scope="row"') if i == 0 else ("td", "")
        key = f' data-value="{escape(cell.value)}"' if _sorts(cell.value) else ""
        small = "".join(f"<small>{escape(t)}</small>" for t in (cell.bounds, cell.detail) if t)
        kind = ' class="wide"' if cell.wide else ""
        cells.append(f"<{tag}{scope}{kind}{key}>{escape(cell.text)}{small}</{tag}>")
    return "".join(cells)


def _sorts(value: float | str | None) -> bool:
    return value is not None and (isinstance(value, str) or math.isfinite(value))


def pairs(values: Sequence[tuple[str, str]]) -> str:
    """Writes facts as a list of key and value."""
    rows = []
    for key, value in values:
        style = ' class="hash"' if re.fullmatch(r"[0-9a-f]{40,}", value) else ""
        rows.append(f"<div><dt>{escape(key)}</dt><dd{style}>{escape(value)}</dd></div>")
    return f'<dl class="pairs">{"".join(rows)}</dl>'


def figures(values: Sequence[Figure]) -> str:
    """Writes figures side by side where there is room."""
    drawn = (
        f"<figure><h3>{escape(f.title)}</h3>{f.svg}<figcaption>{escape(f.caption)}</figcaption></figure>"
        for f in values
    )
    return f'<div class="figures">{"".join(drawn)}</div>'


def code(text: str) -> str:
    """Writes text to copy, such as commands."""
    return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'


def details(summary: str, content: str) -> str:
    """Writes something to unfold."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


STYLE = """
:root{--paper:#fff;--ink:#1a1d21;--quiet:#5c6570;--rule:#d9dde2;--panel:#f6f7f9;--accent:#0a5c99;
--warn:#8a4b00;--warn-bg:#fff4e0;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--paper:#14171a;--ink:#e6e9ec;--quiet:#9aa4af;
--rule:#363d45;--panel:#1c2126;--accent:#6db5ec;--warn:#ffc46b;--warn-bg:#2e2412}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;background:var(--paper)}
body{margin:0;color:var(--ink);background:var(--paper);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:70rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
header{border-bottom:1px solid var(--rule);padding-bottom:1.1rem;margin-bottom:1.4rem}
.kicker{margin:0;color:var(--accent);font-size:.8rem;font-weight:600;letter-spacing:.08em;
text-transform:uppercase}
h1{margin:.1rem 0 .4rem;font-size:clamp(1.7rem,5vw,2.4rem);line-height:1.15;letter-spacing:-.015em;
overflow-wrap:anywhere}
h2{margin:2.6rem 0 .5rem;font-size:1.3rem;letter-spacing:-.01em}
h3{margin:0 0 .5rem;font-size:1rem}
.meta{display:flex;flex-wrap:wrap;gap:.15rem 1.4rem;margin:0;padding:0;list-style:none;
color:var(--quiet);font-size:.875rem}
.meta li{overflow-wrap:anywhere}
.explain{max-width:46rem;margin:.2rem 0 .9rem;color:var(--quiet);font-size:.9rem}
.notice{margin:.6rem 0;padding:.6rem .9rem;border-left:4px solid var(--warn);border-radius:4px;
background:var(--warn-bg);font-size:.925rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.7rem;margin:1.2rem 0}
.tiles div{padding:.7rem .9rem;border-radius:8px;background:var(--panel)}
.tiles dt{color:var(--quiet);font-size:.8rem}
.tiles dd{margin:0;font-size:1.4rem;font-weight:600;line-height:1.3;font-variant-numeric:tabular-nums}
small{display:block;color:var(--quiet);font-size:.75rem;font-weight:400;line-height:1.35}
.table{border:1px solid var(--rule);border-radius:8px;overflow:hidden}
.scroll{overflow-x:auto}
.scroll:focus-visible,pre:focus-visible,button:focus-visible,summary:focus-visible{
outline:2px solid var(--accent);outline-offset:-2px}
table{width:100%;border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
.caption{margin:0;padding:.6rem .65rem;color:var(--quiet);font-size:.8rem}
th,td{padding:.42rem .65rem;text-align:right;vertical-align:top;white-space:nowrap}
tbody tr{border-top:1px solid var(--rule)}
tbody tr:hover td,tbody tr:hover th{background:var(--panel)}
thead th{padding:0;white-space:normal;border-top:1px solid var(--rule);vertical-align:bottom}
thead button{width:100%;padding:.45rem .65rem;border:0;background:none;color:inherit;font:inherit;
font-weight:600;text-align:inherit;cursor:pointer}
thead button:hover{color:var(--accent)}
thead button::after{content:"\\2060\\a0\\2195";color:var(--quiet);font-weight:400}
th[aria-sort=ascending] button::after{content:"\\2060\\a0\\2191";color:inherit}
th[aria-sort=descending] button::after{content:"\\2060\\a0\\2193";color:inherit}
th:first-child{position:sticky;left:0;z-index:1;text-align:left;background:var(--paper)}
tbody th{font-weight:600}
td.wide{min-width:22rem;text-align:left;white-space:normal}
tbody th.wide{min-width:14rem;white-space:normal}
.pairs .hash{font:.75rem/1.7 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.figures,.columns{columns:2 24rem;column-gap:2.2rem}
.table+.figures{margin-top:1.6rem}
figure{min-width:0;margin:0 0 1.8rem;break-inside:avoid}
figure svg{display:block;width:100%;height:auto}
figure svg *{stroke-linejoin:round;stroke-linecap:butt}
figcaption{margin-top:.5rem;color:var(--quiet);font-size:.85rem}
.pairs{margin:.4rem 0 0;font-size:.875rem}
.pairs div{display:grid;grid-template-columns:minmax(8rem,14rem) minmax(0,1fr);gap:.2rem 1rem;
padding:.3rem 0;border-top:1px solid var(--rule)}
.pairs dt{color:var(--quiet)}
.pairs dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.columns>div{margin-bottom:1.6rem;break-inside:avoid}
pre{overflow-x:auto;margin:.4rem 0;padding:.8rem 1rem;border-radius:8px;background:var(--panel);
font:.82rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
details{margin:.7rem 0}
summary{cursor:pointer;color:var(--accent);font-size:.925rem}
footer{margin-top:3rem;padding-top:.8rem;border-top:1px solid var(--rule);color:var(--quiet);
font-size:.8rem;overflow-wrap:anywhere}
@media (max-width:40rem){main{padding:1.4rem 1rem 3rem}.pairs div{grid-template-columns:1fr;gap:0}
.tiles{grid-template-columns:1fr 1fr}
tbody th small{max-width:8rem;white-space:normal}}
@media print{main{max-width:none;padding:0}figure,.table{break-inside:avoid}thead button::after{content:""}}
"""

SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const key = (row, i) => row.cells[i].dataset.value;
  const compare = (a, b) => {
    const x = Number(a), y = Number(b);
    return Number.isNaN(x) || Number.isNaN(y) ? String(a).localeCompare(String(b)) : x - y;
  };
  heads.forEach((head, i) => head.firstElementChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(h => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...body.rows].sort((a, b) => {
      const x = key(a, i), y = key(b, i);
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      return up ? compare(x, y) : compare(y, x);
    });
    body.append(...rows);
  }));
}
"""
