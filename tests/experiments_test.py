"""Every file in experiments/ loads, is valid in every preset, and reads like a lab book."""

import ast
from pathlib import Path

import pytest

import moelab
from moelab import config, config_file

ROOT = Path(moelab.__file__).parent.parent
FILES = sorted((ROOT / "experiments").rglob("*.py"))
SOURCES = [
    f"{path}:{preset}" if preset else str(path)
    for path in FILES
    for preset in ("", *config_file.outline(path)[1])
]


def short(source):
    return Path(source).name


@pytest.mark.parametrize("source", SOURCES, ids=short)
def test_loads_and_has_no_problems(source):
    loaded = config.load(source)
    assert config.validate(loaded.config) == []
    assert loaded.dropped == ()


@pytest.mark.parametrize("source", SOURCES, ids=short)
def test_survives_its_own_record(source):
    c = config.load(source).config
    assert config.sha256(config.from_dict(config.record(c)["config"])) == config.sha256(c)


def test_no_two_are_the_same_run():
    hashes = [config.sha256(config.load(source).config) for source in SOURCES]
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_sets_what_differs_from_the_defaults_and_no_unknown_kind(path):
    """A file that spells out a default is fine; one that sets None is not (practice: no bare None)."""
    _, _, values = config_file.read(str(path))
    assert all(value is not None for _, value in config.flatten(values))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_is_a_lab_book(path):
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    first = doc.splitlines()[0]
    assert first.endswith(".")
    relative = path.relative_to(ROOT).as_posix()
    assert f"moelab run --config={relative}" in doc, "the docstring names the command"
    for entry in ("machine", "wall time", "result", "date"):
        assert f"\n  {entry} " in doc, f"the lab book has no {entry}"


@pytest.mark.parametrize("source", SOURCES, ids=short)
def test_builds_a_model(source):
    from moelab import launch

    found = launch.summary(config.load(source).config)
    assert 0 < found["parameters"]["active"] <= found["parameters"]["total"]


def test_the_sweeps_of_the_ablation_are_all_of_its_folders():
    _, sweeps = config_file.sweeps(str(ROOT / "experiments" / "ablation.py"))
    for folder in ("routing", "balance"):
        named = [point["config"] for point in sweeps[folder]()]
        there = {f"{folder}/{path.stem}" for path in (ROOT / "experiments" / folder).glob("*.py")}
        assert set(named) == there and len(named) == len(there)
