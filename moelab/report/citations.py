"""BibTeX of the methods that runs used: the papers that the docstrings of their routers, mechanisms and filters name.

A docstring may name several papers, where one file is several published methods under different fields: all of them are
listed, and the writer picks. No network: titles and authors are kept in papers.py, by arXiv id.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moelab.report.papers import PAPERS

HEAD = "% Papers of the methods that were used, by moelab report --bibtex.\n"  # of what bibtex() writes
_PACKAGE = Path(__file__).parent.parent
_ID = re.compile(r"arXiv:(\d{4}\.\d{5})")

_RECIPES = {"nvfp4_training": ("2509.25149",), "fp8_block": ("2412.19437",)}
_STRAIGHT_THROUGH = ("1308.3432",)  # the gradient of fake quantization
_DISTILLATION = ("1503.02531", "2601.20088")
_DEEPSEEK_MOE = "2401.06066"  # fine-grained and shared experts
_STRENGTHS = ("coefficient", "rate")  # the first of them that a mechanism has is 0 where it is off


def of_docstring(path: Path) -> list[str]:
    """Returns the arXiv ids that a module's docstring names, in order; where it names none, its classes'."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    own, theirs = (
        list(dict.fromkeys(_ID.findall("\n".join(ast.get_docstring(node) or "" for node in nodes))))
        for nodes in ([tree], classes)
    )
    return own or theirs


def methods(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns the arXiv ids of a card's config by method: router, mechanisms, experts, low precision, data, tasks.

    A method whose file names no paper has an empty list; a task, dirt or filter without one is left out.
    """
    experts, found = config.get("moe") or {}, {}
    if experts.get("slots_per_expert"):
        found["soft MoE"] = of_docstring(_PACKAGE / "soft_moe.py")
    elif experts.get("num_experts"):
        kind = str((config.get("router") or {}).get("kind"))
        path = _PACKAGE / "routers" / f"{kind}.py"
        found[f"router {kind}"] = of_docstring(path) if path.is_file() else []
    for name, fields in (config.get("balance") or {}).items():
        path = _PACKAGE / "balance" / f"{name}.py"
        if path.is_file() and next((fields[key] for key in _STRENGTHS if key in fields), 0):
            found[f"balance {name}"] = of_docstring(path)
    found |= _low_precision(config.get("quantization") or {})
    if (config.get("upcycle") or {}).get("run"):
        found["upcycling"] = of_docstring(_PACKAGE / "upcycle.py")
    if experts.get("num_experts") and experts.get("num_shared_experts"):
        found["shared experts"] = [_DEEPSEEK_MOE]
    if _fine_grained(config):
        found["fine-grained experts"] = [_DEEPSEEK_MOE]
    data = config.get("data") or {}
    files = [
        ("task", "tasks", name) for name in (config.get("evaluation") or {}).get("tasks") or ()
    ]
    files += [("dirt", "data/quality/inject", spec.split()[0]) for spec in data.get("inject") or ()]
    files += [
        ("filter", "data/quality/filters", spec.split()[0]) for spec in data.get("filter") or ()
    ]
    for what, folder, name in files:
        path = _PACKAGE / folder / f"{name}.py"
        if path.is_file() and (named := of_docstring(path)):
            found[f"{what} {name}"] = named
    return found


def _fine_grained(config: Mapping[str, Any]) -> bool:
    """Says whether a token passes more than the usual two experts, each narrower than the model.

    DeepSeekMoE divides each expert of a top-2 layer into several narrower ones and takes as many times more of them. A
    config does not name the layer that was divided: experts at least as wide as the model are whole ones.
    """
    experts, router, model = (config.get(key) or {} for key in ("moe", "router", "model"))
    wanted = experts.get("num_experts"), router.get("k"), experts.get("expert_width")
    if not all(wanted) or experts.get("slots_per_expert"):
        return False
    return router["k"] > 2 and experts["expert_width"] < model.get("width", 0)


def _low_precision(quantization: Mapping[str, Any]) -> dict[str, list[str]]:
    found = {}
    recipe = quantization.get("recipe", "none")
    if recipe != "none":
        default = _STRAIGHT_THROUGH if "_qat" in recipe else ()
        found[f"recipe {recipe}"] = list(_RECIPES.get(recipe, default))
    format = quantization.get("format", "") if recipe.startswith("w4") else ""
    if any("_46" in named for named in (format, *(quantization.get("roles") or ()))):
        found["Four Over Six"] = of_docstring(_PACKAGE / "quant/ptq/four_over_six.py")
    if quantization.get("teacher"):
        found["distillation"] = list(_DISTILLATION)
    if quantization.get("reset_every"):
        found["resets of oscillating weights"] = of_docstring(_PACKAGE / "quant/oscillation.py")
    return found


def bibtex(configs: Iterable[Mapping[str, Any]]) -> str:
    """Writes BibTeX of the methods of some configs, each entry once, with a comment that says whose it is."""
    users: dict[str, list[str]] = {}
    without: list[str] = []
    for config in configs:
        for method, ids in methods(config).items():
            for paper in ids:
                if method not in users.setdefault(paper, []):
                    users[paper].append(method)
            if not ids and method not in without:
                without.append(method)
    parts = [_entry(paper, users[paper]) for paper in sorted(users)]
    if without:
        parts.append(f"% no paper is named for: {', '.join(without)}\n")
    return "\n".join([HEAD, *parts])


def _entry(paper: str, users: list[str]) -> str:
    lines = [f"% {', '.join(users)}", f"@misc{{arXiv:{paper},"]
    if paper in PAPERS:
        authors, title = PAPERS[paper]
        escaped = title.replace("&", r"\&")
        lines += [f"  author = {{{authors}}},", f"  title = {{{{{escaped}}}}},"]
    else:
        lines.append("  note = {title and authors not verified},")
    lines += [
        f"  year = {{20{paper[:2]}}},",
        f"  eprint = {{{paper}}},",
        "  archivePrefix = {arXiv},",
        "}",
    ]
    return "\n".join(lines) + "\n"
