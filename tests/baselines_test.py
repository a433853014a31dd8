"""Committed baselines: cards whole and checked, the leaderboard never stale, one arm run again."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import run_directory

import moelab
from moelab import atomic, config_file, rerun, schema, sweep
from moelab import config as configs
from moelab.cli import main
from moelab.report import (
    ReportError,
    arm_file,
    arms,
    baseline_checks,
    baselines,
    leaderboard,
    load_all,
)
from moelab.report import card as cards
from moelab.report.runs import check_comparable

ROOT = Path(moelab.__file__).parent.parent
FOLDER = ROOT / baselines.FOLDER


@pytest.fixture
def folder(tmp_path):
    """A folder of baselines with one family and no cards."""
    found = tmp_path / "baselines"
    found.mkdir()
    values = {"title": "A", "text": "Which?", "config": "x.py", "commands": ["moelab sweep"]}
    tables = [{"reference": "plain"}, {"precision": "nvfp4_wa", "arms": ["plain", "late"]}]
    text = json.dumps({"a": values | {"tables": tables}, "b": values})
    (found / baselines.FAMILIES).write_text(text)
    return found


def make(tmp_path, name, seed, k=2, shift=0.0):
    """A finished run of a config that this moelab reads."""
    config = configs.from_dict({"seed": seed, "router": {"k": k}, "train": {"num_steps": 40}})
    recorded = configs.record(config)
    path = tmp_path / f"{name}-{seed}"
    run_directory.make(
        path,
        seed=seed,
        config=recorded["config"],
        config_sha256=recorded["config_sha256"],
        shift=shift,
        name=name,
    )
    return path


def keep(runs, family, folder):
    """Writes runs as cards, without the leaderboard."""
    for path, text in baselines.texts(runs, family, folder).items():
        atomic.write_text(path, text)


@pytest.fixture
def two_arms(tmp_path, folder):
    """The folder with two arms of three seeds."""
    runs = [make(tmp_path, "plain", s) for s in range(3)]
    runs += [make(tmp_path, "wide", s, 3, 0.02) for s in range(3)]
    keep(load_all(runs)[0], "a", folder)
    return folder


class TestCommitted:
    """What is in experiments/baselines."""

    def test_the_leaderboard_is_not_stale(self):
        assert leaderboard.stale(FOLDER) == [], "run: moelab baselines render"

    @pytest.mark.parametrize("name", baselines.names(FOLDER))
    def test_every_card_verifies(self, name):
        """A new schema of configs outdates cards, which the leaderboard says; only the smallest family must follow."""
        found = baseline_checks.problems(baselines.find(name, FOLDER))
        if not name.startswith("smoke/"):
            found = [problem for problem in found if "configs have schema" not in problem]
        assert found == []

    @pytest.mark.parametrize("name", baselines.families(FOLDER))
    def test_the_commands_of_a_family_are_right(self, name, monkeypatch):
        """Each sweep is planned: its points have no problems, and their number is that of the text."""
        monkeypatch.chdir(ROOT)
        family = baselines.family(name, FOLDER)
        found = set()
        for command in family.commands:
            words = command.split()
            if words[1] != "sweep":
                continue
            options = dict(w.removeprefix("--").split("=") for w in words[2:] if "=" in w)
            points, duplicates = sweep.plan(
                options["config"], options["sweep"].split(","), seeds=[0]
            )
            assert points and not duplicates
            found |= {point.name.removesuffix("-seed=0") for point in points}
        assert Path(family.config).is_file()
        for table in family.tables:
            assert {*table.get("arms", ()), table["reference"]} <= found

    def test_tuning_has_other_seeds_and_another_split_than_reports(self):
        families = baselines.families(FOLDER)
        tuned = [name for name in families if name.endswith("_tuning")]
        assert tuned
        for name, family in families.items():
            sweeps = [command for command in family.commands if "sweep " in command]
            assert all(("--seeds=100-101" in command) == (name in tuned) for command in sweeps)
            splits = {table.get("precision") == arms.VALIDATION for table in family.tables}
            assert splits == {name in tuned}

    def test_dense_controls_are_of_equal_size(self, monkeypatch):
        """Active or total parameters within 3 % of the reference's: routers are not split exactly."""
        from moelab import launch

        monkeypatch.chdir(ROOT)
        points, _ = sweep.plan("families/routing", ["methods"], seeds=[0])
        size = {
            p.name.removesuffix("-seed=0"): launch.summary(p.config)["parameters"] for p in points
        }
        assert size["dense_active"]["active"] == pytest.approx(size["top_k"]["active"], rel=0.03)
        assert size["dense_total"]["total"] == pytest.approx(size["top_k"]["total"], rel=0.03)

    @pytest.mark.slow
    def test_the_smallest_arm_runs_again(self, tmp_path):
        """The same seed lands within the measured drift, a new one within the prediction interval."""
        entries = arm_file.read(baselines.find("smoke/top_k", FOLDER)).entries
        for seed in (min(entries), max(entries) + 1):
            found = rerun.rerun(
                "smoke/top_k", seed=seed, workdir=tmp_path / str(seed), folder=FOLDER
            )
            assert found.passed, found


