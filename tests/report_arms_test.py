"""Comparisons of arms over paired seeds: tables, tests, refusals, figures, LaTeX and BibTeX."""

import csv
import dataclasses
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import run_directory
from report_page_test import _parse
from scipy import stats

import moelab
from moelab import config as configs
from moelab import report, sweep_file
from moelab.cli import main
from moelab.report import (
    arms,
    arms_measures,
    arms_page,
    arms_plots,
    arms_rows,
    arms_tables,
    canvas,
    citations,
    compare,
    crossing,
    fitted,
    latex,
    paired,
    papers,
    tables,
    two_levels,
)
from moelab.report import card as cards
from moelab.report import formatting as fmt
from moelab.report.tables import Cell, Table

SEEDS = 5
# Nats per token that an arm is worse than the first, and how it grows with the seed.
ARMS = {
    "plain": (0.0, 0.0),
    "worse": (0.05, 0.002),
    "better": (-0.02, 0.001),
    "alike": (0.0, 0.003),
}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A finished sweep of four arms and five seeds."""
    folder = tmp_path_factory.mktemp("sweep")
    points = []
    for seed in range(SEEDS):
        for i, (name, (worse, slope)) in enumerate(ARMS.items()):
            config = {"seed": seed, "router": {"kind": "top_k", "k": i + 1}}
            config |= {"moe": {"num_experts": 8}, "train": {"num_steps": 20}}
            shift = worse + slope * (-1) ** seed * (seed + 1)
            directory = folder / f"{name}-seed={seed}"
            sha = f"{i}{seed}" * 32
            run_directory.make(
                directory, seed=seed, steps=20, config=config, config_sha256=sha, shift=shift
            )
            entry = sweep_file.Entry(f"{name}-seed={seed}", directory.name, "x.py", [], sha)
            entry.status = sweep_file.FINISHED
            points.append(entry)
    sweep_file.write(sweep_file.Sweep("moelab sweep", "x.py", ["arms"], points), folder)
    return folder


@pytest.fixture
def compared(swept):
    return arms.compare(arms.group(report.load_all([swept])[0]))


@pytest.fixture
def without_plots(monkeypatch):
    monkeypatch.setattr(canvas, "available", lambda: False)


def bits(path):
    row = next(r for r in cards.read(path)["evaluation"]["rows"] if r["precision"] == "float32")
    return row["bits_per_byte"]["all"]


def test_arms_are_paired_by_seed_and_the_numbers_are_scipys(swept, compared):
    assert [arm.name for arm in compared.arms] == ["better", "plain", "alike", "worse"]
    a, b = ([bits(swept / f"{n}-seed={s}") for s in range(SEEDS)] for n in ("plain", "worse"))
    found = compared.differences["worse"]
    theirs = stats.ttest_rel(b, a)
    assert found.mean == pytest.approx(np.mean(np.subtract(b, a)))
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert found.t == pytest.approx(theirs.pvalue) and found.n == SEEDS
    assert found.sign_flip == (0.0625, 0.0625, 5)
    raw = [compared.differences[n].t for n in ("worse", "better", "alike")]
    corrected = [compared.differences[n].holm for n in ("worse", "better", "alike")]
    assert corrected == pytest.approx(paired.holm(raw)) and corrected != pytest.approx(raw)
    spread = np.std(np.subtract(b, a), ddof=1)
    assert found.detectable == pytest.approx(paired.detectable(spread, 5))
    assert found.both.low < found.mean < found.both.high
    assert found.correlation.estimate == pytest.approx(stats.pearsonr(a, b).statistic)


def test_rows_are_unrounded_with_every_point(swept, compared, tmp_path):
    written = report.write([swept], tmp_path / "r.csv").read_text()
    rows = list(csv.DictReader(io.StringIO(written)))
    assert [row["arm"] for row in rows] == ["better", "plain", "alike", "worse"]
    for row in rows:
        for seed in range(SEEDS):
            assert float(row[f"seed{seed}"]) == bits(swept / f"{row['arm']}-seed={seed}")
    runs = [cards.read(swept / f"plain-seed={s}") for s in range(SEEDS)]
    scores = [
        [card["evaluation"]["rows"][0]["bits_per_byte"][d] for d in run_directory.DOMAINS]
        for card in runs
    ]
    shown = [float(rows[1][f"interquartile_{key}"]) for key in ("mean", "low", "high")]
    assert shown == pytest.approx(tuple(paired.interquartile_mean(np.array(scores))))
    assert rows[1]["difference"] == "" and float(rows[3]["p_smallest"]) == 0.0625


def test_every_point_and_n_are_shown_and_what_they_cannot_say(swept, tmp_path):
    text = report.write([swept], tmp_path / "r.md").read_text()
    for arm in ARMS:
        for seed in range(SEEDS):
            assert f"{bits(swept / f'{arm}-seed={seed}'):.4f}" in text
    assert (
        "With 5 pairs the sign-flip test cannot give a p below 0.0625, so it never reaches" in text
    )
    assert "Detectable: the smallest true difference" in text and "correlate at" in text
    assert "Known limits: 3.82 M active parameters" in text
    assert "20 runs, " in text and "Example CPU" in text
    assert "| router.k |" in text and "| seed |" not in text.split("Config fields")[1]


def test_another_reference(swept, tmp_path):
    text = report.write([swept], tmp_path / "r.md", reference="worse").read_text()
    assert re.search(r"\| worse \| 5 \| [\d.]+ \| reference", text)
    with pytest.raises(report.ReportError, match="no arm 'wors'; did you mean --reference=worse"):
        report.write([swept], tmp_path / "r.md", reference="wors")
    runs = [swept / "plain-seed=0"]
    with pytest.raises(report.ReportError, match="--reference is for several arms"):
        report.write(runs, tmp_path / "r.md", reference="worse")


def test_another_precision(swept, tmp_path):
    text = report.write([swept], tmp_path / "r.md", precision="nvfp4_wa").read_text()
    assert "Bits per byte in nvfp4_wa" in text
    with pytest.raises(
        report.ReportError, match=r"in 'nvfp4_wq'; did you mean --precision=nvfp4_w"
    ):
        report.write([swept], tmp_path / "r.md", precision="nvfp4_wq")


def test_runs_of_one_arm_are_still_compared_one_by_one(swept, tmp_path):
    runs = [swept / f"plain-seed={s}" for s in (0, 1)]
    assert "# 2 runs" in report.write(runs, tmp_path / "r.md").read_text()
    both = [*runs, swept / "worse-seed=0"]
    text = report.write(both, tmp_path / "r.md").read_text()
    assert "# 2 arms" in text
    assert "k=1" in text and "k=2" in text  # named by what differs: their cards have one name
    assert "one pair" not in text and "interval is over documents alone" in text


def _change(path, tmp_path, change):
    target = tmp_path / f"changed-{path.name}"
    shutil.copytree(path, target)
    card = json.loads((target / cards.NAME).read_text())
    change(card)
    (target / cards.NAME).write_text(json.dumps(card))
    return target


def test_what_does_not_compare_is_refused_and_the_difference_named(swept, tmp_path):
    def refused(change, message):
        other = _change(swept / "worse-seed=1", tmp_path, change)
        runs = [swept / "plain-seed=0", swept / "plain-seed=1", swept / "worse-seed=0", other]
        with pytest.raises(report.ReportError, match=message):
            report.write(runs, tmp_path / "r.md")
        shutil.rmtree(other)

    refused(lambda c: c["data"].update(tokenizer_sha256="0" * 64), "tokenizers differ")
    refused(lambda c: c["evaluation"].update(split="validation"), "evaluation split differ")
    refused(lambda c: c["training"].update(tokens=5), r"training tokens differ \(81920 and 5\)")
    refused(lambda c: c.update(schema=99), "schema is 99; this moelab reads 1")
    refused(lambda c: c["seeds"].update(seed=0), "are one config with one seed, 0")


def test_different_tokens_are_compared_on_request_and_said(swept, tmp_path):
    other = _change(swept / "worse-seed=1", tmp_path, lambda c: c["training"].update(tokens=5))
    runs = [*(swept / f"plain-seed={s}" for s in (0, 1)), swept / "worse-seed=0", other]
    text = report.write(runs, tmp_path / "r.md", different_tokens=True).read_text()
    assert "different numbers of tokens" in text


def test_other_schemas_of_configs_are_refused(swept, tmp_path):
    other = _change(swept / "worse-seed=1", tmp_path, lambda card: None)
    recorded = json.loads((other / "config.json").read_text()) | {"schema": 1}
    (other / "config.json").write_text(json.dumps(recorded))
    runs = [*(swept / f"plain-seed={s}" for s in (0, 1)), swept / "worse-seed=0", other]
    with pytest.raises(report.ReportError, match="schemas of configs differ"):
        report.write(runs, tmp_path / "r.md")


def _runs_of(swept, names, seeds):
    return {name: [swept / f"{name}-seed={seed}" for seed in seeds] for name in names}


def _no_number(card):
    """As the toolkit writes the card of a run that diverged."""
    for row in card["evaluation"]["rows"]:
        row["bits_per_byte"] = dict.fromkeys(row["bits_per_byte"], "NaN")
        row["loss"] = row["loss_delta"] = "NaN"


class TestDiverged:
    @pytest.fixture
    def runs(self, swept, tmp_path):
        """Three arms of three seeds, the better one lost in the last of them."""
        found = _runs_of(swept, ("plain", "better", "worse"), range(3))
        found["better"][2] = _change(found["better"][2], tmp_path, _no_number)
        loaded = report.load_all([path for paths in found.values() for path in paths])[0]
        names = [name for name, paths in found.items() for _ in paths]
        return [dataclasses.replace(r, label=n) for r, n in zip(loaded, names, strict=True)]

    def test_it_is_last_marked_and_left_out_of_the_sentences(self, runs):
        found = arms.compare(arms.group(runs))
        assert [arm.name for arm in found.arms] == ["plain", "worse", "better"]
        assert found.diverged == {"better": 1}
        row = arms_tables.main_table(found).rows[-1]
        assert [cell.line for cell in row[1:7]] == (
            ["3", "NaN", "diverged in 1 of 3 runs", "", "", ""]
        )
        without = [run for run in runs if run.label != "better"]
        told = arms_tables.notes(arms.compare(arms.group(without)))
        assert arms_tables.notes(found) == told

    def test_so_is_one_pair_and_a_reference(self, runs):
        few = [r for r in runs if r.label == "plain" or r.card["seeds"]["seed"] == 2]
        found = arms.compare(arms.group(few))
        assert found.arms[-1].name == "better" and math.isnan(found.differences["better"].mean)
        assert "over documents alone" in " ".join(arms_tables.notes(found))  # of the worse
        found = arms.compare(arms.group(runs), "better")
        assert [arm.name for arm in found.arms] == ["plain", "worse", "better"]
        cells = [row[3].text for row in arms_tables.main_table(found).rows]
        assert cells == ["the reference diverged"] * 2 + ["reference"]
        assert arms_tables.notes(found) == []

    @pytest.mark.parametrize("suffix", [".html", ".md", ".csv", ".tex"])
    def test_every_report_of_it_is_written(self, swept, tmp_path, without_plots, suffix):
        runs = _runs_of(swept, ("plain", "worse"), range(3))
        runs["worse"][1] = _change(runs["worse"][1], tmp_path, _no_number)
        written = report.write([*runs["plain"], *runs["worse"]], tmp_path / f"r{suffix}")
        assert "NaN" in written.read_text() and 'data-value="nan' not in written.read_text()

    def test_the_command_line(self, swept, tmp_path, capsys):
        runs = _runs_of(swept, ("plain", "worse"), range(3))
        runs["worse"][1] = _change(runs["worse"][1], tmp_path, _no_number)
        words = ["report", *map(str, (*runs["plain"], *runs["worse"]))]
        assert main(words) == 0
        assert "diverged in 1 of 3 runs" in capsys.readouterr().out
        assert main([*words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[-1]["bits_per_byte"] == "NaN"
        assert main([*words, "--fit=isoflop"]) == 2
        assert "diverged in 1 of 3 runs" in capsys.readouterr().err

    def test_figures_are_drawn_without_it(self, runs):
        pytest.importorskip("matplotlib")
        assert arms_plots.figures(arms.compare(arms.group(runs)))

    def test_nothing_is_said_of_its_crossing(self):
        plain, other = (TestCrossing().arm(name, x, s) for name, x, s in CROSSING)
        lost = arms.Comparison((plain, other), plain, "float32", {}, {"other": 1})
        assert crossing.notes(lost) == []


class TestUnequalSeeds:
    """The reference has seeds 1 to 4, an arm has 0 and 1: one pair."""

    @pytest.fixture
    def found(self, swept):
        names = [*(("plain", s) for s in (1, 2, 3, 4)), *(("worse", s) for s in (0, 1))]
        names += [("alike", s) for s in range(5)]
        loaded = report.load_all([swept / f"{name}-seed={seed}" for name, seed in names])[0]
        runs = [dataclasses.replace(r, label=n) for r, (n, _) in zip(loaded, names, strict=True)]
        return arms.compare(arms.group(runs))

    def test_n_says_how_many_are_paired(self, found, swept):
        row = {row[0].text: row for row in arms_tables.main_table(found).rows}
        shown = {name: cells[1].line for name, cells in row.items()}
        assert shown == {"plain": "4", "worse": "2 (1 pair)", "alike": "5 (4 pairs)"}
        numbers = {row["arm"]: (row["n"], row["pairs"]) for row in arms_rows.rows(found)}
        assert numbers == {"plain": (4, None), "worse": (2, 1), "alike": (5, 4)}
        assert "worse & 2 (1 pair) &" in arms_page.render(found, ".tex", [], "r")

    def test_the_note_on_one_pair_says_what_its_interval_is_over(self, found):
        told = " ".join(arms_tables.notes(found))
        assert "spread between seeds: its interval is over documents alone." in told
        assert "With 4 pairs the sign-flip" in told
        alone = [
            dataclasses.replace(run, documents=None, label=arm.name)
            for arm in found.arms
            for run in arm.runs.values()
        ]
        without = arms.compare(arms.group(alone), "plain")
        (cell,) = (row[3] for row in arms_tables.main_table(without).rows if row[0].text == "worse")
        assert "[interval not measured]" in cell.line
        told = " ".join(arms_tables.notes(without))
        assert "spread between seeds: without its documents it has no interval." in told

    def test_the_note_on_the_sign_flip_test_is_of_the_most_pairs(self, swept):
        runs = _runs_of(swept, ("plain", "alike"), range(5)) | _runs_of(swept, ("worse",), (0, 1))
        loaded = report.load_all([path for paths in runs.values() for path in paths])[0]
        names = [name for name, paths in runs.items() for _ in paths]
        named = [dataclasses.replace(r, label=n) for r, n in zip(loaded, names, strict=True)]
        told = " ".join(arms_tables.notes(arms.compare(arms.group(named))))
        assert "With 5 pairs, the most of this table, the sign-flip test cannot" in told


def test_a_small_p_of_the_sign_flip_test_is_not_zero():
    flip = paired.sign_flip(np.zeros(18), np.ones(18))
    found = arms.Difference({}, 1.0, 0.5, 1.5, "seeds", sign_flip=flip)
    assert arms_tables._flip(found).line == "<0.0001"


def test_documents_that_say_nothing_have_no_interval_in_the_table(compared):
    lost = two_levels.TwoLevels(0.1, math.nan, math.nan, 0.1, math.nan)
    changed = dataclasses.replace(compared.differences["worse"], both=lost)
    found = dataclasses.replace(compared, differences=compared.differences | {"worse": changed})
    (cell,) = (row[3] for row in arms_tables.main_table(found).rows if row[0].text == "worse")
    assert cell.detail == "with documents [interval not measured]"


def test_sweeps_that_are_not_finished(swept, tmp_path, without_plots):
    folder = tmp_path / "half"
    folder.mkdir()
    saved = sweep_file.read(swept)
    for point in saved.points[:8]:
        shutil.copytree(swept / point.directory, folder / point.directory)
    for point in saved.points[8:]:
        point.status = sweep_file.WAITING
    sweep_file.write(saved, folder)
    page = report.write([folder], tmp_path / "r.html").read_text()
    assert "8 of 20 points of the sweep are finished" in page
    for point in saved.points:
        point.status = sweep_file.FAILED
    sweep_file.write(saved, folder)
    with pytest.raises(report.ReportError, match="none of the sweep's 20 points is finished"):
        report.write([folder], tmp_path / "r.html")


def test_bounds_are_apart_and_no_hypotheses(swept):
    runs = report.load_all([swept])[0]
    marked = [
        dataclasses.replace(r, card=r.card | {"bound": "by chance"}) if "better" in r.label else r
        for r in runs
    ]
    found = arms.compare(arms.group(marked))
    assert found.arms[-1].name == "better"
    assert math.isnan(found.differences["better"].holm)
    two = [found.differences[n].t for n in ("worse", "alike")]
    assert [found.differences[n].holm for n in ("worse", "alike")] == pytest.approx(
        paired.holm(two)
    )
    row = arms_tables.main_table(found).rows[-1]
    assert row[0].text == "better *" and "by chance" in row[0].detail
    assert "A star" in " ".join(arms_tables.notes(found))


FIGURES = [
    "Differences over paired seeds",
    "Learning curves",
    "Quality against bytes",
    "Experts by domain, by arm",
]


def test_the_page_is_self_contained(swept, tmp_path):
    pytest.importorskip("matplotlib")
    page = report.write([swept], tmp_path / "r.html").read_text()
    _parse(page)
    assert re.findall(r"<figure><h3>(.*?)</h3><svg", page) == FIGURES
    without_bibtex = re.sub(r"<details>.*?</details>", "", page, flags=re.S)
    assert not re.search(r"https?:|@import|<link|<iframe|src=", without_bibtex)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(set(ids)) == len(ids)
    assert "mathdefault" not in page
    assert "Cite the methods" in page and "2101.03961" in page


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1200, 400])
def test_chromium_has_nothing_to_complain_of(swept, tmp_path, width):
    page = report.write([swept], tmp_path / "r.html")
    words = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu"]
    words += ["--enable-logging=stderr", f"--window-size={width},900"]
    words += [f"--screenshot={tmp_path}/r.png", page.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (tmp_path / "r.png").stat().st_size > 10_000
    assert "CONSOLE" not in done.stderr


def test_costs_that_differ_get_their_figure(swept):
    pytest.importorskip("matplotlib")
    runs = report.load_all([swept])[0]
    costs = {"plain": 1e6, "worse": 3e6, "better": 8e6, "alike": 8e6}

    def priced(run):
        training = run.card["training"] | {"flops_per_token": costs[run.label.split("-")[0]]}
        return dataclasses.replace(run, card=run.card | {"training": training})

    found = arms.compare(arms.group([priced(run) for run in runs]))
    figure = arms_plots.pareto(found, "flops")
    assert figure.title == "Quality against compute"
    assert all(name in figure.svg for name in costs)
    assert arms_plots.pareto(found, "seconds") is None  # all alike


def test_bytes_are_of_all_weights(compared):
    """100 parameters, of which 60 are of experts: 240 bytes in float32, 120 in bfloat16, 34 with scales in four bits.

    Four bits were evaluated with the other 40 in float32.
    """
    rows = [
        {"precision": "float32", "expert_bytes": 240},
        {"precision": "nvfp4_w", "expert_bytes": 34},
    ]
    card = compared.reference.first.card
    card = card | {"parameters": {"total": 100}, "evaluation": card["evaluation"] | {"rows": rows}}
    run = dataclasses.replace(compared.reference.first, card=card)
    assert arms_plots.weight_bytes(run, run.rows[0]) == 400
    assert arms_plots.weight_bytes(run, run.rows[1]) == 34 + 40 * 4
    assert arms_plots.weight_bytes(run, {"precision": "bf16", "expert_bytes": 120}) == 200
    dense = [row | {"expert_bytes": 0} for row in rows]  # nothing of it is packed
    evaluation = card["evaluation"] | {"rows": dense}
    run = dataclasses.replace(run, card=card | {"evaluation": evaluation})
    assert [arms_plots.weight_bytes(run, row) for row in run.rows] == [400, 400]


CROSSING = ("plain", 1e6, 0.1), ("other", 2e6, 0.2)  # name, FLOPs per token, slope


class TestCrossing:
    """plain at 1e6 FLOPs per token, worse at 2e6: curves that are lines in log FLOPs, equal at 4e10."""

    def arm(self, name, per_token, slope, seeds=4, noise=0.0):
        runs = {}
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            records = []
            for step in (10, 20, 40, 80):
                flops = step * 1000 * per_token
                bits = 2 + 0.01 * seed - slope * math.log(flops / 4e10) + noise * rng.normal()
                record = {"kind": "evaluation", "split": "validation", "step": step}
                records.append(record | {"bits_per_byte": {"all": bits}})
            training = {"flops_per_token": per_token, "tokens": 80_000, "steps": 80}
            card = {"name": name, "training": training, "seeds": {"seed": seed}}
            runs[seed] = report.Run(Path(f"{name}{seed}"), card, records, None)
        return arms.Arm(name, runs)

    def test_two_lines(self):
        plain, other = self.arm("plain", 1e6, 0.1), self.arm("other", 2e6, 0.2)
        (found,) = crossing.crossings(plain, other)
        # Either arm has looks at 2e10, 4e10 and 8e10; between looks nothing is known.
        assert found.place == pytest.approx((4e10, 2e10, 8e10), rel=2e-3) and found.b_gains
        compared = arms.Comparison((plain, other), plain, "float32", {})
        of_what, note = crossing.notes(compared)
        assert "on the validation split, as trained" in of_what
        assert note.startswith("other crosses plain at 4e+10 [")
        assert note.endswith("] training FLOPs, better beyond.")
        figure = crossing.figure(compared)
        assert "other crosses plain" in figure.caption and "training FLOPs" in figure.svg
        assert "mathdefault" not in figure.svg and "1e+10" in figure.svg

    def test_rows_have_its_places(self):
        plain, other = (self.arm(*one) for one in CROSSING)
        compared = arms.Comparison((plain, other), plain, "float32", {})
        (found,) = crossing.crossings(plain, other)
        names = [f"crossing.1.{key}" for key in ("flops", "low", "high", "better_beyond")]
        row = arms_rows._crossings(other, compared)
        assert row == dict(zip(names, (*found.place, True), strict=True))
        assert arms_rows._crossings(plain, compared) == {}

    def test_what_is_not_shown_is_not_said(self):
        plain, other = self.arm("plain", 1e6, 0.1), self.arm("other", 2e6, 0.1, noise=0.01)
        compared = arms.Comparison((plain, other), plain, "float32", {})
        *_, note = crossing.notes(compared)
        assert note == (
            "No crossing with plain is shown, within the FLOPs that both have, for other."
        )

    def test_arms_of_equal_cost_or_without_looks_are_not_asked(self, compared):
        plain = self.arm("plain", 1e6, 0.1)
        same = arms.Comparison((plain, self.arm("b", 1e6, 0.2)), plain, "float32", {})
        assert crossing.notes(same) == [] and crossing.figure(same) is None
        assert crossing.notes(compared) == []
        assert crossing.crossings(plain, self.arm("b", 2e6, 0.2, seeds=1)) is None
        assert crossing.crossings(plain, self.arm("b", 1e9, 0.2)) is None  # no budget in common


class TestFits:
    def comparison(self, values, loss, seeds=3, **card):
        """Arms whose bits per byte are loss(value) and a level per seed; card: functions of the value."""
        made = []
        for value in values:
            runs = {}
            for seed in range(seeds):
                row = {"precision": "float32", "bits_per_byte": {"all": loss(value) + 0.1 * seed}}
                base = {
                    "name": f"n{value:g}",
                    "evaluation": {"rows": [row]},
                    "seeds": {"seed": seed},
                }
                runs[seed] = report.Run(
                    Path("x"), base | {k: f(value) for k, f in card.items()}, [], None
                )
            made.append(arms.Arm(f"n{value:g}", runs))
        return arms.Comparison(tuple(made), made[0], "float32", {})

    def sizes(self, **change):
        card = {
            "parameters": lambda n: {"active": n, "total": 4 * n},
            "training": lambda n: {"flops_per_token": 6 * n, "tokens": 1e12 / n},
        }
        curve = {"loss": lambda n: 2 + 0.05 * math.log(n / 5e6) ** 2}
        return self.comparison((1e6, 2e6, 4e6, 8e6, 16e6), **(card | curve | change))

    def test_isoflop(self):
        found = fitted.fit(self.sizes(), "isoflop")
        assert found.result["size"]["estimate"] == pytest.approx(5e6, rel=1e-4)
        assert (
            "least bits per byte at 5.00 M active parameters [5.00 M, 5.00 M]: 2.1"
            in found.sentence
        )
        assert found.parts[0].curve(np.array([5e6]))[0] == pytest.approx(2.1, abs=1e-6)
        svg = fitted.figure(found).svg
        assert "active parameters" in svg and "mathdefault" not in svg and "5 M" in svg

    def test_an_isoflop_says_of_which_seeds_the_loss_is_and_none_where_there_is_no_minimum(self):
        wavy = {"loss": lambda n: 2 + 0.05 * math.log(n / 5e6) ** 2 + 0.001 * math.sin(n)}
        assert fitted.fit(self.sizes(**wavy, seeds=1), "isoflop").sentence.endswith(
            " of this seed."
        )
        assert "of this seed" not in fitted.fit(self.sizes(**wavy), "isoflop").sentence
        far = fitted.fit(self.sizes(loss=lambda n: 2 + 0.05 * math.log(n / 1e9) ** 2), "isoflop")
        assert far.sentence.endswith("outside the sizes that ran.")
        assert math.isnan(far.result["bits_per_byte"]["estimate"])

    def test_isoflop_over_budgets(self):
        """Best size 2 C^0.5 at budgets of 1e12, 4e12 and 16e12 FLOPs; a point's value is (budget, size / best size)."""

        def card_of(point):
            budget, ratio = point
            size = 2 * budget**0.5 * ratio
            return {"flops_per_token": 6 * size, "tokens": budget / (6 * size), "size": size}

        card = {
            "parameters": lambda p: {"active": card_of(p)["size"], "total": card_of(p)["size"]},
            "training": card_of,
        }
        points = [(1e12 * 4**i, r) for i in range(3) for r in (0.5, 1, 2)]
        made = [
            self.comparison(
                [0],
                lambda _, p=p: 2 + 0.05 * math.log(p[1]) ** 2,
                **{key: (lambda _, read=read, p=p: read(p)) for key, read in card.items()},
            ).arms[0]
            for p in points
        ]
        made = tuple(arms.Arm(f"n{i}", arm.runs) for i, arm in enumerate(made))
        found = fitted.fit(arms.Comparison(made, made[0], "float32", {}), "isoflop")
        sizes = [one["size"]["estimate"] for one in found.result["budgets"]]
        assert sizes == pytest.approx([2e6, 4e6, 8e6], rel=1e-4)
        assert found.result["exponent"]["estimate"] == pytest.approx(0.5, abs=1e-6)
        assert "at 4.00 T training FLOPs least bits per byte at 4.00 M" in found.sentence
        assert "grows as training FLOPs^0.50 [0.50, 0.50], from 3 budgets" in found.sentence
        assert "16.0 T training FLOPs" in fitted.figure(found).svg
        two = arms.Comparison(made[:6], made[0], "float32", {})
        assert "wants three budgets" in fitted.fit(two, "isoflop").sentence

    def test_isoflop_wants_three_sizes_at_a_budget(self):
        unequal = {"training": lambda n: {"flops_per_token": 6 * n, "tokens": 1e6}}
        with pytest.raises(report.ReportError, match="three sizes at each budget; .* only n1e.06"):
            fitted.fit(self.sizes(**unequal), "isoflop")

    def test_granularity(self):
        card = {
            "parameters": lambda g: {"active": 100, "total": 800},
            "config": lambda g: {"moe": {"expert_width": 512 / g}},
        }
        found = fitted.fit(
            self.comparison((1, 2, 4, 8), lambda g: 2 + 0.3 * g**-0.6, **card), "granularity"
        )
        assert found.result["exponent"]["estimate"] == pytest.approx(0.6, rel=1e-3)
        assert "exponent 0.60 [0.60, 0.60]" in found.sentence
        assert found.parts[0].curve(np.array([2.0]))[0] == pytest.approx(
            2.1 + 0.3 * 2**-0.6, rel=1e-4
        )
        flat = fitted.fit(self.comparison((1, 2, 4, 8), lambda g: 2.0, **card), "granularity")
        assert flat.sentence.endswith("no gain: the points are all at 2.1000.")
        assert flat.parts[0].curve(np.array([1.0, 2.0])) == pytest.approx([2.1, 2.1])
        other = card | {"parameters": lambda g: {"active": 100 * g, "total": 800}}
        with pytest.raises(report.ReportError, match="equal active parameters; n1 has 100 and n8"):
            fitted.fit(self.comparison((1, 8), lambda g: g, **other), "granularity")

    def test_what_cannot_be_fitted_is_named(self, swept, tmp_path):
        with pytest.raises(
            report.ReportError, match="no fit 'isoflops'; did you mean --fit=isoflop"
        ):
            report.write([swept], tmp_path / "r.md", fit="isoflops")
        with pytest.raises(
            report.ReportError, match="--fit=isoflop of 4 arms and 5 seeds: wants at"
        ):
            report.write([swept], tmp_path / "r.md", fit="isoflop")
        with pytest.raises(report.ReportError, match="has no config.moe.expert_width"):
            report.write([swept], tmp_path / "r.md", fit="granularity")
        with pytest.raises(report.ReportError, match="--fit is for several arms"):
            report.write([swept / "plain-seed=0"], tmp_path / "r.md", fit="isoflop")


