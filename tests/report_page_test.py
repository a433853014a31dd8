"""Tables, pages and comparisons say what the card says, and nothing else."""

import csv
import dataclasses
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import run_directory
from tiny import make_config

from moelab import metrics, record, report, routers, schema
from moelab.report import (
    arm_file,
    baselines,
    canvas,
    compare,
    documents,
    facts,
    tables,
)
from moelab.report import card as cards
from moelab.report import html as run_page


@pytest.fixture(scope="module")
def run_path(tmp_path_factory):
    return run_directory.make(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture
def without_plots(monkeypatch):
    monkeypatch.setattr(canvas, "available", lambda: False)


class _Outline(HTMLParser):
    """Collects attributes and text, and fails on tags that do not nest."""

    VOID = {"meta", "link", "br", "img", "path", "use", "image", "rect"}

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def _parse(page):
    outline = _Outline()
    outline.feed(page)
    outline.close()
    assert outline.open == []
    return outline


def _edit(run_path, tmp_path, change):
    """Copies a run's card with a change, as a card that stands alone."""
    card = json.loads((run_path / cards.NAME).read_text())
    change(card)
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(card))
    return path


def test_importing_reports_imports_no_jax_and_no_matplotlib():
    code = (
        "import pkgutil, importlib, sys, moelab.report as r, moelab.metrics\n"
        "[importlib.import_module(f'moelab.report.{m.name}') for m in pkgutil.iter_modules(r.__path__)]\n"
        "print({'jax', 'matplotlib', 'flax'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_result_table_has_the_cards_numbers(run_path):
    run = report.load(run_path)
    table = tables.result_table(run)
    assert table.columns[:5] == ("precision", "wiki_en", "code", "verse", "all")
    for cells, row in zip(table.rows, run.rows, strict=True):
        assert cells[0].text == row["precision"]
        shown = [float(cell.text) for cell in cells[1:5]]
        stated = [row["bits_per_byte"][d] for d in (*run_directory.DOMAINS, "all")]
        np.testing.assert_allclose(shown, stated, atol=0.5e-4)  # four digits are shown
    nvfp4 = {c: cell for c, cell in zip(table.columns, table.rows[6], strict=True)}
    assert nvfp4["expert weights"].text == "1.77 MB"
    assert nvfp4["expert weights"].detail == "7.11× smaller"  # 12582912 / 1769520 = 7.111
    assert nvfp4["router agreement"].text == "96.60 %"  # 1 - 2 * 0.017
    delta = re.fullmatch(r"\+(\S+) \[\+(\S+), \+(\S+)\]", nvfp4["loss vs float32 [95 %]"].line)
    estimate, low, high = map(float, delta.groups())
    assert low < estimate < high
    assert estimate == pytest.approx(run.rows[6]["loss_delta"], abs=0.5e-4)


def test_csv_is_unrounded(run_path, tmp_path):
    rows = list(
        csv.DictReader(io.StringIO(report.write([run_path], tmp_path / "r.csv").read_text()))
    )
    card = cards.read(run_path)
    for row, stated in zip(rows, card["evaluation"]["rows"], strict=True):
        assert row["precision"] == stated["precision"]
        assert float(row["bits_per_byte.all"]) == stated["bits_per_byte"]["all"]
        assert float(row["loss_delta_low"]) <= stated["loss_delta"] <= float(row["loss_delta_high"])


def test_markdown_and_terminal_show_the_same_cells(run_path, capsys):
    table = tables.result_table(report.load(run_path))
    markdown = tables.to_markdown(table).splitlines()
    assert len(markdown) == 2 + len(run_directory.PRECISIONS)
    report.print_result(run_path, width=70)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 82  # the title may wrap, blocks fit the width
    for line in markdown[2:]:
        for cell in line.strip("| ").split(" | "):
            assert cell in printed
    for precision, *_ in run_directory.PRECISIONS:
        assert printed.count(f"{precision} ") >= 2  # more than one block at this width


def test_missing_values_are_not_measured_and_nan_is_nan(run_path, tmp_path, without_plots):
    def change(card):
        row = card["evaluation"]["rows"][7]
        row["expert_bytes"] = row["router_agreement"] = row["loss_delta"] = None
        row["bits_per_byte"]["code"] = "NaN"
        del row["bits_per_byte"]["verse"]
        card["training"]["wall_seconds"] = None

    alone = _edit(run_path, tmp_path, change)
    cells = [cell.text for cell in tables.result_table(report.load(alone)).rows[7]]
    assert cells[2] == "NaN"
    assert [cells[i] for i in (3, 5, 6, 7)] == ["not measured"] * 4
    page = report.write([alone], tmp_path / "r.html").read_text()
    assert "card alone: no curves, no intervals" in page
    assert "interval not measured" in page  # of the other rows: there are no documents here


def test_the_page_is_self_contained_and_parses(run_path, tmp_path):
    """The one test that draws: matplotlib is slow to import."""
    for path in report.render_run(run_path):
        assert path.is_file()
    page = (run_path / "report.html").read_text()
    outline = _parse(page)
    assert not re.search(r"https?:", page)
    assert not re.search(r"@import|<link|<iframe|src=", page)
    for tag, name, value in outline.attributes:
        if name in ("href", "src"):
            assert value.startswith(("#", "data:image/png;base64")), (tag, name, value)
    ids = [value for _, name, value in outline.attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    targets = {v[1:] for _, name, v in outline.attributes if name == "href" and v[0] == "#"}
    targets |= set(re.findall(r"url\(#([^)]+)\)", page))
    assert targets <= set(ids)
    assert ("meta", "name", "viewport") in outline.attributes
    titles = re.findall(r"<figure><h3>(.*?)</h3><svg", page)
    assert titles == [
        "Loss",
        "Quality against bytes",
        "Worst overload over training",
        "Routers over training",
        "Experts by domain",
        "Load per expert over training",
    ]
    text = "".join(outline.text)
    for precision, *_ in run_directory.PRECISIONS:
        assert text.count(precision) >= 2  # in the table and at its point in the plot
    assert "#0a0b0c" not in page and "var(--ink)" in page
    assert run_page.NO_PLOTS not in page
    assert "block 0" in text and "block 1" in text


def test_values_are_escaped(run_path, tmp_path, without_plots):
    def change(card):
        card["name"] = "<script>alert(1)</script>"
        card["evaluation"]["domains"][0] = '"><img src=x onerror=y>'
        card["command"] = "moelab run </code><b>"

    page = report.write([_edit(run_path, tmp_path, change)], tmp_path / "r.html").read_text()
    _parse(page)
    assert "<script>alert" not in page and "<img" not in page and "</code><b>" not in page
    markdown = report.write([tmp_path / "edited.json"], tmp_path / "r.md").read_text()
    assert "<script>" not in markdown


def test_without_matplotlib_the_page_says_so(run_path, tmp_path, without_plots, caplog):
    page = report.write([run_path], tmp_path / "r.html").read_text()
    assert "no plots: matplotlib is not installed" in page and "<svg" not in page
    assert "no plots: matplotlib" in caplog.text
    _parse(page)


def test_warnings_reach_every_report(run_path, tmp_path, without_plots, capsys):
    def change(card):
        card["data"]["fallback"] = True
        card["environment"]["git"]["dirty"] = True

    alone = _edit(run_path, tmp_path, change)
    report.print_result(alone, width=120)
    texts = [capsys.readouterr().out]
    texts += [report.write([alone], tmp_path / f"r{s}").read_text() for s in (".html", ".md")]
    for text in texts:
        assert "Fallback corpus" in text
        assert "uncommitted changes" in text
        assert "took 2 attempts" in text


def test_result_md_names_what_it_stands_on(run_path):
    text = report.write([run_path], run_path / "RESULT.md").read_text()
    card = cards.read(run_path)
    for part in (card["card_sha256"], card["config_sha256"], card["command"], "moelab verify"):
        assert part in text
    assert "beaten" not in text and "Kneser-Ney bigram" in text
    assert str(run_path.parent) not in text  # no absolute path


def test_damaged_records_are_noted_not_fatal(tmp_path, without_plots):
    path = run_directory.make(tmp_path / "run", steps=3)
    (path / documents.NAME).unlink()
    (path / "metrics.jsonl").write_text("{\n{}\n")
    text = report.write([path], tmp_path / "r.md").read_text()
    assert "No curves: metrics.jsonl cannot be read" in text
    assert "No intervals: evaluation/documents.parquet cannot be read (missing)" in text


def _at(value, path):
    for key in path.split("."):
        value = value[int(key) if isinstance(value, list) else key]
    return value


@pytest.mark.parametrize(
    "place, value, message",
    [
        ("environment.git", "abc", "environment.git wants an object, not text"),
        ("environment.packages", [1], "environment.packages wants an object, not a list"),
        ("environment.cpu", ["a"], "environment.cpu wants text, not a list"),
        ("data.mixture", "x", "data.mixture wants an object, not text"),
        ("data.mixture", {"epochs": 1}, "data.mixture.unique_tokens wants a number, not nothing"),
        ("data.tokens", 5, "data.tokens wants an object, not a whole number"),
        ("data.quality", {"inject": []}, "data.quality.outcomes wants a list, not nothing"),
        ("parameters.active", None, "parameters.active wants a number, not null"),
        ("parameters.active", "x", "parameters.active wants a number, not text"),
        ("training.tokens", "x", "training.tokens wants a number, not text"),
        ("seeds.seed", None, "seeds.seed wants a whole number, not null"),
        ("seeds", {}, "seeds.seed wants a whole number, not nothing"),
        (
            "data.mixture",
            {"epochs": 1, "unique_tokens": 1, "streams": [{}]},
            "data.mixture.streams[0].domain wants text, not nothing",
        ),
        ("seeds.seed", 0.5, "seeds.seed wants a whole number, not a number"),
        (
            "evaluation.rows.1.max_violation",
            3.0,
            "evaluation.rows[1].max_violation wants a list, not a number",
        ),
        ("evaluation.rows.1.precision", "float32", "the precision 'float32' 2 times"),
        ("evaluation.baselines", [1], "evaluation.baselines wants an object, not a list"),
        (
            "evaluation.baselines.kneser_ney_bigram",
            2.0,
            "evaluation.baselines.kneser_ney_bigram wants an object, not a number",
        ),
        ("evaluation.tasks", "x", "evaluation.tasks wants an object, not text"),
        (
            "evaluation.tasks",
            {"rows": [{"task": "recall"}]},
            "evaluation.tasks.rows[0].measure wants text, not nothing",
        ),
        ("evaluation.load_by_domain", [[[0.5]]], "wants layers x domains x experts"),
        ("config.moe", "x", "config.moe wants an object, not text"),
        ("config.balance", [1], "config.balance wants an object, not a list"),
        ("config.balance", {"z_loss": 1}, "config.balance.z_loss wants an object, not a whole"),
        ("config.quantization", "x", "config.quantization wants an object, not text"),
        ("config.data", {"filter": [""]}, "data.filter[0] wants text with a word in it, not empty"),
    ],
)
def test_a_damaged_card_is_refused_and_the_place_named(run_path, tmp_path, place, value, message):
    def change(card):
        above, _, key = place.rpartition(".")
        (_at(card, above) if above else card)[key] = value

    alone = _edit(run_path, tmp_path, change)
    with pytest.raises(report.ReportError, match=re.escape(message)) as error:
        report.load(alone)
    assert f"{alone}: result.json: damaged card: " in str(error.value)
    assert "\n" not in str(error.value)


def test_the_committed_cards_are_not_damaged():
    entries = [
        entry
        for path in map(baselines.find, baselines.names())
        for entry in arm_file.read(path).entries.values()
    ]
    assert len(entries) > 300


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r.update(router=None), "line 3: router wants an object, not null"),
        (lambda r: r.update(router=[1]), "line 3: router wants an object, not a list"),
        (lambda r: r.pop("step"), "line 3: step wants a whole number, not nothing"),
        (lambda r: r.update(step="x"), "line 3: step wants a whole number, not text"),
        (
            lambda r: r.update(bits_per_byte=[1]),
            "line 3: bits_per_byte wants an object, not a list",
        ),
        (
            lambda r: r["router"].update(max_violation=[None, 1.0]),
            "line 3: router.max_violation wants a list of nothing but numbers, not a list",
        ),
        (
            lambda r: r["router"].pop("layers"),
            "line 3: router.layers wants 2 layers, not 0",
        ),
        (
            lambda r: r["router"]["max_violation"].append(1.0),
            "line 3: router.max_violation wants 2 layers, not 3",
        ),
        (
            lambda r: r["router"]["load"][1].append(0.0),
            "line 3: router.load wants 8 experts, not 9",
        ),
    ],
)
def test_a_damaged_journal_leaves_no_curves(tmp_path, without_plots, change, message):
    path = run_directory.make(tmp_path / "run", steps=5)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    damaged = json.loads(lines[2])
    change(damaged)
    lines[2] = json.dumps(damaged)
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = report.write([path], tmp_path / "r.html").read_text()
    assert "No curves: metrics.jsonl cannot be read (" in page and message in page
    _parse(page)