class TestCards:
    def test_a_card_is_kept_whole_and_its_curve_short(self, tmp_path, folder, two_arms):
        assert baselines.names(folder) == ["a/plain", "a/wide"]
        path = baselines.find("wide", folder)
        assert baseline_checks.problems(path) == []
        entry = arm_file.read(path).entries[1]
        assert entry["card"] == cards.read(tmp_path / "wide-1")
        curve = entry["curve"]
        assert curve["step"][-1] == 40 and len(curve["step"]) == 40
        assert curve["validation"][-1][0] == 40
        assert len(path.read_text().splitlines()) == 5  # a line per run, and two around them

    def test_a_folder_of_cards_is_read_and_other_evaluation_sets_are_refused(self, two_arms):
        cards_of = two_arms / baselines.CARDS / "a"
        runs = load_all([cards_of])[0]
        assert len(runs) == 6 and len({run.documents_sha256 for run in runs}) == 1
        assert len(runs[0].documents_sha256) == 64
        path = baselines.find("wide", two_arms)
        path.write_text(path.read_text().replace(runs[0].documents_sha256, "f" * 64))
        with pytest.raises(ReportError, match="evaluation sets differ"):
            check_comparable(load_all([cards_of])[0])

    def test_long_curves_are_means_over_stretches(self, tmp_path):
        run = load_all([run_directory.make(tmp_path / "r", steps=96)])[0][0]
        curve = baselines.curve(run)
        train = run.records("train")
        assert curve["step"] == list(range(2, 97, 2))
        assert curve["loss"][0] == pytest.approx(
            (train[0]["loss"] + train[1]["loss"]) / 2, rel=1e-4
        )

    def test_a_seed_is_added_and_replaced(self, tmp_path, two_arms):
        again = make(tmp_path / "again", "plain", 1, shift=0.5)
        keep(load_all([make(tmp_path, "plain", 7), again])[0], "a", two_arms)
        entries = arm_file.read(baselines.find("plain", two_arms)).entries
        assert sorted(entries) == [0, 1, 2, 7]
        assert entries[1]["card"] == cards.read(again) != cards.read(tmp_path / "plain-1")

    def test_a_name_is_not_given_to_another_config(self, tmp_path, two_arms):
        runs = load_all([make(tmp_path / "x", "plain", 0, k=1)])[0]
        with pytest.raises(ReportError, match="holds another config under the name 'plain'"):
            keep(runs, "a", two_arms)

    def test_reports_read_them(self, two_arms, tmp_path, capsys):
        files = [str(baselines.find(n, two_arms)) for n in ("plain", "wide")]
        assert main(["report", *files]) == 0
        assert "difference to plain over paired seeds" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda e: e["card"]["training"].update(final_loss=1.0), "card_sha256 does not match"),
            (lambda e: e.update(config_schema=1), "configs have schema"),
            (lambda e: e["card"]["config"]["router"].update(k=1), "config gives"),
            (lambda e: e["card"]["config"]["router"].update(k=1), "differ in more than their seed"),
            (lambda e: e["card"]["config"].update(seed=5), "the seed is 0; the config has 5"),
            (lambda e: e["card"]["seeds"].update(seed=1), "seed 1 comes twice"),
            (
                lambda e: e["card"]["seeds"].update(seed="0"),
                "seeds.seed wants a whole number, not text",
            ),
            (
                lambda e: e["card"]["evaluation"]["rows"][0]["bits_per_byte"].update(all=9.0),
                "lie outside",
            ),
            (lambda e: e["card"].update(schema=99), "a card of schema 99; this moelab reads 1"),
            (lambda e: e["card"].pop("evaluation"), "section 'evaluation' is missing"),
            (
                lambda e: e["card"]["parameters"].update(active="x"),
                "parameters.active wants a number, not text",
            ),
            (
                lambda e: e["curve"]["step"].__setitem__(-1, 99),
                "the curve ends at step 99, the card at 40",
            ),
            (lambda e: e["curve"]["step"].__setitem__(0, 3), "the curve's steps do not rise"),
            (lambda e: e["curve"]["step"].append(99), "curve.loss has 40 values for 41 steps"),
            (
                lambda e: e["curve"]["loss"].__setitem__(0, "low"),
                "curve.loss wants a list of numbers",
            ),
            (
                lambda e: e["curve"].update(validation=[[1]]),
                "curve.validation wants a list of [step,",
            ),
            (lambda e: e.update(curve=[]), "curve wants an object; got list"),
            (lambda e: e.pop("curve"), "curve wants an object; got NoneType"),
            # What no card's digest covers is under the file's.
            (lambda e: e["curve"]["validation"][-1].__setitem__(2, 1.5), ": sha256 does not match"),
            (lambda e: e["curve"]["loss"].__setitem__(0, 1.5), ": sha256 does not match"),
            (lambda e: e.update(documents_sha256="0" * 64), ": sha256 does not match"),
        ],
    )
    def test_tampering_shows(self, two_arms, change, message, capsys):
        path = baselines.find("plain", two_arms)
        value = json.loads(path.read_text())
        change(value["runs"][0])
        path.write_text(json.dumps(value))
        found = baseline_checks.problems(path)
        assert any(message in problem for problem in found), found
        assert main(["verify", str(path)]) == 1
        assert message in capsys.readouterr().out

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda v: v.update(runs=[]), "holds no run"),
            (lambda v: v.update(arm="wide"), "it says that it is a/wide"),
            (lambda v: v.update(family="b"), "it says that it is b/plain"),
            (lambda v: v.pop("arm"), "'arm' wants a text; got None"),
            (lambda v: v.update(schema=1), "schema is 1; this moelab reads 2"),
            (lambda v: v["runs"].append(5), "run 4: wants an object with a card"),
        ],
    )
    def test_a_file_that_is_no_arm_shows(self, two_arms, change, message, capsys):
        path = baselines.find("plain", two_arms)
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))
        assert main(["verify", str(path.parent)]) == 1
        assert message in capsys.readouterr().out
        if "it says" not in message:
            assert main(["report", str(path.parent)]) == 2
            assert message in capsys.readouterr().err

    def test_a_damaged_card_is_not_left_out_of_its_folder(self, two_arms, tmp_path, capsys):
        path = baselines.find("wide", two_arms)
        path.write_text(path.read_text()[:500])
        copied = tmp_path / "copied"
        copied.mkdir()
        for one in path.parent.iterdir():
            (copied / one.name).write_text(one.read_text())
        for folder in (path.parent, path.parent.parent, copied):
            assert main(["report", str(folder)]) == 2
            assert "wide.json: damaged JSON" in capsys.readouterr().err
            assert main(["verify", str(folder)]) == 1
            assert "wide.json: damaged JSON" in capsys.readouterr().out

    def test_what_verify_is_given_is_told_apart(self, two_arms, tmp_path, capsys):
        run = make(tmp_path, "third", 0)
        for path, message in (
            (run / cards.NAME, "the card of a run; verify the run: "),
            (two_arms / baselines.FAMILIES, "holds no cards of an arm"),
        ):
            assert main(["verify", str(path)]) == 1
            assert message in capsys.readouterr().out
        for path in (two_arms, two_arms / baselines.CARDS, two_arms / baselines.CARDS / "a"):
            assert main(["verify", str(path)]) == 0
            assert main(["report", str(path)]) == (2 if path == two_arms else 0)
        capsys.readouterr()
        for one in (two_arms / baselines.CARDS / "a").iterdir():
            one.unlink()
        assert main(["verify", str(two_arms)]) == 1
        assert "there are no cards" in capsys.readouterr().out

    def test_what_is_refused_changes_nothing(self, two_arms, tmp_path, monkeypatch, capsys):
        option = f"--folder={two_arms}"
        main(["baselines", "render", option])

        def state():
            return {path: path.read_bytes() for path in two_arms.rglob("*") if path.is_file()}

        before = state()
        other = make(tmp_path, "other", 0, k=4)
        card = json.loads((other / cards.NAME).read_text())
        card["data"]["tokenizer_sha256"] = "0" * 64
        cards.write(card, other)
        capsys.readouterr()
        assert main(["baselines", "add", str(other), option, "--family=a"]) == 2
        assert "tokenizers differ" in capsys.readouterr().err and state() == before
        # The first of two arms is good.
        good, taken = make(tmp_path, "good", 0, k=4), make(tmp_path / "x", "plain", 0, k=1)
        assert main(["baselines", "add", str(good), str(taken), option, "--family=a"]) == 2
        assert "holds another config" in capsys.readouterr().err and state() == before

    @pytest.mark.parametrize("where", ["cards", "pictures", "leaderboard"])
    def test_a_full_disk_changes_nothing(self, two_arms, tmp_path, monkeypatch, capsys, where):
        pytest.importorskip("matplotlib")
        option, path = f"--folder={two_arms}", two_arms / baselines.FAMILIES
        families = json.loads(path.read_text())
        families["a"]["tables"] = [{"reference": "plain", "picture": "a.png"}]
        path.write_text(json.dumps(families))
        monkeypatch.setattr(leaderboard.crossing, "drawable", lambda compared: True)
        monkeypatch.setattr(
            leaderboard.crossing, "write_png", lambda _, path, digest: path.write_text(digest)
        )
        runs = [str(make(tmp_path, name, 0, k=k)) for name, k in (("third", 4), ("fourth", 5))]
        assert main(["baselines", "render", option]) == 0

        def state():
            return {path: path.read_bytes() for path in two_arms.rglob("*") if path.is_file()}

        before, written = state(), []

        def full(name):
            raise OSError(28, f"No space left on device: {name}")

        def write_text(path, text):
            written.append(path.name)
            if (where, path.name) in (("cards", "fourth.json"), ("leaderboard", "README.md")):
                full(path.name)
            return atomic_write(path, text)

        atomic_write = atomic.write_text
        monkeypatch.setattr(atomic, "write_text", write_text)
        if where == "pictures":
            monkeypatch.setattr(leaderboard.crossing, "write_png", lambda *args: full("a.png"))
        capsys.readouterr()
        assert main(["baselines", "add", *runs, option, "--family=a"]) == 1
        assert "No space left" in capsys.readouterr().err
        assert "third.json" in written and state() == before

    def test_two_arms_of_one_name_are_refused(self, folder, tmp_path):
        runs = load_all([make(tmp_path, name, 0, k=k) for name, k in (("a x", 2), ("a?x", 3))])[0]
        with pytest.raises(ReportError, match="two arms would be .*a_x.json, one of them 'a.x'"):
            baselines.texts(runs, "a", folder)

    def test_nothing_is_added_to_an_arm_that_was_changed(self, two_arms, tmp_path):
        path = baselines.find("plain", two_arms)
        value = json.loads(path.read_text())
        value["runs"][0]["curve"]["loss"][0] = 0.5
        path.write_text(json.dumps(value))
        runs = load_all([make(tmp_path, "plain", 7)])[0]
        with pytest.raises(ReportError, match="was changed after it was written"):
            baselines.texts(runs, "a", two_arms)

    def test_strays_beside_cards_hide_none(self, two_arms, capsys):
        stray = two_arms / baselines.CARDS / "stray.json"
        stray.write_text(baselines.find("plain", two_arms).read_text())
        assert len(arm_file.files(two_arms / baselines.CARDS)) == 3
        bad = baselines.find("wide", two_arms)
        bad.write_text(bad.read_text().replace('"loss":', '"lost":'))
        assert main(["verify", str(two_arms)]) == 1
        assert "wide.json, run 1: curve.loss wants a list" in capsys.readouterr().out
        (two_arms / baselines.CARDS / "a" / "notes.json").write_text("{}")
        assert main(["verify", str(two_arms)]) == 1
        assert "notes.json: schema is None" in capsys.readouterr().out
        assert len(arm_file.files(two_arms / baselines.CARDS / "a")) == 2  # a report needs no notes

    def test_a_run_whose_loss_is_no_number_is_kept(self, folder, tmp_path):
        run = load_all([make(tmp_path, "plain", 0)])[0][0]
        for record in run.journal:
            if record["kind"] == "evaluation":
                record["loss"] = record["bits_per_byte"]["all"] = math.nan
        keep([run], "a", folder)
        path = baselines.find("plain", folder)
        assert baseline_checks.problems(path) == [] and '"NaN"' in path.read_text()
        (read,) = baselines.load(path)
        assert all(math.isnan(r["bits_per_byte"]["all"]) for r in read.records("evaluation"))

    @pytest.mark.parametrize(
        "change, message",
        [
            (
                lambda f: f["tables"][0].update(refrence="wide"),
                "no field 'refrence'; did you mean reference?",
            ),
            (lambda f: f.update(tables=[5]), "table 1 wants an object; got 5"),
            (lambda f: f["tables"][0].update(arms="plain"), "arms wants a list"),
            (lambda f: f.update(commands="moelab sweep"), "commands wants a list"),
            (lambda f: f.pop("text"), "has no text"),
            (lambda f: f.update(titel="A"), "no field 'titel'"),
        ],
    )
    def test_a_family_that_is_wrong_is_refused(self, two_arms, change, message, capsys):
        path = two_arms / baselines.FAMILIES
        values = json.loads(path.read_text())
        change(values["a"])
        path.write_text(json.dumps(values))
        assert main(["baselines", "render", f"--folder={two_arms}"]) == 2
        assert message in capsys.readouterr().err

    def test_a_reference_that_has_not_run_is_told(self, two_arms):
        path = two_arms / baselines.FAMILIES
        values = json.loads(path.read_text())
        values["a"]["tables"] = [{"reference": "late"}]
        path.write_text(json.dumps(values))
        assert "- Not run yet: late. plain stands in as the reference." in leaderboard.render(
            two_arms
        )

    def test_the_command_line(self, two_arms, capsys, tmp_path):
        option = f"--folder={two_arms}"
        assert main(["baselines", "render", option, "--check"]) == 1
        assert main(["baselines", "render", option]) == 0
        assert main(["baselines", "render", option, "--check"]) == 0
        assert main(["baselines", "list", option]) == 0
        assert (
            "a/wide" in (out := capsys.readouterr().out) and "0,1,2" in out and "no run yet" in out
        )
        assert main(["verify", str(two_arms)]) == 0
        assert main(["verify", str(baselines.find("plain", two_arms))]) == 0
        run = str(make(tmp_path, "third", 0, k=4))
        assert main(["baselines", "add", run, option]) == 2
        assert "wants --family=NAME; there are a, b" in capsys.readouterr().err
        assert main(["baselines", "add", run, option, "--family=c"]) == 2
        assert main(["baselines", "add", run, option, "--family=b"]) == 0
        assert "third" in (two_arms / "README.md").read_text()
        assert main(["verify", option, "--rerun=plaim"]) == 2
        assert "no baseline 'plaim'" in capsys.readouterr().err
        assert main(["verify"]) == 2