def test_the_front_is_what_nothing_beats():
    # (3, 2) is beaten by (2, 2); (1, 5) is the cheapest; equal points keep one.
    assert arms_plots.pareto_front([(3, 2), (2, 2), (1, 5), (2, 2), (4, 1)]) == [2, 1, 4]


def test_latex_is_a_table_with_a_caption(swept, tmp_path):
    text = report.write([swept], tmp_path / "paper.tex").read_text()
    assert text.count("{") == text.count("}")
    for part in ("\\caption{Bits per byte in float32", "\\label{tab:paper}", "\\toprule", "95 \\%"):
        assert part in text
    body = text[text.index("\\midrule") : text.index("\\bottomrule")]
    assert body.count("\\\\\n") == 4 and "Known limits" in text
    assert "\N{MINUS SIGN}" not in text
    one = report.write([swept / "plain-seed=0"], tmp_path / "one.tex").read_text()
    assert "nvfp4\\_wa" in one and "\\label{tab:demo}" in one
    odd = Table("50 % of a_b & c", ("x{", "y"), ((Cell("~^\\"), Cell("1")),))
    assert latex.table(odd, [], "a b").count("\\label{tab:a-b}") == 1


class TestMeasures:
    def test_domains_are_means_over_seeds_with_t_intervals(self, swept, compared):
        table = arms_measures.domains(compared)
        assert table.columns[0] == "arm" and len(table.rows) >= len(ARMS)
        row = next(row for row in table.rows if row[0].text == "worse")
        for name, cell in zip(table.columns[1:], row[1:], strict=True):
            values = []
            for seed in range(SEEDS):
                card = cards.read(swept / f"worse-seed={seed}")
                rows = card["evaluation"]["rows"]
                values.append(
                    next(r for r in rows if r["precision"] == "float32")["bits_per_byte"][name]
                )
            low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
            assert cell.value == pytest.approx(np.mean(values))
            assert cell.bounds == f"[{low:.4f}, {high:.4f}]"
        text = report.write([swept], swept.parent / "r.md").read_text()
        assert "Bits per byte by domain in float32, mean over seeds [95 %]." in text
        page = report.write([swept], swept.parent / "r.html").read_text()
        assert "Domains and tasks" in page

    def test_a_bigram_is_of_the_text_that_its_arms_saw(self, compared):
        def seen(arm, bits):
            runs = {}
            for seed, run in arm.runs.items():
                values = {name: bits + 0.1 * seed for name in run.domains}
                evaluation = run.card["evaluation"] | {"baselines": {"kneser_ney_bigram": values}}
                runs[seed] = dataclasses.replace(run, card=run.card | {"evaluation": evaluation})
            return dataclasses.replace(arm, runs=runs)

        def rows(*bits):
            chosen = tuple(seen(*pair) for pair in zip(compared.arms, bits, strict=True))
            found = dataclasses.replace(compared, arms=chosen, reference=chosen[0])
            return [r for r in arms_measures.domains(found).rows if r[0].text.startswith("(")]

        names = [arm.name for arm in compared.arms]
        (one,) = rows(3, 3, 3, 3)
        assert one[0].text == "(Kneser-Ney bigram)"
        assert one[1].value == pytest.approx(3 + 0.1 * np.mean(list(compared.arms[0].runs)))
        first, second = rows(3, 4, 3, 4)
        assert first[0].text == f"(Kneser-Ney bigram: {names[0]}, {names[2]})"
        assert second[0].text == f"(Kneser-Ney bigram: {names[1]}, {names[3]})"
        assert second[1].value == pytest.approx(first[1].value + 1)

    def test_the_validation_split_has_no_domains_and_no_documents_of_the_test_split(self, compared):
        told = arms_tables.limits(dataclasses.replace(compared, precision=arms.VALIDATION))
        assert "evaluated on the validation split." in told and "test split" not in told
        assert "of the test split." in arms_tables.limits(compared)
        in_validation = dataclasses.replace(compared, precision=arms.VALIDATION)
        assert arms_plots.pareto(in_validation, "bytes") is None
        asked = dataclasses.replace(compared, precision=arms.VALIDATION)
        assert arms_measures.domains(asked) is None

    def test_tasks_that_every_run_of_an_arm_has(self, compared):
        def two_precisions(evaluation):
            rows = evaluation["tasks"]["rows"]
            low = [row | {"precision": "bf16", "value": row["value"] - 0.1} for row in rows]
            return evaluation | {"tasks": {"rows": [*rows, *low]}}

        def with_tasks(arm, names):
            runs = {}
            for seed, run in arm.runs.items():
                base = {
                    "measure": "accuracy",
                    "precision": "float32",
                    "chance": 0.25,
                    "unit": "share",
                }
                rows = [{"task": name, "value": 0.5 + 0.01 * seed} | base for name in names]
                evaluation = run.card["evaluation"] | {"tasks": {"rows": rows}}
                runs[seed] = dataclasses.replace(run, card=run.card | {"evaluation": evaluation})
            return dataclasses.replace(arm, runs=runs)

        assert arms_measures.tasks(compared) is None
        asked = [("facts", "recall"), ("facts",), ("facts", "recall"), ("facts", "recall")]
        chosen = tuple(with_tasks(*pair) for pair in zip(compared.arms, asked, strict=True))
        asked_of = dataclasses.replace(compared, arms=chosen, reference=chosen[0])
        table = arms_measures.tasks(asked_of)
        assert table.columns == ("measure", "unit", "chance", *(arm.name for arm in chosen))
        row, recall = table.rows
        assert [cell.text for cell in row[:3]] == ["facts: accuracy", "share", "0.250"]
        assert recall[0].text == "recall: accuracy"
        assert [bool(cell.text) for cell in recall[3:]] == [True, False, True, True]
        low, high = stats.ttest_1samp([0.5, 0.51, 0.52, 0.53, 0.54], 0).confidence_interval(0.95)
        assert row[3].line == f"0.520 [{low:.3f}, {high:.3f}]"
        both = tuple(
            dataclasses.replace(
                arm,
                runs={
                    seed: dataclasses.replace(
                        run, card=run.card | {"evaluation": two_precisions(run.card["evaluation"])}
                    )
                    for seed, run in arm.runs.items()
                },
            )
            for arm in chosen
        )
        asked_of = dataclasses.replace(asked_of, arms=both, reference=both[0])
        both_tasks = ["facts: accuracy", "recall: accuracy"]
        assert [r[0].text for r in arms_measures.tasks(asked_of).rows] == both_tasks
        in_bf16 = dataclasses.replace(asked_of, precision="bf16")
        assert [r[3].value for r in arms_measures.tasks(in_bf16).rows] == [pytest.approx(0.42)] * 2
        unasked = dataclasses.replace(asked_of, precision="mxfp4_w")
        names = [r[0].text for r in arms_measures.tasks(unasked).rows]
        assert set(names) == {f"{t}, {p}" for t in both_tasks for p in ("float32", "bf16")}
        in_validation = dataclasses.replace(asked_of, precision=arms.VALIDATION)
        assert arms_measures.tasks(in_validation) is None
        numbers = arms_rows.rows(asked_of)[0]
        found = [numbers[f"task.facts.accuracy.float32{end}"] for end in ("", ".low", ".high")]
        assert found == pytest.approx([0.52, low, high])
        assert numbers["task.facts.accuracy.bf16"] == pytest.approx(0.42)

    def test_a_share_stays_within_0_and_1_and_equal_values_have_no_interval(self, compared):
        def with_values(arm, shares):
            runs = {}
            for seed, run in arm.runs.items():
                row = {"task": "t", "measure": "m", "precision": "float32", "chance": 0.5}
                row |= {"value": shares[seed], "unit": "share"}
                nats = row | {"measure": "gain", "unit": "nats per token"}
                evaluation = run.card["evaluation"] | {"tasks": {"rows": [row, nats]}}
                runs[seed] = dataclasses.replace(run, card=run.card | {"evaluation": evaluation})
            return dataclasses.replace(arm, runs=runs)

        wide, same = (0.7, 1.0, 1.0, 1.0, 1.0), (0.9,) * SEEDS
        shares = [wide, same, same, same]
        chosen = tuple(with_values(*pair) for pair in zip(compared.arms, shares, strict=True))
        asked = dataclasses.replace(compared, arms=chosen, reference=chosen[0])
        low, high = stats.ttest_1samp(wide, 0).confidence_interval(0.95)
        assert high > 1
        share, gain = arms_measures.tasks(asked).rows
        assert share[3].line == f"0.940 [{low:.3f}, 1.000]"
        assert gain[3].line == f"0.940 [{low:.3f}, {high:.3f}]"
        assert share[4].line == gain[4].line == "0.900"
        first, second = arms_rows.rows(asked)[:2]
        ends = ("", ".low", ".high")
        assert [first[f"task.t.m.float32{e}"] for e in ends] == pytest.approx([0.94, low, 1.0])
        assert [second[f"task.t.m.float32{e}"] for e in ends] == [pytest.approx(0.9), None, None]

    def test_rows_have_the_domains_behind_all_other_columns(self, swept, compared, tmp_path):
        written = report.write([swept], tmp_path / "r.csv").read_text()
        rows = list(csv.DictReader(io.StringIO(written)))
        columns = list(rows[0])
        first = columns.index(f"seed{SEEDS - 1}") + 1
        names = [f"bits_per_byte.{d}" for d in run_directory.DOMAINS]
        assert columns[first:] == [f"{n}{end}" for n in names for end in ("", ".low", ".high")]
        table = arms_measures.domains(compared)
        for row, cells in zip(rows, table.rows, strict=False):  # then the baselines
            for name, cell in zip(names, cells[1:], strict=True):
                assert float(row[name]) == pytest.approx(cell.value)
                shown = [f"{float(row[f'{name}.{end}']):.4f}" for end in ("low", "high")]
                assert cell.bounds == f"[{', '.join(shown)}]"


