"""What is saved comes back bit for bit, and what does not is noticed, reported and stepped over."""

import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moelab import checkpoint


class State(NamedTuple):
    params: dict
    optimizer: Any
    key: jax.Array
    layer_keys: jax.Array
    router: dict
    step: jax.Array


def make_state(seed: int) -> State:
    generator = np.random.default_rng(seed)
    params = {
        "embedding": jnp.asarray(generator.standard_normal((64, 40), dtype=np.float32)),
        "layers": [{"scale": jnp.asarray(generator.standard_normal(5), jnp.bfloat16)}],
        "a.b": jnp.asarray([-0.0, np.nan, np.inf], jnp.float32),  # a dot in a key; odd values
    }
    return State(
        params=params,
        optimizer=optax.adamw(1e-3).init(
            params["layers"]
        ),  # NamedTuples, an empty state, an int32 count
        key=jax.random.key(seed),
        layer_keys=jax.random.split(jax.random.key(seed, impl="rbg"), 3),
        router={"bias": jnp.zeros((0, 4)), "unused": None, "none": ()},
        step=jnp.int32(seed),
    )


def bits(state: Any) -> list[tuple]:
    """Every leaf as (dtype, shape, bytes), independently of the digests under test."""

    def raw(x):
        return np.asarray(jax.random.key_data(x) if "key<" in str(x.dtype) else x)

    return [(str(x.dtype), x.shape, raw(x).tobytes()) for x in jax.tree.leaves(state)]


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_bit(path: pathlib.Path, random_: random.Random) -> None:
    data = bytearray(path.read_bytes())
    position = random_.randrange(8 * len(data))
    print(f"flipping bit {position} of {path.name} ({len(data)} bytes)")
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> pathlib.Path:
    """A directory with the states of seeds 1 and 2 as steps 1 and 2; read only, copy it to damage it."""
    directory = tmp_path_factory.mktemp("two") / "checkpoints"
    with checkpoint.Checkpoints(directory, keep=3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step))
    return directory


@pytest.fixture
def copied(two_steps, tmp_path) -> pathlib.Path:
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


def test_round_trip_is_exact(two_steps):
    state = make_state(2)
    abstract = jax.eval_shape(lambda: state)
    with checkpoint.Checkpoints(two_steps, keep=3) as checkpoints:
        step, restored = checkpoints.restore_latest(abstract)
        older = checkpoints.restore(1, abstract)
    assert step == 2
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)
    assert bits(older) == bits(make_state(1)) != bits(state)
    draw = jax.random.normal(restored.layer_keys[1], (3,))  # a restored key is a key
    np.testing.assert_array_equal(draw, jax.random.normal(state.layer_keys[1], (3,)))


def test_leaves_take_the_kind_of_the_abstract_leaf(tmp_path):
    state = {"host": np.arange(3), "count": 7, "rate": 0.1, "on": True, "scalar": np.float64(2.5)}
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(5, state)
        _, restored = checkpoints.restore_latest(state)
    assert {k: type(v) for k, v in restored.items()} == {k: type(v) for k, v in state.items()}
    assert restored["host"].tolist() == [0, 1, 2]
    assert [restored[k] for k in ("count", "rate", "on", "scalar")] == [7, 0.1, True, 2.5]


def test_sharding_of_the_abstract_leaf_is_honoured(two_steps):
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    abstract = jax.eval_shape(lambda: make_state(2))
    wanted = jax.ShapeDtypeStruct((64, 40), jnp.float32, sharding=sharding)
    abstract.params["embedding"] = wanted
    with checkpoint.Checkpoints(two_steps, keep=3) as checkpoints:
        _, restored = checkpoints.restore_latest(abstract)
    assert restored.params["embedding"].sharding == sharding
    assert not restored.step.committed  # as after a fresh start, where nothing was asked for
    _, restored = checkpoint.load(two_steps, make_state(2))
    assert not restored.step.committed


