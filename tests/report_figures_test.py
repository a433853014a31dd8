"""The report's figures of routers: over training from the metrics, and from route traces."""

import dataclasses
import re

import numpy as np
import pytest
import run_directory
from report_page_test import _parse

from moelab import report, trace
from moelab.report import canvas, route_plots, router_curves, routes


@pytest.fixture(scope="module")
def run_path(tmp_path_factory):
    return run_directory.make(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture
def without_plots(monkeypatch):
    monkeypatch.setattr(canvas, "available", lambda: False)


def _trace(step, seed=0, tokens=400, **header):
    """Two layers, six experts; the routes of layer 1 follow the domain."""
    rng = np.random.default_rng(seed)
    document_T = np.repeat(np.arange(20), tokens // 20)
    domain_T = document_T % 2
    free_TK = np.argsort(rng.random((tokens, 6)), axis=1)[:, :2]
    bound_TK = np.stack([3 * domain_T, 3 * domain_T + 1 + rng.integers(0, 2, tokens)], axis=1)
    return trace.Trace(
        expert_MTK=np.stack([free_TK, bound_TK]),
        token_id_T=np.arange(tokens),
        domain_T=domain_T,
        document_T=document_T,
        layers=(0, 1),
        domains=("a", "b"),
        num_experts=6,
        num_columns=6,
        header={"step": step, "precision": "float32", "router": "top_k", "split": "test"} | header,
    )


ROUTE_FIGURES = [
    "Load per expert and layer",
    "Specialisation by domain",
    "Router saturation",
    "Routing flips by precision",
    "Experts that work together",
    "Placement of experts",
]


def test_traces_in_the_run_directory_add_their_figures(tmp_path):
    pytest.importorskip("matplotlib")
    path = run_directory.make(tmp_path / "run", steps=3)
    assert "<h2>Routes</h2>" not in report.write([path], tmp_path / "r.html").read_text()
    trace.save(path / "routes.npz", _trace(30))
    trace.save(path / "routes_10.npz", _trace(10, seed=1))
    trace.save(path / "routes_30.npz", _trace(30))
    trace.save(path / "routes_nvfp4_wa.npz", _trace(30, seed=2, precision="nvfp4_wa"))
    trace.save(path / "routes_validation.npz", _trace(30, tokens=200, split="validation"))
    trace.save(path / "routes_20.npz", _trace(20, tokens=200))
    page = report.write([path], tmp_path / "r.html").read_text()
    _parse(page)
    section = page[page.index("<h2>Routes</h2>") :]
    assert re.findall(r"<figure><h3>(.*?)</h3><svg", section) == ROUTE_FIGURES
    assert "routes_20.npz is left out: the traces have 200 and 400 tokens" in section
    assert "step 30, float32, top_k, test split, 400 tokens of 20 documents" in section
    assert "would reach 0.69 nats" in section  # ln 2: two domains of equal size
    assert str(tmp_path) not in page and 'src="' not in page
    assert "100.00&nbsp;%" in section or "100.00 %" in section  # layer 1 has all of the oracle's
    assert "routes_validation" not in section
    (path / "routes_10.npz").unlink()
    page = report.write([path], tmp_path / "r.html").read_text()
    assert "Router saturation" not in page and "Experts that work together" in page


def test_router_curves_show_what_was_recorded(run_path):
    pytest.importorskip("matplotlib")

    def drawn(change):
        run = report.load(run_path)
        for record_ in run.records("train"):
            change(record_["router"])
        return router_curves.figure(run)

    plain = drawn(lambda router: None)
    assert "dropped [%]" not in plain.svg and "Dropped" not in plain.caption  # zeros say nothing
    assert all(label in plain.svg for label in ("load entropy", "dead experts", "logit norm"))
    capped = drawn(lambda router: router.update(dropped_share=[0.2, None]))
    assert "dropped [%]" in capped.svg and "Dropped: by a capacity" in capped.caption
    assert "logit norm" not in drawn(lambda router: router.pop("logit_norm")).svg  # an older run
    assert drawn(lambda router: router.update(layers=[])) is None


def test_a_damaged_trace_is_noted_not_fatal(tmp_path, without_plots):
    path = run_directory.make(tmp_path / "run", steps=3)
    (path / "routes.npz").write_bytes(b"PK not really")
    page = report.write([path], tmp_path / "r.html").read_text()
    assert "No routes: routes.npz: cut off" in page
    trace.save(path / "routes.npz", _trace(3))
    page = report.write([path], tmp_path / "r.html").read_text()
    assert "Routes per MoE layer" in page and "<svg" not in page


def test_traces_of_one_expert_per_token_or_one_domain_leave_figures_out():
    pytest.importorskip("matplotlib")
    full = _trace(1)
    rows = routes.summary(full)
    assert rows[0]["mutual_information"] < rows[0]["null_q95"] * 1.5
    assert rows[1]["mutual_information"] == pytest.approx(rows[1]["oracle"])
    one = dataclasses.replace(full, expert_MTK=full.expert_MTK[..., :1], domain_T=full.domain_T * 0)
    found = routes.Routes(one)
    titles = [figure.title for figure in route_plots.figures(found, routes.summary(one))]
    assert titles == ["Load per expert and layer", "Placement of experts"]