ODD = Table(  # names that LaTeX would take for options of the line before, or for a paragraph
    "[a]",
    ("[b]", "c"),
    ((Cell("[2pt]"), Cell("1")), (Cell("*"), Cell("2")), (Cell("a\n\nb\x00"), Cell("[3]"))),
)


def test_latex_rows_begin_with_no_option_and_stay_on_their_line():
    text = latex.table(ODD, ["d\n\ne"], "f")
    body = text[text.index("\\toprule") : text.index("\\bottomrule")].splitlines()
    assert body == [
        "\\toprule",
        "{}[b] & c \\\\",
        "\\midrule",
        "{}[2pt] & 1 \\\\",
        "{}* & 2 \\\\",
        "a b & [3] \\\\",
    ]
    assert "\\caption{[a]. d e}" in text


def test_names_are_escaped_wherever_markdown_has_them(swept, tmp_path):
    mark = "<script>x</script>\n\n# y"
    loaded = report.load_all([swept])[0]
    named = [dataclasses.replace(r, label=r.label.replace("plain", mark)) for r in loaded]
    found = arms.compare(arms.group(named), mark)
    text = arms_page.render(found, ".md", [f"{mark} is not finished"], "r")
    assert "difference to &lt;script>x&lt;/script> # y over paired seeds" in text
    assert "<script>" not in text and "\n# y" not in text
    bound = dict(name=mark, bound=mark)
    runs = [dataclasses.replace(r, card=r.card | bound) for r in loaded[:2]]
    text = compare.render_markdown(
        [dataclasses.replace(r, directory=Path(f"<b>{i}")) for i, r in enumerate(runs)]
    )
    assert "<script>" not in text and "<b>" not in text and "\n# y" not in text


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_without_a_minus_sign_gets_the_whole_table(compared, encoding):
    written = io.BytesIO()
    with io.TextIOWrapper(written, encoding=encoding) as out:
        tables.print_table(arms_tables.main_table(compared), file=out, width=300)
        out.flush()
        text = written.getvalue().decode(encoding)
    shown = fmt.fixed(compared.differences["better"].mean, 4)
    assert shown.startswith("\N{MINUS SIGN}") and shown.replace("\N{MINUS SIGN}", "-") in text
    assert "worse" in text and "?" not in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_latex_compiles(swept, tmp_path):
    table = report.write([swept], tmp_path / "t.tex").read_text() + latex.table(ODD, [], "odd")
    head = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n"
    (tmp_path / "d.tex").write_text(head + table + "\\end{document}\n")
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "d.tex"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