def test_digest_sees_every_bit_and_every_name():
    state = {"a": jnp.zeros((2, 2)), "b": jnp.ones(3, jnp.int32)}
    digest = checkpoint.state_digest(state)
    assert digest == checkpoint.state_digest(jax.tree.map(np.asarray, state))
    others = [
        state | {"a": -state["a"]},  # minus zero
        state | {"a": jnp.zeros((4, 1))},
        state | {"a": jnp.zeros((2, 2), jnp.int32)},
        {"a": state["a"], "c": state["b"]},
        state | {"b": state["b"].at[2].set(2)},
    ]
    assert digest not in [checkpoint.state_digest(x) for x in others]


def test_saved_buffers_may_be_donated_and_overwritten(tmp_path):
    state = {"x": jnp.arange(300_000.0), "host": np.arange(300_000)}
    wanted = {k: np.array(v) for k, v in state.items()}
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        abstract = jax.eval_shape(lambda: state["x"])
        digest = checkpoints.save(1, state)
        jax.block_until_ready(overwrite(state.pop("x")))
        state["host"][:] = -1
        _, restored = checkpoints.restore_latest({"x": abstract, "host": wanted["host"]})
    np.testing.assert_array_equal(restored["x"], wanted["x"])
    np.testing.assert_array_equal(restored["host"], wanted["host"])
    assert digest == checkpoint.state_digest(wanted)


def test_newest_are_kept_and_the_digest_is_in_the_manifest(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps() == [] and checkpoints.restore_latest({}) is None
        digests = {step: checkpoints.save(step, {"x": np.full(4, step)}) for step in (1, 2, 3)}
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
    with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(1, {"x": np.full(4, 1)})  # as after going back to an older step by hand
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "3"]
    assert checkpoint.read_manifest(tmp_path, 3)["digest"] == digests[3] != digests[2]
    assert checkpoint.verify(tmp_path) == []


def flip_in_data(step, random_):
    flip_bit(largest_file(step / "state"), random_)


def flip_in_manifest(step, random_):
    flip_bit(step / "manifest" / "metadata", random_)


def flip_in_index(step, random_):
    flip_bit(step / "state" / "manifest.ocdbt", random_)


def truncate_data(step, random_):
    path = largest_file(step / "state")
    path.write_bytes(path.read_bytes()[: random_.randrange(path.stat().st_size)])


def empty_the_step(step, random_):
    shutil.rmtree(step)
    step.mkdir()


DAMAGES = {
    "bit in the data": flip_in_data,
    "bit in the manifest": flip_in_manifest,
    "bit in Orbax's index": flip_in_index,
    "data truncated": truncate_data,
    "manifest deleted": lambda step, _: shutil.rmtree(step / "manifest"),
    "arrays deleted": lambda step, _: shutil.rmtree(step / "state"),
    "everything deleted": empty_the_step,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_step_is_skipped_loudly(name, copied, capsys):
    DAMAGES[name](copied / "2", random.Random(0))
    assert [p.split(":")[0] for p in checkpoint.verify(copied)] == ["checkpoint 2"]
    events = []
    abstract = jax.eval_shape(lambda: make_state(1))
    with checkpoint.Checkpoints(
        copied, keep=3, on_event=lambda *e: events.append(e)
    ) as checkpoints:
        step, restored = checkpoints.restore_latest(abstract)
        assert step == 1 and bits(restored) == bits(make_state(1))
        [(event, damaged, detail)] = events
        assert (event, damaged) == ("checkpoint_skipped", 2) and detail["reason"]
        warning = capsys.readouterr().err
        assert "skipped checkpoint 2" in warning and detail["reason"] in warning
        # The evidence stays, and the number is free again.
        assert (copied / detail["moved_to"]).is_dir() and checkpoints.steps() == [1]
        checkpoints.save(2, make_state(2))
        step, restored = checkpoints.restore_latest(abstract)
    assert step == 2 and bits(restored) == bits(make_state(2))
    assert checkpoint.verify(copied) == []


def test_no_flipped_bit_anywhere_changes_a_value(two_steps, tmp_path):
    # Not every file matters to a restore (Orbax keeps some for itself), but none may change what comes back.
    random_ = random.Random(1)
    files = sorted(p.relative_to(two_steps) for p in (two_steps / "2").rglob("*") if p.is_file())
    abstract, wanted = (
        jax.eval_shape(lambda: make_state(1)),
        {n: bits(make_state(n)) for n in (1, 2)},
    )
    for number, file in enumerate(files):
        directory = shutil.copytree(two_steps, tmp_path / str(number))
        flip_bit(directory / file, random_)
        clean = checkpoint.verify(directory) == []
        with checkpoint.Checkpoints(directory, keep=3) as checkpoints:
            step, restored = checkpoints.restore_latest(abstract)
        assert bits(restored) == wanted[step] and (step == 2) == clean, file


def test_damage_that_no_value_depends_on_stops_nothing(copied):
    (copied / "2" / "_CHECKPOINT_METADATA").write_bytes(b"{")
    with checkpoint.Checkpoints(copied, keep=3) as checkpoints:
        assert checkpoints.restore_latest(jax.eval_shape(lambda: make_state(1)))[0] == 2
        checkpoints.save(3, make_state(3))
    assert checkpoint.verify(copied) == []


def test_a_kill_while_old_steps_are_deleted_leaves_no_half_step(tmp_path, monkeypatch):
    # As if killed just before the deletion: what is retired is whole, and out of the way.
    monkeypatch.setattr(checkpoint.Checkpoints, "_clear_retired", lambda self: None)
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"x": np.full(4, step)})
    assert checkpoint.verify(tmp_path) == [] == checkpoint.verify(tmp_path / "retired")
    monkeypatch.undo()
    checkpoint.Checkpoints(tmp_path, keep=1).close()
    assert [p.name for p in tmp_path.iterdir()] == ["2"]