def test_the_leaderboard_says_what_it_stands_on(two_arms):
    text = leaderboard.render(two_arms)
    assert "Known limits:" in text and "Every point" in text and "No run yet." in text
    assert text.count("Differences are paired by seed") == 1
    assert "Not run yet: late." in text and "Bits per byte in nvfp4_wa" in text


def test_passes_are_of_the_pool_where_there_is_one(tmp_path, folder):
    runs = [make(tmp_path, "plain", s) for s in range(2)]
    keep(load_all(runs)[0], "a", folder)
    assert "Less than an epoch: repetition cannot show" in leaderboard.render(folder)
    for run in runs:
        card = json.loads((run / cards.NAME).read_text())
        card["data"]["mixture"] = {"unique_tokens": 9, "epochs": 4.25}
        cards.write(card, run)
    keep(load_all(runs)[0], "a", folder)
    text = leaderboard.render(folder)
    assert "(4.2 epochs)" in text and "Less than an epoch" not in text


def test_the_leaderboard_says_which_schema_is_outdated(two_arms):
    assert "Of schema" not in leaderboard.render(two_arms)
    for name in ("plain", "wide"):
        path = baselines.find(name, two_arms)
        now = f'"config_schema":{schema.SCHEMA}'
        path.write_text(path.read_text().replace(now, '"config_schema":1'))
    assert "- Of schema 1 of configs; this moelab has" in leaderboard.render(two_arms)


