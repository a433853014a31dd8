"""The command line: what it prints where, its exit codes, and what it says to a typo."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import moelab
from moelab import __main__ as console_script
from moelab import cli, config, config_file, environment
from moelab.cli import arguments, output

ROOT = Path(moelab.__file__).parent.parent
EXPERIMENTS = sorted(path for path in (ROOT / "experiments").rglob("*.py"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Works in an empty folder, and leaves this process's JAX as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "prepare", lambda: None)


@pytest.fixture
def moelab_main(capsys):
    """Runs the command line in this process; returns its exit code and what it printed."""

    def call(*argv):
        code = cli.main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err, line=err.strip())

    return call


def in_a_process(*argv, code=None, folder=ROOT, **variables):
    """Runs `python -m moelab`, or a piece of code."""
    words = ["-c", code] if code else ["-m", "moelab", *argv]
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", **variables},
    )


def fastest(call, limit=1):
    """Calls until it takes less processor time than the limit, at most three times: a busy machine has slow caches."""
    for _ in range(3):
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = call()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = used.ru_utime + used.ru_stime - start.ru_utime - start.ru_stime
        if seconds < limit:
            break
    return seconds, result


class TestHelp:
    def test_answers_fast_and_without_jax(self):
        code = (
            "import sys, moelab.cli\n"
            "assert moelab.cli.main(['--help']) == 0\n"
            "slow = {'jax', 'jaxlib', 'flax', 'numpy', 'ml_collections', 'rich'} & set(sys.modules)\n"
            "assert not slow, slow"
        )
        seconds, done = fastest(lambda: in_a_process(code=code))
        assert done.returncode == 0, done.stderr
        assert "moelab run --config=demo" in done.stdout
        assert seconds < 1

    @pytest.mark.parametrize("command", ["", "run", "eval", "generate", "report", "verify", "env"])
    def test_of_every_command(self, moelab_main, command):
        done = moelab_main(*command.split(), "--help")
        assert done.code == 0 and done.err == ""
        assert done.out.startswith(f"usage: moelab {command}".strip())

    @pytest.mark.parametrize("group", ["config", "data", "routes"])
    def test_of_a_group_is_printed_for_its_name_alone(self, moelab_main, group):
        assert moelab_main(group, "--help").out == moelab_main(group).out

    def test_of_nothing_is_the_help(self, moelab_main):
        assert moelab_main().out == moelab_main("--help").out

    def test_version(self, moelab_main):
        done = moelab_main("--version")
        assert (done.code, done.out) == (0, f"moelab {moelab.__version__}\n")
        assert f'version = "{moelab.__version__}"' in (ROOT / "pyproject.toml").read_text()

    def test_console_script_and_module_are_the_same(self):
        assert 'moelab = "moelab.__main__:console"' in (ROOT / "pyproject.toml").read_text()
        assert in_a_process("--version").stdout == f"moelab {moelab.__version__}\n"

    @pytest.mark.skipif(sys.platform != "linux", reason="glibc's huge pages")
    @pytest.mark.parametrize(
        "words, tuned, started",
        [
            ("run", None, 1),
            ("verify", None, 1),
            ("config list", None, 0),
            ("run", "x", 0),
            ("run", "", 0),
        ],
    )
    def test_what_trains_starts_again_with_huge_pages_once(
        self, monkeypatch, words, tuned, started
    ):
        replaced = []
        monkeypatch.setenv("GLIBC_TUNABLES", tuned or "")
        monkeypatch.setattr(sys, "gettrace", lambda: None)
        if tuned is None:
            monkeypatch.delenv("GLIBC_TUNABLES")
        monkeypatch.setattr(sys, "argv", ["moelab", *words.split()])
        monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "utf8", "-m", "moelab", "run"])
        monkeypatch.setattr(console_script, "main", lambda: 0)
        monkeypatch.setattr(os, "execv", lambda *call: replaced.append((*call, dict(os.environ))))
        assert console_script.console() == 0
        assert len(replaced) == started
        for program, command, environ in replaced:
            assert (program, command) == (
                sys.executable,
                [sys.executable, "-X", "utf8", "-m", "moelab", "run"],
            )
            assert environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"


class TestLightImports:
    def test_jax_comes_only_with_what_needs_it(self):
        code = (
            "import sys, moelab, moelab.cli, moelab.config, moelab.schema, moelab.environment, moelab.launch\n"
            "import moelab.cli.running, moelab.cli.results, moelab.cli.inspecting, moelab.cli.data\n"
            "import moelab.cli.routes, moelab.trace, moelab.diagnostics, moelab.placement\n"
            "assert 'run' in dir(moelab) and callable(moelab.load_config)\n"
            "assert moelab.cli.main(['config', 'list']) == 0\n"
            "assert 'jax' not in sys.modules"
        )
        done = in_a_process(code=code)
        assert done.returncode == 0, done.stderr

    def test_unknown_names_are_attribute_errors(self):
        with pytest.raises(AttributeError, match="no attribute 'rnu'"):
            moelab.rnu  # noqa: B018
        assert moelab.routing.Routing is moelab.Routing


class TestTypos:
    """Exit code 2, one line on standard error, the word that was meant, nothing on standard output."""

    @pytest.mark.parametrize(
        ("words", "meant"),
        [
            ("rnu --config=demo", "did you mean moelab run?"),
            ("frobnicate", "there are run, eval, generate"),
            ("config shwo", "did you mean moelab config show?"),
            ("data biuld", "did you mean moelab data build?"),
            ("routes recrod x", "did you mean moelab routes record?"),
            ("routes record", "the following arguments are required: RUN"),
            ("routes record nowhere", "nowhere is no run directory"),
            ("routes replay nowhere x.npz", "x.npz: there is no such file"),
            ("routes place x.npz", "'moelab routes place' wants --devices=N"),
            ("routes place x.npz --devices=0", "--devices: wants an int from 1, got '0'"),
            ("routes place x.npz --devcies=2", "did you mean --devices?"),
            ("run --cofig=demo", "did you mean --config?"),
            ("run --cofig demo", "did you mean --config?"),
            ("run -config=demo", "did you mean --config?"),
            ("run --conf=demo", "'moelab run' has no option --conf"),
            ("run --cofig.model.width=3", "did you mean --config.model.width?"),
            ("run --config=demo --worxdir=x", "did you mean --workdir?"),
            ("run --config=demo --dryrun", "did you mean --dry_run?"),
            ("run --config=demo --resume=mist", "did you mean --resume=must?"),
            ("run --config=demo --seed=x", "--seed: wants an int from 0, got 'x'"),
            ("run --config=demo extra", "'extra' is one word too many for 'moelab run'"),
            ("run", "'moelab run' wants --config=FILE"),
            ("run --config=dmeo", "dmeo: no such config; did you mean demo?"),
            ("run --config=demo:smok", "did you mean"),
            ("run --config=demo --config.router.kind=topk", "--config.router.kind=top_k?"),
            ("run --config=demo --config.model.num_layer=2", "--config.model.num_layers?"),
            ("run --config=demo --config.model.num_layer 2", "--config.model.num_layers?"),
            ("run --config=demo --config.modle.width=2", "--config.model.width?"),
            ("run --config=demo --config.model.width=2.5", "wants int, got '2.5'"),
            ("run --config=demo --config.model.width", "wants int, got no value"),
            ("config show --config=experiments/dem.py", "did you mean"),
            ("config diff demo dmeo", "did you mean demo?"),
            ("config diff demo", "the following arguments are required: B"),
            ("env --config.model.width=3", "'moelab env' takes no config overrides"),
            ("env --jsn", "did you mean --json?"),
            ("verify x --seed=1", "are for --rerun=NAME"),
            ("verify", "'moelab verify' wants RUN, or --rerun=NAME"),
            ("verify nowhere", "no such run: nowhere"),
            ("report nowhere", "no such run: nowhere"),
            ("generate", "'moelab generate' wants --workdir=RUN"),
            ("generate --workdir=nowhere", "nowhere is no run directory"),
            ("generate --top_p=3", "--top_p: wants a number above 0 and at most 1, got '3'"),
            ("generate --max_tokens=0", "--max_tokens: wants an int from 1, got '0'"),
            ("generate --temperature=-1", "--temperature: wants a number from 0, got '-1'"),
            ("eval --step=last", "--step: wants 'latest' or a step's number, got 'last'"),
            ("eval --split=tset", "did you mean --split=test?"),
        ],
    )
    def test_are_named(self, moelab_main, words, meant):
        done = moelab_main(*words.split())
        assert (done.code, done.out, done.line.count("\n")) == (2, "", 0)
        assert done.line.startswith("moelab: ") and meant in done.line

    @pytest.mark.slow
    @pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
    def test_of_every_leaf_of_every_experiment(self, moelab_main, path):
        """Bar 6: each leaf of each config misspelt, by a dropped, a swapped and a doubled letter."""
        done, seen = 0, []
        for preset in ("", *config_file.outline(path)[1]):
            source = f"{path}:{preset}" if preset else str(path)
            known = config.table(config.load(source).config)
            if set(known) in seen:
                continue  # a preset of the same kinds has the same fields, and one file the same answers
            seen.append(set(known))
            for name in known:
                for typo in misspelt(name, done):
                    if typo in known:
                        continue  # another field's name, and rightly accepted
                    got = moelab_main("run", f"--config={source}", f"--config.{typo}=1")
                    assert (got.code, got.out, got.line.count("\n")) == (2, "", 0), typo
                    meant = got.line.partition("did you mean ")[2].rstrip("?").split(" or ")
                    assert f"--config.{name}" in meant, (typo, got.line)
                done += 1
        assert done >= 50

    def test_in_a_real_process(self, tmp_path):
        done = in_a_process("run", "--config=demo", "--config.router.kk=3", folder=tmp_path)
        assert done.returncode == 2 and done.stdout == ""
        line = "moelab: --config.router.kk: no such field; did you mean --config.router.k?\n"
        assert done.stderr == line


def misspelt(path, n):
    """The leaf with its n-th letter (going round) dropped, swapped with the next, and doubled."""
    section, dot, leaf = path.rpartition(".")
    i = n % len(leaf)
    j = n % max(1, len(leaf) - 1)
    typos = [leaf[:i] + leaf[i + 1 :], leaf[:i] + leaf[i] + leaf[i:]]
    if leaf[j : j + 1] != leaf[j + 1 : j + 2]:
        typos.append(leaf[:j] + leaf[j + 1 : j + 2] + leaf[j] + leaf[j + 2 :])
    return [section + dot + typo for typo in typos if typo != leaf and section + dot + typo]


class TestOverrides:
    def test_are_taken_out_in_both_spellings(self):
        words = "run --config.a.b=1 --config=x --config.c.d 2 --config.e --json --config.f -3"
        assert arguments.split_overrides(words.split()) == (
            ["run", "--config=x", "--json"],
            ["--config.a.b=1", "--config.c.d=2", "--config.e", "--config.f=-3"],
        )

    def test_reach_the_config(self, moelab_main):
        words = "config show --json --config=demo --config.model.width 128 --config.model.remat"
        shown = json.loads(moelab_main(*words.split()).out)
        assert shown["config"]["model"]["width"] == 128
        assert shown["config"]["model"]["remat"] is True
        assert shown["overrides"] == ["--config.model.width=128", "--config.model.remat"]

    def test_that_drop_fields_say_so_on_standard_error(self, moelab_main):
        words = (
            "config",
            "show",
            "--json",
            "--config=demo",
            "--config.schedule.kind=warmup_cosine",
        )
        done = moelab_main(*words)
        assert "schedule.decay_share=0.4 dropped" in done.err
        assert json.loads(done.out)["config"]["schedule"]["kind"] == "warmup_cosine"


class TestProblems:
    def test_are_all_listed_before_any_work(self, moelab_main, tmp_path):
        words = "run --config=demo --config.router.k=99 --config.model.head_dim=3"
        done = moelab_main(*words.split())
        lines = done.err.splitlines()
        assert (done.code, done.out, len(lines)) == (2, "", 2)
        assert lines[0].startswith("moelab: model.head_dim must be even")
        assert lines[1].startswith("moelab: router.k must be at most moe.num_experts=16")
        assert list(tmp_path.iterdir()) == []


class TestConfigCommands:
    def test_show_marks_what_is_not_the_default(self, moelab_main):
        lines = moelab_main("config", "show", "--config=demo", "--config.seed=5").out.splitlines()
        assert "* seed" in [line[:6] for line in lines]
        assert any(line.split() == ["logging.tensorboard", "false"] for line in lines)
        assert any("sha256" in line for line in lines)

    def test_diff(self, moelab_main):
        done = moelab_main("config", "diff", "--json", "olmoe_shaped", "olmoe_shaped:e64")
        assert json.loads(done.out) == [
            {"field": "moe.num_experts", "a": 16, "b": 64},
            {"field": "router.k", "a": 2, "b": 8},
        ]
        done = moelab_main("config", "diff", "demo", "demo")
        assert (done.code, done.out, done.line) == (0, "", "no differences")

    def test_list(self, moelab_main):
        listed = {
            row["name"]: row for row in json.loads(moelab_main("config", "list", "--json").out)
        }
        assert {"demo", "tiny", "olmoe_shaped"} <= set(listed)
        assert listed["olmoe_shaped"]["presets"] == ["e64", "dense_e16", "dense_e64"]
        assert listed["families/smoke"]["sweeps"] == ["arms"] and listed["demo"]["sweeps"] == []
        assert all(row["doc"].endswith(".") for row in listed.values())

    def test_fields_of_one_config(self, moelab_main):
        done = moelab_main("config", "fields", "--json", "--config=demo", "--config.router.k=5")
        rows = {row["path"]: row for row in json.loads(done.out)}
        assert rows["router.k"] == {
            "path": "router.k",
            "type": "int",
            "default": 2,
            "doc": "experts per token",
            "kind": "top_k",
            "value": 5,
        }
        assert "optimizer.b1" in rows and "optimizer.beta" not in rows

    def test_fields_of_all_kinds(self, moelab_main):
        lines = moelab_main("config", "fields").out.splitlines()
        words = [line.split()[:3] for line in lines]
        assert ["optimizer.beta", "muon", "float"] in words
        assert ["optimizer.b1", "adamw", "float"] in words
        assert sum(line.startswith("router.kind ") for line in lines) == 1


class TestRun:
    @pytest.fixture
    def trained(self, monkeypatch):
        """Replaces training by a note of how it was called."""
        calls = []

        def run(config, workdir, **options):
            calls.append((config, workdir, options))
            return SimpleNamespace(exit_code=75, directory=workdir, card={"name": "x"})

        monkeypatch.setitem(sys.modules, "moelab.train", SimpleNamespace(run=run))
        monkeypatch.setattr(moelab, "train", sys.modules["moelab.train"], raising=False)
        return calls

    def test_passes_everything_on(self, moelab_main, trained):
        words = "run --config=tiny --seed=4 --config.router.k=1 --resume=auto --json"
        done = moelab_main(*words.split())
        assert done.code == 75 and json.loads(done.out) == {"name": "x"}
        ((given, workdir, options),) = trained
        assert (given.seed, given.router.k, given.is_locked) == (4, 1, True)
        assert str(workdir) == f"runs/tiny-{config.sha256(given)[:8]}"
        assert options["overrides"] == ["--config.router.k=1", "--config.seed=4"]
        assert options["config_file"].endswith("experiments/tiny.py")
        assert options["command"] == "moelab " + words
        assert (options["resume"], options["progress"]) == ("auto", False)

    def test_refuses_a_directory_of_another_config(self, moelab_main, trained, tmp_path):
        other = config.load("tiny", ["seed=1"])
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "config.json").write_text(json.dumps(config.record(other.config)))
        done = moelab_main("run", "--config=tiny", "--workdir=x")
        assert done.code == 2 and done.line.endswith("differing: seed (1 there, 0 now)")
        done = moelab_main("run", "--config=tiny", "--workdir=x", "--dry_run")
        assert done.code == 2 and trained == []
        assert moelab_main("run", "--config=tiny", "--workdir=x", "--seed=1").code == 75

    def test_resume_insists(self, moelab_main, trained, tmp_path):
        assert "no run to resume" in moelab_main("run", "--config=tiny", "--resume=must").line
        (tmp_path / "x").mkdir()
        saved = config.record(config.load("tiny").config)
        (tmp_path / "x" / "config.json").write_text(json.dumps(saved))
        done = moelab_main("run", "--config=tiny", "--workdir=x", "--resume=never")
        assert done.code == 2 and "holds this run already" in done.line and trained == []
        assert moelab_main("run", "--config=tiny", "--workdir=x", "--resume=must").code == 75

    def test_is_callable_from_python(self, trained):
        result = moelab.run({"moe": {"num_experts": 4}}, "runs/mine")
        assert str(result.directory) == "runs/mine"
        assert trained[0][0].moe.num_experts == 4
        moelab.run("tiny")
        assert str(trained[1][1]).startswith("runs/tiny-")

    def test_checks_before_it_asks_for_devices(self, trained, monkeypatch):
        import jax

        monkeypatch.setattr(jax, "device_count", None)
        with pytest.raises(moelab.ConfigError, match="router.k must be at most"):
            moelab.run({"router": {"k": 100}}, "runs/mine")
        monkeypatch.setattr(jax, "device_count", lambda: 3)
        with pytest.raises(moelab.ConfigError, match="train.batch_size must be divisible"):
            moelab.run({}, "runs/mine")
        assert trained == []

    @pytest.mark.parametrize(
        ("error", "code", "line"),
        [
            (KeyboardInterrupt(), 130, "moelab: interrupted"),
            (
                RuntimeError("two\nlines"),
                1,
                "moelab: RuntimeError: two lines (--debug shows where)",
            ),
            (moelab.ConfigError("wrong"), 2, "moelab: wrong"),
        ],
    )
    def test_ends_in_one_line_without_a_traceback(
        self, moelab_main, trained, monkeypatch, error, code, line
    ):
        def fail(*_, **__):
            raise error

        monkeypatch.setattr(sys.modules["moelab.train"], "run", fail)
        done = moelab_main("run", "--config=tiny")
        assert (done.code, done.line, done.out) == (code, line, "")
        done = moelab_main("run", "--config=tiny", "--debug")
        assert done.code == code and ("Traceback" in done.err) == (code != 130)

    def test_errors_of_the_data_are_the_users(self, moelab_main, trained, monkeypatch):
        from moelab.data import DataError

        def fail(*_, **__):
            raise DataError("no such folder")

        monkeypatch.setattr(sys.modules["moelab.train"], "run", fail)
        done = moelab_main("run", "--config=tiny")
        assert (done.code, done.line) == (2, "moelab: no such folder")


class TestDryRun:
    def test_prints_size_and_cost_and_starts_no_device(self, tmp_path):
        code = (
            "import sys, moelab.cli\n"
            "code = moelab.cli.main(['run', '--config=demo', '--dry_run', '--json'])\n"
            "assert not sys.modules['jax._src.xla_bridge'].backends_are_initialized()\n"
            "sys.exit(code)"
        )
        seconds, done = fastest(lambda: in_a_process(code=code, folder=tmp_path), limit=5)
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout)
        assert summary["tokens"] == summary["steps"] * 16 * 128
        parameters = summary["parameters"]
        assert parameters["total"] > parameters["active"] > 0
        # 4 layers, 16 experts, SwiGLU of three 256 x 256 matrices
        assert parameters["expert"] == 4 * 16 * 3 * 256 * 256
        assert seconds < 5
        assert list(tmp_path.iterdir()) == []

    def test_prints_for_people(self, moelab_main):
        done = moelab_main("run", "--config=tiny", "--dry_run")
        assert done.code == 0
        assert "active per token" in done.out and "FLOPs per token, training" in done.out


class TestEnvironment:
    def test_is_printed(self, moelab_main):
        found = json.loads(moelab_main("env", "--json").out)
        assert found["cores"] == len(os.sched_getaffinity(0))
        assert found["packages"]["moelab"] == moelab.__version__
        assert found["devices"]["count"] >= 1
        assert found["kernels"]["W4A4 nvfp4"] == "xla_windows"
        assert (
            "not yet run on hardware; mosaic_sm100 needs a GPU" in found["kernels"]["mosaic_sm100"]
        )
        assert "packages.jax " in moelab_main("env").out


class TestTables:
    ROWS = ("a", "long [bold]name[/bold]"), [(1, None), (True, ("x", "y")), (0.5, "")]

    def test_in_a_pipe_are_plain_text(self, capsys):
        output.print_table(*self.ROWS)
        lines = capsys.readouterr().out.splitlines()
        assert lines == ["a     long [bold]name[/bold]", "1     -", "true  x,y", "0.5"]

    def test_at_a_terminal_are_drawn(self, capsys, monkeypatch):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        output.print_table(("a", "b"), [(1, "[bold]x[/bold]")])
        out = capsys.readouterr().out
        assert "─" in out and "[bold]x[/bold]" in out  # cells are text, not markup


class TestOtherCommands:
    def test_eval_prints_a_row_per_precision(self, moelab_main, tmp_path, monkeypatch):
        calls = []

        def evaluate_run(*given, **options):
            calls.append((given, options))
            row = {
                "precision": "bf16",
                "loss": 1.5,
                "bits_per_byte": {"all": 2.25},
                "expert_bytes": 1234,
            }
            return {"rows": [row], "step": 7, "tokens": 10, "documents": 2}

        module = SimpleNamespace(evaluate_run=evaluate_run)
        monkeypatch.setitem(sys.modules, "moelab.evaluate", module)
        monkeypatch.setattr(moelab, "evaluate", module, raising=False)
        (tmp_path / "config.json").write_text("{}")
        done = moelab_main(
            "eval", "--workdir=.", "--step=7", "--precisions=bf16", "--split=validation"
        )
        assert done.code == 0
        assert done.out.splitlines()[1].split() == ["bf16", "2.2500", "1.5000", "1,234"]
        assert calls == [
            ((Path("."),), {"step": 7, "precisions": ("bf16",), "split": "validation"})
        ]
        done = moelab_main("eval", "--workdir=.", "--precisions=bf61")
        assert done.code == 2 and "did you mean --precisions=bf16?" in done.line

    def test_generate_prints_the_text(self, moelab_main, tmp_path, monkeypatch):
        module = SimpleNamespace(
            generate_run=lambda run, prompt, **options: f"{prompt}{options['seed']}"
        )
        monkeypatch.setitem(sys.modules, "moelab.generate", module)
        monkeypatch.setattr(moelab, "generate", module, raising=False)
        (tmp_path / "config.json").write_text("{}")
        words = ("generate", "--workdir=.", "--prompt=Once ", "--seed=3")
        assert moelab_main(*words).out == "Once 3\n"
        assert json.loads(moelab_main(*words, "--json").out) == {
            "prompt": "Once ",
            "text": "Once 3",
        }

    def test_verify_fails_on_problems(self, moelab_main, tmp_path, monkeypatch):
        from moelab.report import verify

        monkeypatch.setattr(verify, "verify", lambda run: ["metrics.jsonl was changed"])
        done = moelab_main("verify", ".")
        assert (done.code, done.out) == (1, "metrics.jsonl was changed\n.: 1 problems\n")
        monkeypatch.setattr(verify, "verify", lambda run: [])
        done = moelab_main("verify", ".", "--json")
        assert (done.code, json.loads(done.out)) == (0, {"run": ".", "problems": []})

    def test_data_build_and_show(self, moelab_main, tmp_path, monkeypatch):
        monkeypatch.setenv("MOELAB_CACHE", str(tmp_path / "cache"))
        for folder in ("a", "b"):
            (tmp_path / "text" / folder).mkdir(parents=True)
            for i in range(30):
                (tmp_path / "text" / folder / f"{i}.txt").write_text(f"Text {i} of {folder}. " * 5)
        words = ["--config=tiny", "--config.data.kind=text", "--config.data.path=text"]
        built = json.loads(moelab_main("data", "build", "--json", *words).out)
        assert sorted(built["domains"]) == ["a", "b"]
        shown = moelab_main("data", "show", *words)
        assert shown.code == 0
        assert built["sha256"] in shown.out and "Text" in shown.out
        done = moelab_main("data", "build", *words, "--config.data.path=nowhere")
        assert done.code == 2 and done.line.count("\n") == 0


class TestSweep:
    FILE = (
        '"""A file."""\nimport ml_collections\n\ndef get_config():\n'
        "    return ml_collections.ConfigDict(dict(tokenizer=dict(kind='byte')))\n\n"
        "def sweep_k():\n    yield {'router.k': 1}\n    yield {'router.k': 2}\n"
    )

    def test_lists_points_and_their_cost_first(self, moelab_main):
        Path("x.py").write_text(self.FILE)
        words = ("sweep", "--config=x.py", "--sweep=k", "--seeds=0-1", "--list")
        done = moelab_main(*words)
        assert done.code == 0
        assert "k=1-seed=0" in done.out and "waiting" in done.out
        assert "4 points: 4 waiting; 4 to run" in done.err and "FLOPs of training" in done.err
        found = json.loads(moelab_main(*words, "--json").out)
        assert len(found["points"]) == 4 and found["points"][0]["flops"] > 0
        assert found["workdir"] == "runs/x-k-seeds"
        assert not Path("runs").exists()  # a list writes nothing

    @pytest.mark.parametrize(
        "words, message",
        [
            (("--sweep=kk",), "no sweep 'kk'; did you mean --sweep=k?"),
            (("--sweep=k", "--seeds=4-1"), "--seeds: wants seeds, each once"),
            (("--sweep=k", "--seeds=1,1"), "--seeds: wants seeds, each once"),
            (("--sweep=k", "--seeds=0-99999999"), "--seeds: wants at most 10000 seeds"),
            (("--sweep=k", "--config.router.kk=1"), "point k=1-"),
            (("--sweep=k", "--slurm_option=a=1"), "--slurm_option is for --slurm"),
            (("--sweep=k", "--slurm", "--slurm_option=a"), "wants NAME=VALUE, got 'a'"),
        ],
    )
    def test_errors_name_what_was_meant(self, moelab_main, words, message):
        Path("x.py").write_text(self.FILE)
        done = moelab_main("sweep", "--config=x.py", *words, "--list")
        assert done.code == 2 and message.rstrip("-") in done.err

    def test_wants_a_config(self, moelab_main):
        assert "wants --config" in moelab_main("sweep", "--sweep=k").err
