"""Imports go one way. Every module's imports are read from its source, those inside functions too."""

import ast
import sys
from pathlib import Path

import pytest

import moelab

ROOT = Path(moelab.__file__).parent.parent
LIBRARY = sorted((ROOT / "moelab").rglob("*.py"))
KERNELS = sorted((ROOT / "pallas_kernels").rglob("*.py"))
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.py"))

# routing <- scores, router <- routers, balance <- experts <- model <- train, evaluate <- cli: a module may import from
# its own rank or below. What is not listed is a leaf that anyone may import and that imports no model code (see PLAIN).
RANKS = [
    ["moelab.routing"],
    ["moelab.scores", "moelab.capacity", "moelab.idle", "moelab.router"],
    ["moelab.routers", "moelab.balance", "moelab.balancing"],
    ["moelab.experts", "moelab.attention", "moelab.moe", "moelab.loss"],
    ["moelab.model", "moelab.optimizer"],
    ["moelab.step"],
    [
        "moelab.bench",
        "moelab.evaluate",
        "moelab.generate",
        "moelab.perplexity",
        "moelab.record",
        "moelab.routes",
        "moelab.scoring",
    ],
    ["moelab.train"],
    ["moelab.launch"],
    ["moelab.sweep", "moelab.rerun"],
    ["moelab.cli", "moelab.__main__"],
]
# No model code, anywhere in them; no jax while they are imported.
PLAIN = [
    "moelab.data",
    "moelab.report",
    "moelab.config",
    "moelab.config_file",
    "moelab.diagnostics",
    "moelab.environment",
    "moelab.errors",
    "moelab.fields",
    "moelab.metrics",
    "moelab.placement",
    "moelab.plan",
    "moelab.schema",
    "moelab.segregation",
    "moelab.spelling",
    "moelab.sweep_file",
    "moelab.task",
    "moelab.tasks",
    "moelab.trace",
    "moelab.validation",
]
NO_JAX_AT_IMPORT = [
    *PLAIN,
    "moelab.cli",
    "moelab.launch",
    "moelab.rerun",
    "moelab.sweep",
    "moelab.__main__",
]
FORBIDDEN = {"torch", "tensorflow", "clu", "pickle"}


def name_of(path):
    """The dotted name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source, module="", *, at_import=False):
    """Every dotted name that a source imports; with at_import those outside functions only."""
    found = set()

    def walk(node):
        for child in ast.iter_child_nodes(node):
            if at_import and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            if isinstance(child, ast.ImportFrom):
                package = module.rsplit(".", child.level)[0] if child.level else ""
                base = ".".join(filter(None, (package, child.module)))
                found.update(f"{base}.{alias.name}" for alias in child.names)
            walk(child)

    walk(ast.parse(source))
    return found


def within(name, packages):
    """Whether a dotted name is, or is inside, one of the packages."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def rank_of(name):
    """The rank of a module, or None where it has none."""
    return next((rank for rank, names in enumerate(RANKS) if within(name, names)), None)


def wrong_ways(source, module):
    """What a module imports and must not."""
    wrong = set()
    for name in imports_of(source, module):
        top = name.partition(".")[0]
        if top in FORBIDDEN or top in ("experiments", "tests", "notebooks"):
            wrong.add(name)
        if within(module, ["pallas_kernels"]) and top == "moelab":
            wrong.add(name)
        if within(module, PLAIN) and rank_of(name) is not None:
            wrong.add(name)
        mine, theirs = rank_of(module), rank_of(name)
        if mine is not None and theirs is not None and theirs > mine:
            wrong.add(name)
    for name in imports_of(source, module, at_import=True):
        if within(module, NO_JAX_AT_IMPORT) and within(
            name, ["jax", "flax", "optax", "orbax", "pallas_kernels"]
        ):
            wrong.add(name)
    return wrong


@pytest.mark.parametrize("path", [*LIBRARY, *KERNELS], ids=name_of)
def test_no_module_imports_the_wrong_way(path):
    assert wrong_ways(path.read_text(encoding="utf-8"), name_of(path)) == set()


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_experiments_are_pure_data(path):
    assert imports_of(path.read_text(encoding="utf-8")) == {"ml_collections"}


@pytest.mark.parametrize("path", [*LIBRARY, *KERNELS], ids=name_of)
def test_only_declared_packages_are_imported(path):
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8").lower().replace("-", "_")
    renamed = {
        "orbax": "orbax_checkpoint",
        "sklearn": "scikit_learn",
        "absl": "absl_py",
        "tensorboardx": "tensorboardx",
    }
    for name in imports_of(path.read_text(encoding="utf-8"), name_of(path)):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in ("moelab", "pallas_kernels"):
            continue
        # jaxlib comes with jax, triton's front end with the aot extra
        wanted = renamed.get(top.lower(), top.lower())
        assert wanted in text or wanted in ("jaxlib",), f"{name} is not in pyproject.toml"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pallas_kernels.formats", "import moelab"),
        ("pallas_kernels.formats", "def f():\n    from moelab import routing"),
        ("moelab.routing", "from moelab import routers"),
        ("moelab.routing", "from moelab.routers import top_k"),
        ("moelab.routing", "from moelab import scores"),
        ("moelab.capacity", "from moelab import balancing"),
        ("moelab.router", "from moelab.routers import top_k"),
        ("moelab.trace", "def f():\n    from moelab import routing"),
        ("moelab.routers.top_k", "from moelab import moe"),
        ("moelab.model", "from moelab import train"),
        ("moelab.evaluate", "import moelab.train"),
        ("moelab.train", "from moelab.cli import output"),
        ("moelab.data.loader", "def f():\n    from moelab import model"),
        ("moelab.report.html", "from moelab.evaluate import evaluate_run"),
        ("moelab.config", "import jax"),
        ("moelab.cli.output", "import jax.numpy as jnp"),
        ("moelab.metrics", "if True:\n    import jax"),
        ("moelab.model", "import torch"),
        ("moelab.model", "import pickle"),
        ("moelab.model", "from experiments import demo"),
        ("moelab.data.loader", "from ..model import init"),
    ],
)
def test_the_check_catches_what_is_planted(module, source):
    assert wrong_ways(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("moelab.cli.running", "def f():\n    import jax"),
        ("moelab.train", "from moelab import model, metrics, data"),
        ("moelab.routers.top_k", "from moelab import routing\nimport jax"),
        ("moelab.experts", "import pallas_kernels"),
    ],
)
def test_the_check_lets_the_right_way_pass(module, source):
    assert wrong_ways(source, module) == set()