def test_swapped_steps_are_damaged(copied):
    # Both read back perfectly, as the wrong step.
    for old, new in (("1", "x"), ("2", "1"), ("x", "2")):
        (copied / old).rename(copied / new)
    assert len(checkpoint.verify(copied)) == 2


def test_nothing_good_left(copied, capsys):
    for step in ("1", "2"):
        flip_in_data(copied / step, random.Random(int(step)))
    events = []
    with checkpoint.Checkpoints(
        copied, keep=3, on_event=lambda *e: events.append(e)
    ) as checkpoints:
        assert checkpoints.restore_latest(jax.eval_shape(lambda: make_state(1))) is None
        assert [e[:2] for e in events[:2]] == [("checkpoint_skipped", 2), ("checkpoint_skipped", 1)]
        assert events[2] == ("checkpoints_exhausted", 0, {"steps": [1, 2]})
        assert "no good checkpoint" in capsys.readouterr().err
        checkpoints.save(1, make_state(1))
    assert checkpoint.verify(copied) == []


def test_load_steps_over_damage_and_changes_nothing(copied, capsys):
    flip_in_data(copied / "2", random.Random(0))
    half = copied / "3.orbax-checkpoint-tmp"  # of a training that is still going on
    half.mkdir()
    before = sorted(p.name for p in copied.iterdir())
    abstract = jax.eval_shape(lambda: make_state(1))
    step, restored = checkpoint.load(copied, abstract)
    assert step == 1 and bits(restored) == bits(make_state(1))
    assert "skipped checkpoint 2" in capsys.readouterr().err
    with pytest.raises(checkpoint.DamagedError, match="leaf params/embedding: sha256 is"):
        checkpoint.load(copied, abstract, step=2)
    assert sorted(p.name for p in copied.iterdir()) == before
    with pytest.raises(checkpoint.CheckpointError, match="no good checkpoint in .*nowhere"):
        checkpoint.load(copied / "nowhere", abstract)


def test_damaged_twice_keeps_both(copied):
    abstract = jax.eval_shape(lambda: make_state(1))
    with checkpoint.Checkpoints(copied, keep=3) as checkpoints:
        for _ in range(2):
            flip_in_data(copied / "2", random.Random(0))
            assert checkpoints.restore_latest(abstract)[0] == 1
            checkpoints.save(2, make_state(2))
            checkpoints.wait()
    assert sorted(p.name for p in copied.glob("2*")) == ["2", "2.damaged", "2.damaged.1"]