class TestCitations:
    def test_what_was_used_is_cited(self):
        config = {
            "moe": {"num_experts": 8},
            "router": {"kind": "expert_choice"},
            "balance": {
                "switch_loss": {"coefficient": 0.0},
                "adaptive_loss": {"coefficient": 0.0, "rate": 0.05},
                "loss_free_bias": {"rate": 0.01},
            },
            "quantization": {"recipe": "nvfp4_training"},
        }
        assert citations.methods(config) == {
            "router expert_choice": ["2202.09368"],
            "balance loss_free_bias": ["2408.15664"],
            "recipe nvfp4_training": ["2509.25149"],
        }
        text = citations.bibtex([config, config])
        assert text.count("@misc") == 3 and "Expert Choice Routing" in text
        assert "% router expert_choice\n@misc{arXiv:2202.09368," in text
        assert text.count("{") == text.count("}")
        assert citations.methods({"moe": {"num_experts": 0}, "router": {"kind": "top_k"}}) == {}

    def test_a_method_without_a_paper_is_named(self):
        config = {"moe": {"num_experts": 8}, "router": {"kind": "oracle"}}
        assert "% no paper is named for: router oracle" in citations.bibtex([config])

    def test_low_precision_and_tasks_are_cited(self):
        config = {
            "quantization": {"recipe": "nvfp4_qat", "teacher": "runs/t", "reset_every": 200},
            "evaluation": {"tasks": ["recall", "facts"]},
        }
        assert citations.methods(config) == {
            "recipe nvfp4_qat": ["1308.3432"],
            "distillation": ["1503.02531", "2601.20088"],
            "resets of oscillating weights": ["2510.27527"],
            "task recall": ["2312.04927"],
        }
        # `format` is of the recipes w4* alone.
        format = {"recipe": "w4a4", "format": "nvfp4_46"}
        assert citations.methods({"quantization": format})["Four Over Six"] == ["2512.02010"]
        assert "Four Over Six" not in citations.methods(
            {"quantization": format | {"recipe": "none"}}
        )

    def test_dirt_filters_and_shared_experts_are_cited(self):
        config = {
            "moe": {"num_experts": 8, "num_shared_experts": 1},
            "router": {"kind": "top_k"},
            "data": {
                "inject": ["token_noise share=0.5", "duplicate share=0.1 copies=16"],
                "filter": ["gopher_quality", "exact"],
            },
        }
        found = citations.methods(config)
        assert found.pop("router top_k")
        assert found == {
            "shared experts": ["2401.06066"],
            "dirt duplicate": ["2205.10487"],
            "filter gopher_quality": ["2112.11446"],
        }
        assert r"Analysis \& Insights" in citations.bibtex([config])

    @pytest.mark.parametrize("name", ["fine_grained", "coarse", "top_k", "switch"])
    def test_fine_grained_experts_are_cited_where_a_config_has_them(self, name):
        config = configs.load(f"experiments/routing/{name}.py").config
        found = citations.methods(configs.record(config)["config"])
        assert found.get("fine-grained experts") == (
            ["2401.06066"] if name == "fine_grained" else None
        )

    def test_a_paper_without_an_entry_says_so(self, monkeypatch):
        monkeypatch.delitem(papers.PAPERS, "2202.09368")
        config = {"moe": {"num_experts": 8}, "router": {"kind": "expert_choice"}}
        text = citations.bibtex([config])
        assert "  note = {title and authors not verified},\n" in text and "title =" not in text

    def test_every_paper_that_is_named_has_its_title(self):
        package = Path(moelab.__file__).parent
        paths = [package / "soft_moe.py", package / "upcycle.py"]
        for folder in ("routers", "balance", "quant", "tasks", "data/quality"):
            paths += (package / folder).rglob("*.py")
        # Also ids in comments, as in recipes.py, and those that citations.py names itself.
        paths.append(package / "report/citations.py")
        ids = re.compile(
            r"\b(?:\d{4}\.\d{5}|1[0-4]\d\d\.\d{4})\b"
        )  # the short ones are from before 2015
        named = {i for path in paths for i in ids.findall(path.read_text())}
        assert len(named) > 45
        assert named == papers.PAPERS.keys()

    def test_entries_are_bibtex(self):
        for paper, (authors, title) in papers.PAPERS.items():
            people = authors.removesuffix(" and others").split(" and ")
            assert all(re.fullmatch(r"[^,{}]+, [^,{}]+|\{[\w-]+\}", p) for p in people), paper
            assert title == " ".join(title.split()) and not set(title) & set("{}%$#_"), paper