def test_runs_are_compared_pairwise(run_path, tmp_path, without_plots):
    other = run_directory.make(tmp_path / "other", seed=1)
    rows = compare.compare_rows([report.load(p) for p in (run_path, other)])
    assert [row["run"] for row in rows] == ["demo", "other"]
    bits = [row["bits_per_byte.all"] for row in rows]
    assert rows[1]["difference"] == pytest.approx(bits[1] - bits[0])
    assert rows[1]["difference_low"] <= rows[1]["difference"] <= rows[1]["difference_high"]
    page = report.write([run_path, other], tmp_path / "c.html").read_text()
    _parse(page)
    markdown = report.write([run_path, other], tmp_path / "c.md").read_text()
    assert "| seed | 0 | 1 |" in markdown
    written = report.write([run_path, other], tmp_path / "c.csv").read_text()
    assert len(written.splitlines()) == 3


def test_runs_that_do_not_compare_are_refused(run_path, tmp_path):
    def tokenizer(card):
        card["data"]["tokenizer_sha256"] = "99" * 32

    with pytest.raises(report.ReportError, match=r"cannot be compared: tokenizers differ \(efef"):
        report.write([run_path, _edit(run_path, tmp_path, tokenizer)], tmp_path / "c.md")

    def split(card):
        card["evaluation"]["split"] = "validation"

    with pytest.raises(report.ReportError, match="evaluation split differ"):
        report.write([run_path, _edit(run_path, tmp_path, split)], tmp_path / "c.md")
    fewer = run_directory.make(tmp_path / "fewer", documents_per_domain=5)
    with pytest.raises(report.ReportError, match="evaluation documents differ"):
        report.write([run_path, fewer], tmp_path / "c.md")