def test_errors_say_what_came_and_what_was_wanted(copied):
    state = make_state(2)
    with checkpoint.Checkpoints(copied, keep=3) as checkpoints:
        wrong = state._replace(step=jnp.float32(0), key=jax.random.key(0, impl="rbg"), router={})
        with pytest.raises(checkpoint.MismatchError) as error:
            checkpoints.restore_latest(wrong)
        for part in (
            "has step as int32[], wanted float32[]",
            "has key as key<fry>[], wanted key<rbg>[]",
            "has router/bias, which is not wanted",
        ):
            assert part in str(error.value)
        assert checkpoints.steps() == [1, 2]  # another config is no damage: nothing is moved
        with pytest.raises(
            checkpoint.CheckpointError, match=r"no step 7 in .*; there are \[1, 2\]"
        ):
            checkpoints.restore(7, state)
        with pytest.raises(checkpoint.CheckpointError, match="step 2 .* already exists"):
            checkpoints.save(2, state)
        with pytest.raises(checkpoint.CheckpointError, match="leaf name is a str"):
            checkpoints.save(3, {"name": "x"})
        with pytest.raises(checkpoint.CheckpointError, match="same path"):
            checkpoints.save(3, {"a": {"b": np.ones(1)}, "a/b": np.ones(1)})
        checkpoints.save(3, state)  # and a refused save does no harm
    assert checkpoint.verify(copied) == []
    with pytest.raises(checkpoint.CheckpointError, match="keep is 0"):
        checkpoint.Checkpoints(copied, keep=0)
    with pytest.raises(checkpoint.CheckpointError, match="cannot keep checkpoints"):
        checkpoint.Checkpoints(largest_file(copied) / "below", keep=1)
    [problem] = checkpoint.verify(copied / "nowhere")
    assert problem.startswith("no checkpoint in")


def test_half_written_steps_are_cleared_away(copied):
    half = copied / "9.orbax-checkpoint-tmp"
    shutil.copytree(copied / "2", half)
    assert checkpoint.verify(copied) == []
    with checkpoint.Checkpoints(copied, keep=3) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        checkpoints.save(3, make_state(3))
    assert not half.exists() and checkpoint.verify(copied) == []


CHILD = """
import itertools, sys
import numpy as np
from moelab import checkpoint

def state(step):
    return {"x": np.random.default_rng(step).standard_normal(500_000), "step": np.int64(step)}

with checkpoint.Checkpoints(sys.argv[1], keep=3) as checkpoints:
    found = checkpoints.restore_latest(state(0))
    start = 0
    if found is not None:
        start, restored = found
        assert np.array_equal(restored["x"], state(start)["x"]) and restored["step"] == start
    print("restored", start, flush=True)
    for step in itertools.count(start + 1):
        checkpoints.save(step, state(step))
        print("saving", step, flush=True)
"""


@pytest.mark.slow
def test_kill_during_asynchronous_saves(tmp_path):
    random_ = random.Random(0)
    half_written, restored = 0, [0]
    for _ in range(10):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        word, start = child.stdout.readline().split()
        assert word == "restored", "the child did not get as far as restoring"
        restored.append(int(start))
        for _ in range(3):
            child.stdout.readline()
        delay = random_.uniform(0, 0.3)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        lines = child.communicate()[0].split()
        assert child.returncode == -signal.SIGKILL
        half_written += any("tmp" in p.name for p in tmp_path.iterdir())
        print(f"restored {start}, killed after {delay:.3f} s more, at {' '.join(lines[-2:])}")
        assert checkpoint.verify(tmp_path) == []
        assert not list(tmp_path.glob("*.damaged*"))
    # Every round went on from where the one before had got to, and the kills hit saves under way.
    assert all(a < b for a, b in zip(restored[1:], restored[2:], strict=False))
    assert half_written > 0


LIMITED = """
import resource, sys
import numpy as np
from moelab import checkpoint

with checkpoint.Checkpoints(sys.argv[1], keep=3) as checkpoints:
    checkpoints.save(1, {"x": np.arange(10)})
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        checkpoints.save(2, {"x": np.random.default_rng(0).standard_normal(1_000_000)})
        checkpoints.wait()
    except checkpoint.CheckpointError as error:
        print("refused:", error)
"""


@pytest.mark.slow
def test_full_disk_is_an_error_and_older_steps_stay(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "refused:" in done.stdout and str(tmp_path) in done.stdout
    assert checkpoint.verify(tmp_path) == []
    with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
        step, restored = checkpoints.restore_latest({"x": np.arange(10)})
    assert step == 1 and restored["x"].tolist() == list(range(10))
