"""BibTeX of the methods that runs used: the papers that the docstrings of their routers and mechanisms name.

A docstring may name several papers, where one file is several published methods under different fields: all of them are
listed, and the writer picks. No network: titles and authors are kept here, by arXiv id.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parent.parent
_ID = re.compile(r"arXiv:(\d{4}\.\d{5})")

# arXiv id -> (first authors, title)
PAPERS = {
    "1701.06538": (
        "Shazeer, Noam and Mirhoseini, Azalia and Maziarz, Krzysztof and others",
        "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
    ),
    "2006.16668": (
        "Lepikhin, Dmitry and Lee, HyoukJoong and Xu, Yuanzhong and others",
        "GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding",
    ),
    "2101.03961": (
        "Fedus, William and Zoph, Barret and Shazeer, Noam",
        "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity",
    ),
    "2103.16716": (
        "Lewis, Mike and Bhosale, Shruti and Dettmers, Tim and others",
        "BASE Layers: Simplifying Training of Large, Sparse Models",
    ),
    "2106.04426": (
        "Roller, Stephen and Sukhbaatar, Sainbayar and Szlam, Arthur and Weston, Jason",
        "Hash Layers For Large Sparse Models",
    ),
    "2106.05974": (
        "Riquelme, Carlos and Puigcerver, Joan and Mustafa, Basil and others",
        "Scaling Vision with Sparse Mixture of Experts",
    ),
    "2202.01169": (
        "Clark, Aidan and de las Casas, Diego and Guy, Aurelia and others",
        "Unified Scaling Laws for Routed Language Models",
    ),
    "2202.08906": (
        "Zoph, Barret and Bello, Irwan and Kumar, Sameer and others",
        "ST-MoE: Designing Stable and Transferable Sparse Expert Models",
    ),
    "2202.09368": (
        "Zhou, Yanqi and Lei, Tao and Liu, Hanxiao and others",
        "Mixture-of-Experts with Expert Choice Routing",
    ),
    "2204.09179": (
        "Chi, Zewen and Dong, Li and Huang, Shaohan and others",
        "On the Representation Collapse of Sparse Mixture of Experts",
    ),
    "2212.05055": (
        "Komatsuzaki, Aran and Puigcerver, Joan and Lee-Thorp, James and others",
        "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints",
    ),
    "2212.08066": (
        "Chen, Zitian and Shen, Yikang and Ding, Mingyu and others",
        "Mod-Squad: Designing Mixture of Experts As Modular Multi-Task Learners",
    ),
    "2308.00951": (
        "Puigcerver, Joan and Riquelme, Carlos and Mustafa, Basil and Houlsby, Neil",
        "From Sparse to Soft Mixtures of Experts",
    ),
    "2401.04088": (
        "Jiang, Albert Q. and Sablayrolles, Alexandre and Roux, Antoine and others",
        "Mixtral of Experts",
    ),
    "2403.07652": (
        "Huang, Quzhe and An, Zhenwei and Zhuang, Nan and others",
        "Harder Tasks Need More Experts: Dynamic Routing in MoE Models",
    ),
    "2405.04434": (
        "{DeepSeek-AI}",
        "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
    ),
    "2408.15664": (
        "Wang, Lean and Gao, Huazuo and Zhao, Chenggang and others",
        "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
    ),
    "2409.02060": (
        "Muennighoff, Niklas and Soldaini, Luca and Groeneveld, Dirk and others",
        "OLMoE: Open Mixture-of-Experts Language Models",
    ),
    "2410.07348": (
        "Jin, Peng and Zhu, Bo and Yuan, Li and Yan, Shuicheng",
        "MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts",
    ),
    "2410.07524": (
        "He, Ethan and Khattar, Abhinav and Prenger, Ryan and others",
        "Upcycling Large Language Models into Mixture of Experts",
    ),
    "2412.14711": (
        "Wang, Ziteng and Zhu, Jun and Chen, Jianfei",
        "ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing",
    ),
    "2412.19437": ("{DeepSeek-AI}", "DeepSeek-V3 Technical Report"),
    "2501.11873": (
        "Qiu, Zihan and Huang, Zeyu and Zheng, Bo and others",
        "Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized Mixture-of-Experts Models",
    ),
    "2509.25149": ("{NVIDIA}", "Pretraining Large Language Models with NVFP4"),
}
_RECIPES = {"nvfp4_training": ("2509.25149",), "fp8_block": ("2412.19437",)}
_STRENGTHS = ("coefficient", "rate")  # the field of a mechanism that is 0 where it is off


def of_docstring(path: Path) -> list[str]:
    """Returns the arXiv ids that a module's docstring names, in order."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return list(dict.fromkeys(_ID.findall(ast.get_docstring(tree) or "")))


def methods(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns the arXiv ids of a card's config by method: router, mechanisms that are on, recipe, upcycling.

    A method whose file names no paper has an empty list.
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
        if path.is_file() and any(fields.get(strength) for strength in _STRENGTHS):
            found[f"balance {name}"] = of_docstring(path)
    recipe = (config.get("quantization") or {}).get("recipe", "none")
    if recipe != "none":
        found[f"recipe {recipe}"] = list(_RECIPES.get(recipe, ()))
    if (config.get("upcycle") or {}).get("run"):
        found["upcycling"] = of_docstring(_PACKAGE / "upcycle.py")
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
    return "\n".join(parts)


def _entry(paper: str, users: list[str]) -> str:
    authors, title = PAPERS.get(paper, ("", ""))
    lines = [f"% {', '.join(users)}", f"@misc{{arXiv:{paper},"]
    if title:
        lines += [f"  author = {{{authors}}},", f"  title = {{{{{title}}}}},"]
    lines += [
        f"  year = {{20{paper[:2]}}},",
        f"  eprint = {{{paper}}},",
        "  archivePrefix = {arXiv},",
        "}",
    ]
    return "\n".join(lines) + "\n"