def test_a_terminal_without_a_minus_sign(swept):
    words = [sys.executable, "-m", "moelab", "report", str(swept)]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(words, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"-0.0" in done.stdout and b"Known limits" in done.stderr


def test_the_command_line(swept, tmp_path, capsys):
    assert main(["report", str(swept)]) == 0
    out, err = capsys.readouterr()
    assert "better" in out and "Every point" in out and "Known limits" in err
    assert "Bits per byte by domain" in out
    assert main(["report", str(swept), "--json", "--reference=worse"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["arm"] for row in rows} == set(ARMS)
    assert main(["report", str(swept), f"--out={tmp_path}/x.tex", "--bibtex"]) == 0
    bib = tmp_path / "x.bib"
    assert bib.read_text().startswith(f"{citations.HEAD}\n% router top_k")
    assert (
        main(["report", str(swept), f"--out={tmp_path}/x.tex", "--bibtex"]) == 0
    )  # its own is replaced
    bib.write_text("@book{mine}")
    capsys.readouterr()
    assert main(["report", str(swept), f"--out={tmp_path}/x.tex", "--bibtex"]) == 2
    assert "moelab did not write it" in capsys.readouterr().err and bib.read_text() == "@book{mine}"
    assert main(["report", str(swept), "--bibtex", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bibtex"].startswith(citations.HEAD)
    for option in ("--fit=isoflop", "--precision=q", "--split=validation", "--different_tokens"):
        assert main(["report", str(swept), "--bibtex", option]) == 2
    assert main(["report", str(swept), "--fit=isoflop", f"--out={tmp_path}/x.csv"]) == 2
    capsys.readouterr()
    for out, message in (
        ("", "is a folder"),
        ("/x.bib/y.html", "is no folder"),
        (f"/{'y' * 260}.md", "File name too long"),
    ):
        (tmp_path / "folder.html").mkdir(exist_ok=True)
        target = f"{tmp_path}{out}" if out else f"{tmp_path}/folder.html"
        assert main(["report", str(swept), f"--out={target}"]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob(".*.tmp"))
    for out in (".", "x", "x.pdf"):
        assert main(["report", str(swept), f"--out={out}", "--bibtex"]) == 2
        assert "a report ends in .html, .md, .csv, .tex; got" in capsys.readouterr().err
    run = str(next(swept.glob("*/result.json")).parent)
    for option in ("--precision=q", "--split=validation", "--reference=x"):
        assert main(["report", run, option]) == 2
        assert f"{option.partition('=')[0]}" in capsys.readouterr().err
    assert main(["report", str(swept), "--precision=q"]) == 2
