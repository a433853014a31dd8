"""Sweeps' points: multiplied, named, checked before anything starts; duplicates said; cost from the configs."""

import json
import textwrap

import jax
import numpy as np
import pytest
import tiny

from moelab import config, config_file, launch, model, sweep
from moelab.errors import UserError
from moelab.sweep import cost
from moelab.sweep_file import SweepError

HEAD = '''"""A file."""
import ml_collections

def get_config(preset=""):
    c = ml_collections.ConfigDict()
    c.tokenizer = dict(kind="byte")
    c.moe = dict(num_experts=4, expert_width=8 if preset else 16)
    c.schedule = dict(warmup_steps=1)
    c.evaluation = dict(precisions=("float32",))
    c.train = dict(num_steps=3, batch_size=2, length=8)
    return c

PRESETS = {"": 0, "narrow": 1}
'''


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes an experiment file with the generators of a test."""
    monkeypatch.chdir(tmp_path)

    def make(body="", name="x.py", head=HEAD):
        (tmp_path / name).write_text(head + textwrap.dedent(body))
        return name

    return make


ROUTERS = """
def sweep_routers():
    yield {"name": "plain", "router.k": 2}
    yield {"router": {"k": 1, "renormalise": False}}

def sweep_seeds():
    for seed in (3, 1):
        yield {"seed": seed}