def test_a_table_may_have_a_picture_that_goes_stale_with_its_cards(tmp_path, folder):
    pytest.importorskip("matplotlib")
    path = folder / baselines.FAMILIES
    families = json.loads(path.read_text())
    families["a"]["tables"] = [{"reference": "plain", "picture": "a.png"}]
    path.write_text(json.dumps(families))
    runs = [make(tmp_path, name, s, k) for name, k in (("plain", 2), ("wide", 3)) for s in range(2)]
    for run in runs:
        card = json.loads((run / cards.NAME).read_text())
        card["training"]["flops_per_token"] *= 1 + ("wide" in run.name)
        cards.write(card | {"card_sha256": ""}, run)
    keep(load_all(runs)[0], "a", folder)
    assert leaderboard.stale(folder) == [folder / "README.md", folder / "a.png"]
    assert leaderboard.write(folder) == [folder / "README.md", folder / "a.png"]
    assert leaderboard.stale(folder) == [] and "](a.png)" in (folder / "README.md").read_text()
    third = make(tmp_path, "plain", 2)
    keep(load_all([third])[0], "a", folder)
    assert folder / "a.png" in leaderboard.stale(folder)
    families["a"]["tables"][0]["arms"] = ["plain"]  # one arm: nothing to draw
    path.write_text(json.dumps(families))
    assert leaderboard.pictures(folder) == {} and "a.png" not in leaderboard.render(folder)


