"""Sweeps' running: skipped, retried, interrupted, killed; with a stand-in for `moelab run`, once with the real one."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import run_directory

import moelab
from moelab import environment, metrics, sweep, sweep_file
from moelab.cli import main, sweep_display
from moelab.report import card as cards
from moelab.sweep import cluster, local
from moelab.sweep_file import FAILED, FINISHED, INTERRUPTED, SUBMITTED, WAITING, SweepError

ROOT = Path(moelab.__file__).parent.parent

# Stands in for `moelab run`: notes that it ran, waits, and leaves a card; SIGTERM ends it with 75, as a run's would.
RUNNER = """
import json, os, signal, sys, time
from pathlib import Path
template, sha, workdir, ran, behaviour = sys.argv[1:6]
if behaviour[0] != "-":  # else as a run that still compiles: it dies
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
with open(ran, "a") as file:
    print(Path(workdir).name, *sorted(os.sched_getaffinity(0)), file=file)
if behaviour == "fail" and not os.path.exists(ran + ".mended"):
    print("the reason")
    sys.exit(3)
time.sleep(abs(float(behaviour)) if behaviour != "fail" else 0)
card = json.load(open(template))
card["config_sha256"] = sha
os.makedirs(workdir + "/checkpoints", exist_ok=True)
json.dump(card, open(workdir + "/x", "w"))
os.replace(workdir + "/x", workdir + "/result.json")
"""

FILE = '''"""A file."""
import ml_collections

def get_config():
    return ml_collections.ConfigDict(dict(tokenizer=dict(kind="byte")))

def sweep_k():
    for k in (1, 2, 3):
        yield {"router.k": k}
'''


class Fixture:
    """A sweep over three points and what the stand-in does for each."""

    def __init__(self, folder):
        self.folder, self.ran, self.path = folder, folder / "ran.txt", folder / "sweep"
        (folder / "x.py").write_text(FILE)
        (folder / "runner.py").write_text(RUNNER)
        self.template = run_directory.make(folder / "template", steps=3) / cards.NAME
        self.behaviour = {}

    def directory(self, seeds=()):
        points, _ = sweep.plan(str(self.folder / "x.py"), ["k"], seeds=seeds)
        return sweep.Directory(self.path, points, "moelab sweep", "x.py", ["k"])

    def command(self, entry, workdir):
        behaviour = self.behaviour.get(entry.name, "0")
        script, template = self.folder / "runner.py", self.template
        words = (script, template, entry.config_sha256, workdir, self.ran, behaviour)
        return (sys.executable, *map(str, words))

    def run(self, jobs=1, **options):
        directory = self.directory()
        stopped = sweep.run(directory, jobs, command_of=self.command, **options)
        return directory, stopped

    def starts(self):
        lines = self.ran.read_text().splitlines() if self.ran.exists() else []
        return [line.split("-")[0] for line in lines]


@pytest.fixture
def made(tmp_path):
    return Fixture(tmp_path)


def statuses(directory):
    return [entry.status for entry in directory.entries]


def test_runs_all_and_skips_what_is_finished(made):
    notes = []
    directory, stopped = made.run(note=notes.append)
    assert statuses(directory) == [FINISHED] * 3 and not stopped
    assert made.starts() == ["k=1", "k=2", "k=3"]
    assert notes[1].startswith("[1/3] k=1: finished in 0 s, ")
    saved = sweep_file.read(made.path)
    assert [(e.status, e.attempts, e.exit_code) for e in saved.points] == [(FINISHED, 1, 0)] * 3
    log = (made.path / "logs" / f"{saved.points[0].directory}.log").read_text()
    assert log.startswith("$ ") and "runner.py" in log
    made.run()
    assert made.starts() == ["k=1", "k=2", "k=3"]
    # Its card gone, a point is not finished, whatever sweep.json says.
    (made.path / saved.points[1].directory / cards.NAME).unlink()
    made.run()
    assert made.starts() == ["k=1", "k=2", "k=3", "k=2"]


def test_failed_points_are_named_and_retried_on_request(made):
    made.behaviour = {"k=2": "fail"}
    directory, _ = made.run()
    assert statuses(directory) == [FINISHED, FAILED, FINISHED]
    failed = directory.entries[1]
    assert (failed.exit_code, failed.error) == (3, "the reason")
    made.run()
    assert made.starts().count("k=2") == 1
    made.ran.with_name("ran.txt.mended").touch()
    directory, _ = made.run(retry=True, drop_checkpoints=True)
    assert statuses(directory) == [FINISHED] * 3 and directory.entries[1].attempts == 2
    kept = [(directory.run_directory(e) / "checkpoints").exists() for e in directory.entries]
    assert kept == [True, False, True]


class TestCommandLine:
    @pytest.fixture
    def call(self, made, monkeypatch, capsys):
        """Runs `moelab sweep` with the stand-in; returns the exit code and what was printed."""
        monkeypatch.setattr(environment, "prepare", lambda: None)
        monkeypatch.setattr(sweep, "run", functools.partial(sweep.run, command_of=made.command))

        def run(*words):
            source = f"--config={made.folder / 'x.py'}"
            code = main(["sweep", source, "--sweep=k", f"--workdir={made.path}", *words])
            return code, *capsys.readouterr()

        return run

    def test_finished_is_0_and_failed_is_1(self, made, call):
        made.behaviour = {"k=2": "fail"}
        code, out, err = call()
        assert code == 1 and "2 of 3 points finished" in out
        assert "failed: k=2: the reason" in err and "--retry runs them again" in err
        code, _, err = call()
        assert code == 1 and "3 points: 2 finished, 1 failed" in err  # listed, not run
        assert made.starts().count("k=2") == 1
        made.ran.with_name("ran.txt.mended").touch()
        code, out, err = call("--retry")
        assert code == 0 and "3 of 3 points finished" in out and "moelab report" in err

    def test_the_list_knows_what_a_point_took(self, made, call):
        call("--json")
        found = json.loads(call("--list", "--json")[1])["points"]
        assert all(p["status"] == FINISHED and p["expected_seconds"] > 0 for p in found)

    def test_directories_are_called_after_the_file_that_was_named(self, made, monkeypatch, capsys):
        monkeypatch.setattr(environment, "prepare", lambda: None)
        monkeypatch.chdir(made.folder)
        other = """
