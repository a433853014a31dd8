"""A new router is one file, one config and one transcription: in a copy of the project, with no other edit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SHARED = ("conformance", "causality", "conservation", "invariance", "group_invariance")

ROUTER = '''
"""Contrary choice: each token takes the experts it likes least; only a test wants that."""

import flax.linen as nn
import jax

from moelab import router, routing, scores


class Router(router.Router):
    """Selects the k experts of the lowest score."""

    sharpness: float = 1.0  # factor of the logits

    @nn.compact
    def __call__(self, x_TD, inputs, selection_bias_C=None):
        logit_TC = self.kernel_logits(x_TD)
        prob_TC = jax.nn.softmax(self.sharpness * logit_TC, axis=-1)
        column_TK = self.choose(-prob_TC, selection_bias_C, inputs)
        weight_TK = scores.select(prob_TC, column_TK)
        found = routing.Scores(logit_TC, prob_TC, -prob_TC)
        return routing.from_token_choice(column_TK, weight_TK, found, inputs, self.num_experts)
'''

CONFIG = '''
"""The contrary router.

    moelab run --config=experiments/contrary.py --workdir=runs/contrary

Lab book
  machine    not measured
  wall time  not measured
  result     not measured
  date       not measured
"""

import ml_collections


def get_config():
    """Returns the fields that differ from the defaults."""
    config = ml_collections.ConfigDict()
    config.moe = dict(num_experts=4)
    config.router = dict(kind="contrary", k=1, sharpness=2.0)
    return config
'''

TRANSCRIPTION = '''
"""The k lowest of softmax(sharpness * z)."""

import numpy as np
from scipy.special import softmax

CASES = [
    dict(num_experts=8, fields={}, train=True, bias=True),
    dict(num_experts=4, fields=dict(k=1, sharpness=0.5), train=False, bias=False),
]


def route(x, params, case, given):
    fields = dict(k=2, sharpness=1.0) | case["fields"]
    z = fields["sharpness"] * (x @ params["kernel"])
    chosen, p = np.zeros(z.shape, bool), softmax(z, axis=1)
    bias = 0 if given.bias is None else given.bias
    for t in np.flatnonzero(given.mask):
        chosen[t, np.argsort(p[t] - bias, kind="stable")[: fields["k"]]] = True
    return chosen, np.where(chosen, p, 0)


def example():
    # Scores 3/4 and 1/4 for the first token, 1/5 and 4/5 for the second.
    return dict(
        x=np.eye(2),
        params=dict(kernel=np.log([[3.0, 1.0], [1.0, 4.0]])),
        case=dict(num_experts=2, fields=dict(k=1), train=False, bias=False),
        given={},
        chosen=np.array([[0, 1], [1, 0]], bool),
        weight=np.array([[0, 0.25], [0.2, 0]]),
    )
'''


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project with the three files."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("moelab", "pallas_kernels", "experiments", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "moelab/routers/contrary.py").write_text(ROUTER.lstrip())
    (folder / "experiments/contrary.py").write_text(CONFIG.lstrip())
    (folder / "tests/conformance/routers/contrary.py").write_text(TRANSCRIPTION.lstrip())
    return folder


def python(folder, *words):
    """Runs Python with the copy ahead of the installed project."""
    environment = os.environ | {"PYTHONPATH": str(folder), "MOELAB_CACHE": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_tests(folder, *names):
    files = [f"tests/{name}_test.py" for name in names]
    return python(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "contrary", *files)


def test_the_shared_tests_find_the_new_router_and_pass(copy):
    found = python(copy, "-c", "import moelab, pathlib; print(pathlib.Path(moelab.__file__))")
    assert found.stdout.strip() == str(copy / "moelab/__init__.py"), found.stderr
    done = run_tests(copy, *SHARED, "experiments")
    assert done.returncode == 0, done.stdout[-3000:]
    # At least: conformance 5, causality 2 x 3 + 2, conservation 10, invariance 3, its experiment 3.
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 25, done.stdout[-500:]


def test_its_config_runs(copy):
    done = python(copy, "-m", "moelab", "run", "--config=experiments/contrary.py", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "the config is right" in done.stderr
    words = ("--config.router.sharpnes=3", "--dry_run")
    wrong = python(copy, "-m", "moelab", "run", "--config=experiments/contrary.py", *words)
    assert wrong.returncode != 0 and "sharpness" in wrong.stderr


def test_without_its_transcription_it_fails(copy):
    path = copy / "tests/conformance/routers/contrary.py"
    text = path.read_text()
    path.unlink()
    done = run_tests(copy, "conformance")
    path.write_text(text)
    assert done.returncode == 1
    assert "contrary has no transcription" in done.stdout