class TestJudgement:
    def entries(self, values):
        return {seed: {"card": self.card(seed, value)} for seed, value in enumerate(values)}

    def card(self, seed, value, **environment):
        row = {"precision": "float32", "bits_per_byte": {"all": value}}
        machine = {"cpu": "a", "simd": "avx2", "cores": 2} | environment
        return {
            "seeds": {"seed": seed},
            "evaluation": {"rows": [row]},
            "environment": machine,
            "training": {"tokens": 1000},
        }

    def judge(self, seed, value, drift=(), **environment):
        drift = [{"tokens": 1000, "difference": d} for d in drift]
        entries, card = self.entries([2.0, 2.1, 2.3]), self.card(seed, value, **environment)
        return rerun.judge("f/x", seed, entries, card, "float32", drift)

    def test_the_same_machine_is_bit_exact(self):
        assert self.judge(0, 2.0).passed and not self.judge(0, 2.0001).passed
        assert "bit-exact" in self.judge(0, 2.0, drift=(0.001,)).rule

    def test_another_machine_is_judged_by_the_drift_that_was_measured(self):
        # Two drifts of 0.001: rms 0.001, t(0.975, 2) = 4.302653.
        found = self.judge(0, 2.004, drift=(0.001, -0.001), cores=1)
        assert found.passed and found.expected.high == pytest.approx(2.004303, abs=1e-6)
        assert not self.judge(0, 2.0044, drift=(0.001, -0.001), cores=1).passed
        text = "the drift between machines, measured 2 times in runs of 1,000 tokens"
        assert found.rule == text
        alike = self.judge(0, 2.004, drift=(0.001, -0.001))
        assert alike.passed and alike.rule.startswith(f"{text}; not bit-exact, though")
        assert self.judge(0, 2.0000009, drift=(1e-12,), cores=1).passed  # rounding

    def test_without_a_measured_drift_another_machine_s_run_is_judged_like_a_new_seed(self):
        found = self.judge(0, 2.8, cores=1)
        assert found.passed and found.expected == self.judge(9, 2.8).expected
        assert found.difference == pytest.approx(0.8) and "no drift" in found.rule
        assert not self.judge(0, 2.9, cores=1).passed

    def test_drifts_of_longer_runs_do_not_count(self):
        drift = [{"tokens": 2000, "difference": 1.0}]
        card = self.card(0, 2.5, cores=1)
        assert rerun.judge("f/x", 0, self.entries([2.0]), card, "float32", drift).passed is None

    def test_a_new_seed_is_judged_by_the_prediction_interval(self):
        # Mean 2.13333, sd 0.152753, t(0.975, 2) = 4.302653: half width 0.152753 * 4.302653 * sqrt(4 / 3) = 0.75892.
        found = self.judge(9, 2.8)
        assert found.expected == pytest.approx((2.13333, 1.37441, 2.89225), abs=1e-4)
        assert found.passed and found.difference is None
        assert not self.judge(9, 2.9).passed
        one = rerun.judge("f/x", 9, self.entries([2.0]), self.card(9, 2.0), "float32", [])
        assert one.passed is None and math.isnan(one.expected.low)

    def test_only_another_machine_gives_a_drift(self, folder):
        entries = self.entries([2.0])
        found = rerun.Rerun("f/x", 0, Path(), 2.01, None, "", None, 0.01)
        card = self.card(0, 2.01, simd="avx512f") | {"card_sha256": "0" * 64}
        assert rerun.record(found, entries, card, folder)
        assert not rerun.record(found, entries, self.card(0, 2.01), folder)
        diverged = dataclasses.replace(found, difference=math.nan)
        with pytest.raises(ReportError, match="it diverged, which is no drift"):
            rerun.record(diverged, entries, card, folder)
        (kept,) = rerun.drifts(folder)
        assert (kept["difference"], kept["tokens"]) == (0.01, 1000) and kept["to"][
            "simd"
        ] == "avx512f"

    @pytest.mark.parametrize(
        "text", ["{", "5", '[{"tokens": 9}]', '[{"tokens": 9, "difference": NaN}]']
    )
    def test_a_damaged_record_of_drifts_is_named(self, two_arms, text, monkeypatch):
        (two_arms / baselines.DRIFT).write_text(text)
        monkeypatch.setattr(rerun.launch, "run", None)  # it is read before the training
        with pytest.raises(ReportError, match="drift.json: damaged"):
            rerun.rerun("a/plain", folder=two_arms)

    def test_a_finished_run_is_not_taken_for_a_new_one(self, two_arms, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        card = arm_file.read(baselines.find("a/plain", two_arms)).entries[0]["card"]
        used = []

        def launched(config, directory, **options):
            used.append(directory.name)
            directory.mkdir(parents=True)
            cards.write(card, directory)
            return SimpleNamespace(card=card, exit_code=0)

        monkeypatch.setattr(rerun.launch, "run", launched)
        for _ in range(3):
            rerun.rerun("a/plain", folder=two_arms)
        assert used == ["rerun-a-plain-s0", "rerun-a-plain-s0-2", "rerun-a-plain-s0-3"]
        with pytest.raises(ReportError, match="a run that has ended; .*new --workdir"):
            rerun.rerun("a/plain", folder=two_arms, workdir="runs/rerun-a-plain-s0")

    def test_an_arm_of_a_tuning_is_judged_by_its_card_s_split(self, two_arms, monkeypatch):
        path = two_arms / baselines.FAMILIES
        families = json.loads(path.read_text())
        families["a"]["tables"] = [{"precision": arms.VALIDATION}]
        path.write_text(json.dumps(families))
        card = arm_file.read(baselines.find("a/plain", two_arms)).entries[0]["card"]
        result = SimpleNamespace(card=card, exit_code=0)
        monkeypatch.setattr(rerun.launch, "run", lambda *args, **options: result)
        found = rerun.rerun("a/plain", folder=two_arms)
        assert found.difference == 0 and found.passed

    def test_an_arm_is_judged_in_the_precision_of_a_table_that_shows_it(self, two_arms):
        path = two_arms / baselines.FAMILIES
        families = json.loads(path.read_text())
        families["a"]["tables"] = [
            {"precision": "nvfp4_wa", "arms": ["wide"]},
            {"precision": "mxfp4_wa", "arms": ["plain"]},
        ]
        path.write_text(json.dumps(families))
        assert rerun._precision("a/plain", two_arms) == "mxfp4_wa"
        assert rerun._precision("a/wide", two_arms) == "nvfp4_wa"
        assert rerun._precision("a/other", two_arms) == "float32"

    def test_other_schemas_are_not_run(self, two_arms):
        path = baselines.find("plain", two_arms)
        path.write_text(
            path.read_text().replace(f'"config_schema":{schema.SCHEMA}', '"config_schema":1')
        )
        with pytest.raises(ReportError, match="made under schema 1 of configs"):
            rerun.rerun("plain", folder=two_arms)


def test_the_experiments_name_their_families():
    names = {name for name, _ in config_file.files()}
    for family in baselines.families(FOLDER).values():
        assert str(Path(family.config).relative_to("experiments").with_suffix("")) in names