def sweep_other():
    yield {"name": "first", "config": "x.py"}
"""
        (made.folder / "y.py").write_text(FILE + other)
        command = ["sweep", "--config=y.py", "--sweep=other", "--seeds=0-1", "--list", "--json"]
        assert main(command) == 0
        assert json.loads(capsys.readouterr().out)["workdir"] == "runs/y-other-seeds"

    def test_a_stopped_sweep_is_75(self, made, call, monkeypatch):
        made.behaviour = {"k=1": "30"}

        def tick(self, running):
            if any(seconds > 0.3 for seconds in running.values()):
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(sweep_display.Display, "tick", tick)
        code, out, err = call()
        assert code == 75 and "0 of 3 points finished" in out and "goes on from here" in err


def test_slurm_that_is_not_there(made):
    pytest.importorskip("submitit")
    words = [sys.executable, "-m", "moelab", "sweep", f"--config={made.folder / 'x.py'}"]
    words += ["--sweep=k", f"--workdir={made.path}", "--slurm", "--slurm_option=timeout_min=5"]
    variables = {**os.environ, "PATH": "/nowhere", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=variables, timeout=120)
    assert done.returncode == 2 and "moelab: slurm: " in done.stderr


def test_how_far_a_run_is_shown(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert sweep_display.last_step(path) == "starting"
    path.write_text('{"kind": "event"}\n')
    assert sweep_display.last_step(path) == "compiling"
    path.write_text('{"kind": "train", "step": 7, "loss": 3.14159}\n{"kind": "train", "ste')
    assert sweep_display.last_step(path) == "step 7, loss 3.142"


def test_a_grown_sweep_keeps_what_is_there(made):
    made.run()
    directory = made.directory(seeds=[0, 1])  # seed 0 is the default: the same config, another name
    assert statuses(directory).count(WAITING) == 6
    assert len(directory.others) == 3
    directory.write()
    assert len(sweep_file.read(made.path).points) == 9


def test_jobs_have_their_share_of_the_cores(made):
    cores = sorted(os.sched_getaffinity(0))
    made.run(jobs=2)
    taken = {tuple(map(int, line.split()[1:])) for line in made.ran.read_text().splitlines()}
    assert taken <= set(map(tuple, local.core_shares(2)))
    if len(cores) > 1:
        assert not set(local.core_shares(2)[0]) & set(local.core_shares(2)[1])
    assert local.core_shares(len(cores) + 1) == [cores] * (len(cores) + 1)


def test_two_sweeps_in_one_directory_are_refused(made):
    with made.directory().exclusive(), pytest.raises(SweepError, match="another sweep is running"):
        made.run()


def test_what_another_sweep_finished_meanwhile_is_not_repeated(made):
    waiting = made.directory()
    made.run()
    sweep.run(waiting, command_of=made.command)
    assert statuses(waiting) == [FINISHED] * 3 and len(made.starts()) == 3
    assert [entry.attempts for entry in waiting.entries] == [1, 1, 1]


def test_points_of_a_sweep_that_runs_are_running(made):
    directory = made.directory()
    directory.entries[0].status = "running"  # and its run has not come to its lock yet
    directory.write()
    with made.directory().exclusive():
        assert statuses(made.directory()) == ["running", WAITING, WAITING]
    assert statuses(made.directory()) == [INTERRUPTED, WAITING, WAITING]


def test_directories_of_something_else_are_refused(made):
    made.path.mkdir()
    (made.path / "thesis.txt").touch()
    with pytest.raises(SweepError, match="not empty and holds no sweep"):
        made.run()
    made.path = made.folder / "x.py"
    with pytest.raises(SweepError, match="is a file"):
        made.run()


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "damaged"),
        ('{"schema": 99}', "schema is 99; this moelab reads 1"),
        ('{"schema": 1, "points": [{"name": 1}]}', "damaged"),
    ],
)
def test_a_damaged_record_is_named(made, text, message):
    made.path.mkdir()
    (made.path / sweep_file.NAME).write_text(text)
    with pytest.raises(SweepError, match=message):
        made.directory()


# The sweep as a process of its own, to be killed.
PROCESS = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import sweep_run_test
from pathlib import Path
made = sweep_run_test.Fixture.__new__(sweep_run_test.Fixture)
folder = Path({folder!r})
made.folder, made.ran, made.path = folder, folder / "ran.txt", folder / "sweep"
made.template = folder / "template" / "result.json"
made.behaviour = {behaviour!r}
directory, stopped = made.run()
print(",".join(e.status for e in directory.entries))
sys.exit(75 if stopped else 0)
"""


