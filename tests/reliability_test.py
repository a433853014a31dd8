"""Runs that are killed, stopped, poisoned or find a damaged checkpoint end where the undisturbed run ends, bit for bit.

Every run is `python -m moelab run` in its own process, pinned to one core: on several, XLA's CPU programs are the same
from run to run as far as was measured, but nothing promises it.
"""

import contextlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import pytest

from moelab import checkpoint, metrics
from moelab.report import card as cards

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
NUM_STEPS = 2000  # about 10 s on a fast machine, 20 s on a slow one
EVERY = 25  # steps between checkpoints
TIMEOUT = 300


class Lab(NamedTuple):
    """Where the runs are, and the text that they train on."""

    folder: pathlib.Path
    text: pathlib.Path

    def command(self, name: str, *overrides: str) -> list[str]:
        fixed = {
            "data.kind": "text",
            "data.path": self.text,
            "train.num_steps": NUM_STEPS,
            "checkpoint.every": EVERY,
            "evaluation.precisions": "('float32','nvfp4_wa')",
        }
        words = [f"--config.{key}={value}" for key, value in fixed.items()]
        words += [f"--config.{override}" for override in overrides]
        run = [sys.executable, "-m", "moelab", "run", "--config=experiments/tiny.py"]
        return [*run, f"--workdir={self.folder / name}", *words]

    def start(self, name: str, *overrides: str, inject_nan: str = "") -> subprocess.Popen:
        environment = dict(os.environ, MOELAB_CACHE=str(self.folder / "cache"))
        environment["MOELAB_INJECT_NAN"] = inject_nan
        log = (self.folder / f"{name}.log").open("ab")
        with log, _one_core():
            return subprocess.Popen(
                self.command(name, *overrides),
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def finish(self, name: str, *overrides: str, inject_nan: str = "", code: int = 0) -> str:
        """Runs to the end, checks the exit code and returns what was printed by all attempts."""
        with _ended(self.start(name, *overrides, inject_nan=inject_nan)) as process:
            process.wait(TIMEOUT)
        log = self.log(name)
        assert process.returncode == code, log
        return log

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def records(self, name: str) -> list[dict]:
        path = self.folder / name / "metrics.jsonl"
        return metrics.read(path) if path.exists() else []


@contextlib.contextmanager
def _one_core():
    """Pins this thread, and so the children that it starts meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def _ended(process: subprocess.Popen):
    """Leaves no process behind, whatever a test runs into."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    folder = tmp_path_factory.mktemp("reliability")
    words = "the a of and moon river stone light bird house road sea wind tree fire night".split()
    random_ = random.Random(0)
    for domain in ("prose", "verse"):
        (folder / "text" / domain).mkdir(parents=True)
        for number in range(40):
            text = " ".join(random_.choice(words) for _ in range(200))
            (folder / "text" / domain / f"{number}.txt").write_text(text)
    return Lab(folder, folder / "text")


@pytest.fixture(scope="module")
def undisturbed(lab) -> dict:
    """The card of the run that nothing happened to."""
    lab.finish("undisturbed")
    return result(lab, "undisturbed")


def result(lab: Lab, name: str) -> dict:
    return cards.read(lab.folder / name)


def trained(lab: Lab, name: str) -> list[tuple]:
    """(step, loss, gradient norm) of every step, in the order of the file."""
    kept = [r for r in lab.records(name) if r["kind"] == "train"]
    return [(r["step"], r["loss"], r["gradient_norm"]) for r in kept]


def events(lab: Lab, name: str, event: str) -> list[dict]:
    return [r for r in lab.records(name) if r.get("event") == event]


def starts(records: list[dict]) -> list[int]:
    return [i for i, r in enumerate(records) if r.get("event") in ("started", "resumed")]


def wait_until_training(
    lab: Lab, name: str, process: subprocess.Popen, starts_before: int, steps: int = 0
) -> None:
    """Waits until the attempt under way has written a training step, and so many more."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        assert process.poll() is None, f"ended early, {process.returncode}: {lab.log(name)}"
        records = lab.records(name)
        found = starts(records)
        written = records[found[-1] + 1 :] if len(found) > starts_before else []
        if sum(r["kind"] == "train" for r in written) > steps:
            return
        time.sleep(0.02)
    raise AssertionError(f"no training step within {TIMEOUT} s: {lab.log(name)}")


def assert_same_end(lab: Lab, name: str, undisturbed: dict) -> None:
    """The state's digest is the same, and so is every step's loss and every evaluated number."""
    card = result(lab, name)
    assert card["checkpoint"] == undisturbed["checkpoint"]
    manifest = checkpoint.read_manifest(lab.folder / name / "checkpoints", NUM_STEPS)
    assert manifest["digest"] == card["checkpoint"]["digest"]
    assert trained(lab, name) == trained(lab, "undisturbed")
    assert [step for step, *_ in trained(lab, name)] == list(range(1, NUM_STEPS + 1))
    assert card["evaluation"]["rows"] == undisturbed["evaluation"]["rows"]


def stop_midway(lab: Lab, name: str, number: int, steps: int = 3 * EVERY) -> int:
    """Starts a run, sends it a signal once it is past `steps` steps and returns its exit code."""
    with _ended(lab.start(name)) as process:
        wait_until_training(lab, name, process, 0)
        while lab.records(name)[-1]["step"] <= steps:
            assert process.poll() is None, lab.log(name)
            time.sleep(0.02)
        process.send_signal(number)
        process.wait(TIMEOUT)
    return process.returncode


def test_killed_at_ten_random_moments(lab, undisturbed):
    random_ = random.Random(2)
    reached = []
    for number in range(10):
        before = len(starts(lab.records("killed")))
        with _ended(lab.start("killed")) as process:
            # Three anywhere from the start of the process on, the others while it trains and saves.
            early = number % 3 == 2
            delay = random_.uniform(0.5, 4) if early else random_.uniform(0, 0.05)
            if not early:
                steps = random_.randrange(3 * EVERY)
                wait_until_training(lab, "killed", process, before, steps)
            time.sleep(delay)
            assert process.poll() is None, lab.log("killed")
            process.send_signal(signal.SIGKILL)
            process.wait(TIMEOUT)
        records = lab.records("killed")
        reached.append(records[-1]["step"] if records else 0)
        phase = "its start" if early else f"{steps} steps"
        print(f"kill {number + 1}: {delay:.3f} s after {phase}, at step {reached[-1]}")
    assert max(reached) < NUM_STEPS, "a run ended before it was killed: make NUM_STEPS larger"
    log = lab.finish("killed")
    assert "skipped checkpoint" not in log  # a kill damages nothing that was saved
    assert len({r["step"] for r in events(lab, "killed", "resumed")}) >= 3
    assert_same_end(lab, "killed", undisturbed)


def test_flipped_bit_in_the_newest_checkpoint(lab, undisturbed):
    assert stop_midway(lab, "flipped", signal.SIGKILL) == -signal.SIGKILL
    folder = lab.folder / "flipped" / "checkpoints"
    *_, previous, newest = sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())
    files = [p for p in (folder / str(newest) / "state").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    position = random.Random(3).randrange(8 * len(data))
    print(f"flipping bit {position} of {len(data)} bytes of step {newest}")
    data[position // 8] ^= 1 << position % 8
    largest.write_bytes(data)

    log = lab.finish("flipped")
    assert f"skipped checkpoint {newest}" in log
    [skipped] = events(lab, "flipped", "checkpoint_skipped")
    assert skipped["detail"]["checkpoint"] == newest and skipped["detail"]["reason"]
    [resumed] = events(lab, "flipped", "resumed")
    assert resumed["step"] == previous
    assert (folder / skipped["detail"]["moved_to"]).is_dir()
    assert_same_end(lab, "flipped", undisturbed)


def test_sigterm_saves_and_the_same_command_goes_on(lab, undisturbed):
    assert stop_midway(lab, "preempted", signal.SIGTERM) == 75
    [preempted] = events(lab, "preempted", "preempted")
    stopped = preempted["step"]
    assert stopped == trained(lab, "preempted")[-1][0]
    assert checkpoint.verify(lab.folder / "preempted" / "checkpoints") == []
    lab.finish("preempted")
    [resumed] = events(lab, "preempted", "resumed")
    assert resumed["step"] == stopped  # no step was lost or repeated
    assert_same_end(lab, "preempted", undisturbed)


def test_poisoned_steps_are_skipped_and_counted(lab):
    short = "train.num_steps=12"
    lab.finish("poisoned", short, inject_nan="3,5")
    lab.finish("clean", short)
    records = [r for r in lab.records("poisoned") if r["kind"] == "train"]
    assert [r["step"] for r in records if r["skipped"]] == [3, 5]
    assert [r["nonfinite_steps"] for r in records] == [0, 0, 1, 1] + [2] * 8
    assert np.isfinite([r["loss"] for r in records if not r["skipped"]]).all()
    card, clean = result(lab, "poisoned"), result(lab, "clean")
    assert card["training"]["nonfinite_steps"] == 2 and clean["training"]["nonfinite_steps"] == 0
    # Up to the first poisoned step nothing differs. A skipped update is no update, and data advances: the loss of step
    # 4 is that of the clean run's fourth batch under the parameters before step 3.
    losses = [(r["loss"], r["gradient_norm"]) for r in records]
    clean_losses = [loss for _, *loss in trained(lab, "clean")]
    assert [list(x) for x in losses[:2]] == clean_losses[:2]
    assert list(losses[3]) != clean_losses[3]
    assert card["checkpoint"]["digest"] != clean["checkpoint"]["digest"]


def test_too_many_poisoned_steps_stop_the_run(lab):
    limit = ("train.max_nonfinite_steps=3", "train.num_steps=20", "checkpoint.every=6")
    log = lab.finish("stopped", *limit, inject_nan="13,14,15", code=3)
    assert "3 non-finite steps in a row" in log
    [stopped] = events(lab, "stopped", "stopped")
    assert stopped["step"] == 15
    folder = lab.folder / "stopped" / "checkpoints"
    assert checkpoint.verify(folder) == []
    newest = max(int(p.name) for p in folder.iterdir() if p.name.isdecimal())
    assert newest >= 12
    arrays = ocp.StandardCheckpointer().restore(folder / str(newest) / "state")
    for name, array in arrays.items():
        if np.issubdtype(array.dtype, np.inexact):
            assert np.isfinite(array).all(), name
    # Whatever poisoned it is gone: the same command goes on from there and finishes.
    lab.finish("stopped", *limit)
    assert events(lab, "stopped", "resumed")[-1]["step"] == newest
    assert result(lab, "stopped")["training"]["steps"] == 20