def test_other_documents_of_the_same_number_are_refused(run_path, tmp_path):
    other = run_directory.make(tmp_path / "other")
    path = other / documents.NAME
    table = documents.pa.parquet.read_table(path)
    names = [name.replace("verse/0", "verse/x") for name in table["document"].to_pylist()]
    documents.pa.parquet.write_table(table.set_column(2, "document", [names]), path)
    with pytest.raises(report.ReportError, match="evaluation sets differ in 2 documents"):
        report.write([run_path, other], tmp_path / "c.md")


@pytest.mark.parametrize(
    "runs, out, message",
    [
        ([], "r.md", "at least one run"),
        (["nowhere"], "r.md", "no such run: nowhere"),
        (["."], "r.md", "result.json: missing .did the run finish"),
        (["."], "r.pdf", "ends in .html, .md, .csv, .tex; got"),
    ],
)
def test_user_errors_are_one_line(tmp_path, monkeypatch, runs, out, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(report.ReportError, match=message) as error:
        report.write(runs, out)
    assert "\n" not in str(error.value)


def test_the_card_is_canonical_and_signed(run_path):
    card = cards.read(run_path)
    assert cards.digest(card) == card["card_sha256"]
    backwards = dict(reversed(card.items()))
    assert cards.canonical(backwards) == cards.canonical(card)
    assert cards.canonical({"b": 1.0, "a": [float("nan"), "é"]}) == '{"a":["NaN","é"],"b":1.0}'
    assert list(card) == list(cards.SECTIONS)


def test_bibtex_pins_the_run(run_path):
    run = report.load(run_path)
    text = facts.bibtex(run)
    assert run.card["card_sha256"] in text and run.card["config_sha256"] in text
    assert text.count("{") == text.count("}")


def test_a_run_without_experts_has_no_router_section(tmp_path, without_plots):
    path = run_directory.make(tmp_path / "dense", steps=3)
    records = [r for r in metrics.read(path / "metrics.jsonl") if r["kind"] != "event"]
    (path / "metrics.jsonl").unlink()
    empty = {"layers": [], "load": [], "max_violation": [], "entropy": [], "dead_experts": []}
    with metrics.MetricsWriter(path / "metrics.jsonl") as writer:
        for record in records:
            writer.write(record | {"router": empty})
    assert "## Routers" not in report.write([path], tmp_path / "r.md").read_text()


def test_a_leak_is_the_first_warning_everywhere(run_path, tmp_path, without_plots, capsys):
    leak = "experts choose among all tokens of the batch"
    alone = _edit(run_path, tmp_path, lambda card: card.update(leak=leak))
    assert leak in facts.warnings(report.load(alone))[0]
    report.print_result(alone, width=120)
    texts = [capsys.readouterr().out]
    texts += [report.write([alone], tmp_path / f"r{s}").read_text() for s in (".html", ".md")]
    assert all(f"Not causal: {leak}" in text for text in texts)
    causal = _edit(run_path, tmp_path, lambda card: card.update(leak=""))
    assert not any("Not causal" in line for line in facts.warnings(report.load(causal)))


def test_a_group_is_said(run_path, tmp_path):
    grouped = _edit(run_path, tmp_path, lambda card: card.update(group="micro-batch of a device"))
    assert any(
        "compete within a micro-batch" in line for line in facts.warnings(report.load(grouped))
    )
    assert not any("compete" in line for line in facts.warnings(report.load(run_path)))


def test_a_bound_is_marked_everywhere(run_path, tmp_path, without_plots, capsys):
    """Oracle and uniform routing are never ranked: the card says so, and every report and comparison."""
    bounds = {kind: record.bound(make_config(router=dict(kind=kind))) for kind in routers.KINDS}
    marked = {kind for kind, why in bounds.items() if why}
    assert marked == {k for k in routers.KINDS if not routers.module(k).Router.ranked}
    assert marked == {"oracle", "uniform"}
    assert record.bound(make_config(moe=dict(num_experts=0), router=dict(kind="uniform"))) == ""
    alone = _edit(run_path, tmp_path, lambda card: card.update(bound=bounds["oracle"]))
    report.print_result(alone, width=120)
    texts = [capsys.readouterr().out]
    texts += [report.write([alone], tmp_path / f"r{s}").read_text() for s in (".html", ".md")]
    assert all("Bound, not ranked: router.kind=oracle" in text for text in texts)
    both = [
        report.write([run_path, alone], tmp_path / f"c{s}").read_text()
        for s in (".html", ".md", ".csv")
    ]
    assert all("bound, not ranked" in text for text in both[:2])
    assert "router.kind=oracle" in both[2].splitlines()[2]
    earlier = _edit(run_path, tmp_path, lambda card: card.pop("bound"))
    assert not any("Bound" in line for line in facts.warnings(report.load(earlier)))


def test_the_balancing_coefficient_is_converted_where_it_is_on(
    run_path, tmp_path, without_plots, capsys
):
    def change(card):
        card["config"] |= {
            "balance": {"switch_loss": {"coefficient": 0.02, "first_choice_only": False}},
            "router": {"k": 2},
            "moe": {"num_experts": 8},
        }

    report.print_coefficients(run_path)
    assert (
        capsys.readouterr().out == ""
        and "elsewhere" not in report.write([run_path], tmp_path / "r.md").read_text()
    )
    alone = _edit(run_path, tmp_path, change)
    report.print_coefficients(alone)
    texts = [capsys.readouterr().out]
    texts += [report.write([alone], tmp_path / f"r{s}").read_text() for s in (".html", ".md")]
    for text in texts:
        assert "router_aux_loss_coef" in text and "Megatron-Core" in text
    # two MoE layers: Megatron 0.02 / 2; k = 2: Hugging Face 0.02 / 2
    cells = {row[0].text: row[2].value for row in tables.coefficient_table(report.load(alone)).rows}
    assert cells["Megatron-Core"] == cells["Hugging Face"] == 0.01 and cells["MegaBlocks"] == 0.02


def test_the_precision_of_training_is_told():
    plain = dict(model={"dtype": "float32"}, quantization=dataclasses.asdict(schema.Quantization()))
    assert facts.training_precision(plain) == "float32"
    assert facts.training_precision({"model": {"dtype": "bfloat16"}}) == "bfloat16"  # an older card
    changes = dict(recipe="nvfp4_training", start_step=5, last_layers=2, teacher="runs/a")
    found = facts.training_precision(plain | {"quantization": plain["quantization"] | changes})
    assert found == (
        "float32, nvfp4_training, in steps 6 to the last, but for the 0 first and 2 last layers, "
        "distilled from runs/a"
    )