def begin(made, behaviour):
    """Starts the sweep in a process, and returns it when its second point runs."""
    code = PROCESS.format(
        tests=str(ROOT / "tests"), root=str(ROOT), folder=str(made.folder), behaviour=behaviour
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while "k=2" not in made.starts():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    time.sleep(0.1)  # until its signal handler is set
    return process


@pytest.mark.parametrize(
    "number, sleeps",
    [(signal.SIGTERM, "-30"), (signal.SIGINT, "30"), (signal.SIGKILL, "30")],
)
def test_a_stopped_or_killed_sweep_continues_without_repeating_a_point(made, number, sleeps):
    process = begin(made, {"k=2": sleeps})
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    if number == signal.SIGKILL:
        assert process.returncode == -9
        left = sweep_file.read(made.path).points[1]
        assert left.status == "running"
    else:
        assert process.returncode == 75 and out.strip() == "finished,interrupted,waiting"
    directory, stopped = made.run()
    assert statuses(directory) == [FINISHED] * 3 and not stopped
    assert made.starts() == ["k=1", "k=2", "k=2", "k=3"]  # what was finished did not run again


def test_killed_with_its_parent(made):
    """After kill -9 of the sweep its run must not go on beside the next sweep."""
    process = begin(made, {"k=2": "600"})
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    process.stdout.close()
    end = time.monotonic() + 10
    while any(Path(f"/proc/{child}/cmdline").exists() for child in children):
        assert time.monotonic() < end, "a run outlives its sweep"
        time.sleep(0.05)


def test_a_second_signal_kills(tmp_path):
    """A run that does not heed the first."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    task = local.Task(0, (sys.executable, "-c", code), tmp_path / "log")
    ended = []

    def tick(running):
        if running and running[0] > 0.5:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = local.run(
        [task], 1, started=lambda t: None, ended=lambda t, o: ended.append(o), tick=tick
    )
    assert stopped and ended[0].exit_code == -9 and ended[0].stopped
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as it was


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # submitit's
def test_the_local_cluster(made):
    pytest.importorskip("submitit")
    notes = []
    directory = made.directory()
    ids = sweep.submit(
        directory, 1, cluster_name="local", command_of=made.command, note=notes.append
    )
    assert len(ids) == 3 and notes == [f"submitted 3 jobs: {ids[0]} to {ids[2]}"]
    assert statuses(directory) == [SUBMITTED] * 3
    end = time.monotonic() + 60
    while statuses(directory := made.directory()) != [FINISHED] * 3:
        assert time.monotonic() < end, [e.error for e in directory.entries]
        time.sleep(0.2)
    assert sorted(made.starts()) == ["k=1", "k=2", "k=3"]
    assert sweep.submit(directory, 1, cluster_name="local", command_of=made.command) == []


def test_a_cluster_job_that_fails_is_a_failed_point(made):
    pytest.importorskip("submitit")
    made.behaviour = {"k=2": "fail"}
    sweep.submit(made.directory(), 1, cluster_name="debug", command_of=made.command)
    directory = made.directory()
    assert statuses(directory) == [FINISHED, FAILED, FINISHED]
    assert "ended without a result" in directory.entries[1].error


def test_without_slurm_it_is_said(made, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SweepError, match="slurm: .*srun"):
        sweep.submit(made.directory(), 1, command_of=made.command)
    with pytest.raises(SweepError, match="local: .*no_such"):
        options = {"no_such": 1}
        sweep.submit(made.directory(), 1, cluster_name="local", parameters=options)
    assert made.starts() == []
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(SweepError, match="extra `cluster`"):
        sweep.submit(made.directory(), 1)


@pytest.mark.parametrize(("jobs", "at_a_time"), [(None, 3), (2, 2)])
def test_an_array_has_no_limit_but_that_of_jobs(made, monkeypatch, jobs, at_a_time):
    submitit = pytest.importorskip("submitit")
    asked = {}

    class Executor:
        def __init__(self, folder, cluster):
            asked["cluster"] = cluster

        def update_parameters(self, **parameters):
            asked.update(parameters)

        def submit(self, job):
            return SimpleNamespace(job_id=job.task.key)

        batch = contextlib.nullcontext

    monkeypatch.setattr(submitit, "AutoExecutor", Executor)
    ids = sweep.submit(made.directory(), jobs, command_of=made.command)
    assert ids == ["slurm:0", "slurm:1", "slurm:2"]
    assert (asked["cluster"], asked["slurm_array_parallelism"]) == ("slurm", at_a_time)


NEAR_ITS_END = """
import os, signal, sys, threading, time
from pathlib import Path
from moelab.sweep import cluster, local

log = Path(sys.argv[1])
run = "import signal, sys, time\\ndef save(*_):\\n    print('saved', flush=True)\\n    sys.exit(75)\\n"
run += "signal.signal(signal.SIGTERM, save)\\nprint('up', flush=True)\\ntime.sleep(600)"
job = cluster.Job(local.Task(0, (sys.executable, "-c", run), log))

def slurm_says(*_):  # as submitit's handler: in the main thread, within job()
    again = job.checkpoint()
    assert again.function.task == job.task and "saved" in log.read_text()
    print("asked for another")
    sys.exit(3)

signal.signal(signal.SIGUSR2, slurm_says)

def wait_and_signal():
    while not log.exists() or "up" not in log.read_text():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGUSR2)