"""


def test_names_multiply_all_arms_of_a_seed_together(write):
    points, notes = sweep.plan(write(ROUTERS), ["routers", "seeds"])
    assert notes == []
    assert [p.name for p in points] == [
        "plain-seed=1",
        "k=1,renormalise=false-seed=1",
        "plain-seed=3",
        "k=1,renormalise=false-seed=3",
    ]
    assert points[0].overrides == ("--config.router.k=2", "--config.seed=1")
    assert points[1].config.router.renormalise is False and points[1].config.router.k == 1
    # What is run from the command line is exactly the config that was checked.
    for point in points:
        again = config.load(point.source, point.overrides).config
        assert config.sha256(again) == point.sha256
        assert point.directory == f"{point.name}-{point.sha256[:8]}"


def test_seeds_are_a_sweep_without_a_generator(write):
    points, _ = sweep.plan(write(ROUTERS), ["routers"], ["--config.model.width=64"], seeds=[0, 5])
    assert [p.config.seed for p in points] == [0, 0, 5, 5]
    assert {p.config.model.width for p in points} == {64}
    points, _ = sweep.plan(write(), [], seeds=[2])
    assert [p.name for p in points] == ["seed=2"]


def test_points_of_one_config_run_once_and_it_is_said(write):
    body = """
    def sweep_a():
        yield {"name": "a", "router.k": 2}
        yield {"name": "default", "train.num_steps": 3}
        yield {"name": "other", "router.k": 1}
    """
    points, notes = sweep.plan(write(body), ["a"])
    assert [p.name for p in points] == ["a", "other"]
    assert notes == ["default has the config of a: it runs once"]


def test_a_point_may_start_from_a_preset_or_another_file(write, tmp_path):
    write('"""A file."""\n', "other.py", HEAD.replace("num_experts=4", "num_experts=8"))
    body = """
    def sweep_a():
        yield {"config": ":narrow"}
        yield {"config": "other.py", "router.k": 1}
        yield {"config": "other.py:narrow", "name": "both"}
    """
    points, _ = sweep.plan(write(body), ["a"])
    assert [p.source for p in points] == ["x.py:narrow", "other.py", "other.py:narrow"]
    assert [p.config.moe.num_experts for p in points] == [4, 8, 8]
    assert [p.config.moe.expert_width for p in points] == [8, 16, 8]
    assert [p.name for p in points] == [":narrow", "k=1", "both"]
    assert points[0].directory.startswith("_narrow-")


def test_the_base_has_sweeps_too_and_the_file_may_replace_one(write):
    write(ROUTERS)
    head = '"""Y."""\nimport ml_collections\nBASE = "x.py"\n'
    head += "def get_config():\n    return ml_collections.ConfigDict(dict(seed=7))\n"
    write("def sweep_routers():\n    yield {'router.k': 3}\n", "y.py", head)
    _, found = config_file.sweeps("y.py")
    assert found["routers"]() == [{"router.k": 3}] and len(found["seeds"]()) == 2
    points, _ = sweep.plan("y.py", ["routers", "seeds"])
    assert [p.config.router.k for p in points] == [3, 3]


def test_a_base_that_leads_back_is_refused(write):
    for name, base in (
        ("x.py", "y.py"),
        ("y.py", "z.py"),
        ("z.py", "./y.py"),
        ("own.py", "own.py"),
    ):
        write(name=name, head=f"{HEAD}\nBASE = {base!r}\n")
    for read in (config_file.read, config_file.sweeps):
        with pytest.raises(UserError, match="x.py: BASE leads back .*: x.py -> y.py -> z.py -> "):
            read("x.py")
        with pytest.raises(UserError, match="own.py: BASE leads back"):
            read("own.py")
        write(name="five.py", head=f"{HEAD}\nBASE = 5\n")
        with pytest.raises(UserError, match="five.py: BASE wants a file's name, got 5"):
            read("five.py")


def test_a_file_that_exits_is_an_error(write):
    write(name="exits.py", head="import sys\nsys.exit(0)\n")
    with pytest.raises(UserError, match="exits.py:2: SystemExit: 0"):
        config_file.read("exits.py")


@pytest.mark.parametrize(
    "body, names, message",
    [
        (ROUTERS, ["router"], "x.py has no sweep 'router'; did you mean --sweep=routers?"),
        (ROUTERS, ["qqqqqqqq"], "no sweep 'qqqqqqqq'; the file has routers, seeds"),
        ("", ["a"], "no sweep 'a'; the file has no sweeps: write def sweep_NAME"),
        (ROUTERS, [], "wants --sweep=NAME or --seeds=0,1,...; the file has routers, seeds"),
        (ROUTERS, ["seeds", "seeds"], "names 'seeds' twice"),
        (
            "def sweep_a():\n    yield {'router.q': 2}",
            ["a"],
            "point q=2: --config.router.q: no such",
        ),
        ("def sweep_a():\n    yield {'router.k': 2.5}", ["a"], "--config.router.k wants int, got"),
        ("def sweep_a():\n    yield {'router.k': 9}", ["a"], "point k=9: router.k must be at most"),
        ("def sweep_a():\n    yield {'router.k': None}", ["a"], "point 1: router.k has no value"),
        ("def sweep_a():\n    yield {'evaluation.precisions': ('a,b',)}", ["a"], "has a comma"),
        ("def sweep_a():\n    yield {'name': 3}", ["a"], "point 1: name wants a str, got int 3"),
        ("def sweep_a():\n    yield [1]", ["a"], "x.py: sweep_a wants to yield dicts"),
        ("def sweep_a():\n    yield from ()", ["a"], "x.py: sweep_a yields no point"),
        ("def sweep_a():\n    while True: yield {}", ["a"], "yields more than 10000 points"),
        ("def sweep_a():\n    yield 1 / 0", ["a"], "ZeroDivisionError: division by zero"),
        ("def sweep_a():\n    yield {'config': 'nope'}", ["a"], "point nope: nope: no such config"),
    ],
)
def test_what_is_wrong_is_named_before_anything_starts(write, body, names, message):
    source = write(body)
    with pytest.raises(UserError) as caught:
        sweep.plan(source, names)
    assert message in str(caught.value)


def test_every_broken_point_is_listed_once(write):
    body = "def sweep_a():\n    yield {'router.k': 9}\n    yield {'moe.num_expert': 3}\n"
    with pytest.raises(SweepError) as caught:
        sweep.plan(write(body), ["a"], seeds=[0, 1])
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("point k=9-seed=0 and 1 more: router.k must be at most")
    assert "did you mean --config.moe.num_experts?" in lines[1]


def test_two_sweeps_of_one_field_and_an_override_of_it_are_refused(write):
    body = "def sweep_a():\n    yield {'router.k': 1}\ndef sweep_b():\n    yield {'router.k': 2}\n"
    with pytest.raises(SweepError, match="'a' and 'b' both set router.k"):
        sweep.plan(write(body), ["a", "b"])
    with pytest.raises(SweepError, match="--config.router.k is set by the sweep 'a' too"):
        sweep.plan("x.py", ["a"], ["--config.router.k=1"])


def test_a_saved_config_has_no_sweeps_but_takes_seeds(write, tmp_path):
    loaded = config.load(write())
    (tmp_path / "config.json").write_text(json.dumps(config.record(loaded.config, "x.py")))
    points, _ = sweep.plan("config.json", [], seeds=[0, 1])
    assert len(points) == 2
    with pytest.raises(SweepError, match="has no sweep 'a'"):
        sweep.plan("config.json", ["a"])


def test_cost_is_that_of_the_dry_run(write):
    points, _ = sweep.plan(write(ROUTERS), ["routers", "seeds"])
    found = cost.flops(points)
    for point, flops in zip(points, found, strict=True):
        summary = launch.summary(point.config)
        assert flops == summary["flops_per_token"]["train"] * 3 * 2 * 8  # steps, batch, length
    assert found[0] == found[2] > found[1]  # two experts per token cost more than one


def test_arms_of_a_seed_start_alike():
    """Same seed: what two arms have in common is initialised alike. Another seed: it is not."""

    def params(seed, **sections):
        c = tiny.make_config(**sections)
        made = model.init(model.from_config(c, tiny.VOCAB), jax.random.key(seed))["params"]
        return dict(jax.tree_util.tree_leaves_with_path(made))

    plain = params(0)
    other = params(0, router=dict(kind="group_limited", k=1))
    assert plain.keys() == other.keys()
    for path, value in plain.items():
        np.testing.assert_array_equal(value, other[path], err_msg=str(path))
    changed = params(1)
    assert any((changed[path] != value).any() for path, value in plain.items())