threading.Thread(target=wait_and_signal, daemon=True).start()
job()
"""


def test_a_job_near_its_end_stops_the_run_and_asks_for_another(tmp_path):
    pytest.importorskip("submitit")
    words = [sys.executable, "-c", NEAR_ITS_END, str(tmp_path / "log")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout) == (3, "asked for another\n"), done.stderr


def test_a_job_of_an_array_that_fails_says_where_to_look(tmp_path):
    job = cluster.Job(
        local.Task(0, (sys.executable, "-c", "raise SystemExit(7)"), tmp_path / "log")
    )
    with pytest.raises(RuntimeError, match=f"exit code 7; see {tmp_path / 'log'}"):
        job()


@pytest.mark.slow
def test_killed_half_way_and_restarted_with_real_runs(tmp_path):
    """Bar 2: kill -9 of a sweep, and of it again by SIGTERM, then the same command: every point once, card by card."""
    file = tmp_path / "x.py"
    file.write_text(
        textwrap.dedent(f'''
        """A file."""
        import ml_collections
        BASE = {str(ROOT / "experiments" / "tiny.py")!r}

        def get_config():
            return ml_collections.ConfigDict(dict(
                train=dict(num_steps=40), checkpoint=dict(every=1),
                evaluation=dict(precisions=("float32",), tokens_per_domain=256)))

        def sweep_k():
            yield {{"router.k": 1}}
            yield {{"router.k": 2}}
        ''').lstrip()
    )
    target = tmp_path / "sweep"
    words = [sys.executable, "-m", "moelab", "sweep", f"--config={file}", "--sweep=k", "--seeds=0"]
    words += [f"--workdir={target}", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def steps(name):
        path = next(target.glob(f"{name}-*"), tmp_path) / "metrics.jsonl"
        return path.read_text().count('"train"') if path.exists() else 0

    for name, number in (("k=1", signal.SIGKILL), ("k=2", signal.SIGTERM)):
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
        end = time.monotonic() + 240
        while steps(name) < 5:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        process.communicate(timeout=120)
        assert process.returncode == (75 if number == signal.SIGTERM else -9)
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr
    points = json.loads(done.stdout)["points"]
    assert [p["status"] for p in points] == [FINISHED] * 2
    for point in points:
        directory = target / point["directory"]
        card = cards.read(directory)
        assert card["training"]["attempts"] == 2 and point["attempts"] == 2
        journal = metrics.read(directory / "metrics.jsonl")
        train = [r["step"] for r in journal if r["kind"] == "train"]
        assert train == list(range(1, 41))  # each step once
        assert [r["event"] for r in journal if r["kind"] == "event"].count("resumed") == 1
    before = [(target / p["directory"] / "result.json").stat().st_mtime_ns for p in points]
    again = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=100)
    assert again.returncode == 0
    after = [(target / p["directory"] / "result.json").stat().st_mtime_ns for p in points]
    assert after == before
    assert INTERRUPTED not in again.stdout
