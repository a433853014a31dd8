"""Finds and reads config files: experiment files, which are Python, and saved configs, which are JSON and only data.

An experiment file may name another with `BASE = "../ablation.py"` (relative to itself, a preset allowed): its own
fields then change that file's.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import itertools
import json
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ml_collections

from moelab import spelling
from moelab.errors import ConfigError


def folders() -> list[Path]:
    """Returns the experiment folders that bare names are looked up in: here, and beside the package."""
    here, beside = Path("experiments"), Path(__file__).parent.parent / "experiments"
    found = [here] if here.is_dir() else []
    if beside.is_dir() and not (found and here.samefile(beside)):
        found.append(beside)
    return found


def files() -> Iterator[tuple[str, Path]]:
    """Yields (name, path) of every experiment file; the name is the path below its folder, without the ending."""
    for folder in folders():
        for path in sorted(folder.rglob("*.py")):
            if not path.name.startswith("_"):
                yield path.relative_to(folder).with_suffix("").as_posix(), path


def read(source: str) -> tuple[str, str, Mapping]:
    """Reads a config file.

    Args:
      source: `path.py[:preset]`, `name[:preset]` of a file in experiments/, a config.json, or a run directory.

    Returns:
      The file with its preset, a name made of both, and the nested values.

    Raises:
      ConfigError: no such file or preset, or the file is broken (then with its line).
    """
    path, preset = _find(source)
    label = f"{_shown(path)}:{preset}" if preset else _shown(path)
    if path.is_dir() or path.suffix == ".json":
        if preset:
            raise ConfigError(f"{source}: a saved config has no presets")
        path = path / "config.json" if path.is_dir() else path
        return label, path.absolute().parent.name, _read_json(path)
    return label, "-".join(filter(None, (path.stem, preset))), _run(path, preset)


def _shown(path: Path) -> str:
    """Names a file from here, or from the checkout: a card is not to carry the folders of one machine."""
    roots = (Path.cwd(), *(folder.parent for folder in folders()))
    inside = (root for root in roots if path.is_absolute() and path.is_relative_to(root))
    return next((path.relative_to(root).as_posix() for root in inside), str(path))


def _find(source: str) -> tuple[Path, str]:
    if Path(source).exists():
        return _checked(Path(source)), ""
    text, _, preset = source.partition(":")
    if text and Path(text).exists():
        return _checked(Path(text)), preset
    found = _named(text)
    if len(found) == 1:
        return found[0], preset
    if found:
        raise ConfigError(f"{source}: several configs have this name: {', '.join(map(str, found))}")
    raise ConfigError(f"{source}: no such config{_near(text)}")


def _named(text: str) -> list[Path]:
    """Finds a bare name; the nearer folder and the whole name win over the further and the last part."""
    known = [(name, path) for name, path in files() if not text.endswith(".py")]
    for folder in folders():
        inside = [(name, path) for name, path in known if path.is_relative_to(folder)]
        for key in (lambda name: name, lambda name: name.rpartition("/")[2]):
            found = [path for name, path in inside if key(name) == text]
            if found:
                return found
    return []


def _checked(path: Path) -> Path:
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(f"{path}: a folder without config.json is no config; name a file in it")
    return path


def _near(text: str) -> str:
    """Suggests paths where a path came and names where a name came."""
    if "/" in text or text.endswith(".py"):
        known = {str(path): str(path) for path in sorted(Path(text).parent.glob("*.py"))}
        known |= {f"experiments/{name}.py": str(path) for name, path in files()}
        known |= {name: name for name, _ in files()}
    else:
        whole = [name for name, _ in files()]
        known = {name: name for name in [*whole, *(name.rpartition("/")[2] for name in whole)]}
    near = [known[name] for name in spelling.closest(text, known)]
    if near:
        return f"; did you mean {' or '.join(near)}?"
    if not known:
        return "; there are no experiment files here"
    return f"; there are {', '.join(list(known.values())[:8])}" + (
        ", ..." if len(known) > 8 else ""
    )


def _read_json(path: Path) -> Mapping:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        values = saved["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a saved config ({type(error).__name__}: {error})") from None
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: not a saved config (config is no object)")
    return values


def _run(path: Path, preset: str, above: tuple[Path, ...] = ()) -> Mapping:
    """Executes an experiment file and calls its get_config; `above`: the files that it is the BASE of."""
    _check_circle(path, above)
    space = _execute(path)
    if not callable(space.get("get_config")):
        raise ConfigError(f'{path}:1: no function get_config(preset="")')
    _check_preset(path, preset, space)
    with _located(path):
        config = space["get_config"](preset) if preset else space["get_config"]()
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"{path}:1: get_config wants to return a ConfigDict, got {type(config).__name__}"
        )
    base = _base(path, space)
    return _merged(_run(*base, (*above, path)) if base else {}, config)


def _execute(path: Path) -> dict:
    """Returns the names that an experiment file defines."""
    space = {"__name__": path.stem, "__file__": str(path)}
    with _located(path):
        exec(compile(path.read_bytes(), str(path), "exec"), space)
    return space


@contextlib.contextmanager
def _located(path: Path) -> Iterator[None]:
    """Turns whatever a file's code raises into one line with the file's line."""
    try:
        yield
    except ConfigError:
        raise
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}:{error.lineno}: SyntaxError: {error.msg}") from None
    except (
        Exception,
        SystemExit,
    ) as error:  # a file that exits would end moelab, and no word of it
        text = " ".join(str(error).split())
        raise ConfigError(f"{path}:{_line(error, path)}: {type(error).__name__}: {text}") from error


_PREFIX = "sweep_"  # of the generator functions in an experiment file
_MOST_POINTS = 10_000  # of one generator; more is taken for one that never ends


def sweeps(source: str) -> tuple[Path | None, dict[str, Callable[[], list[Mapping]]]]:
    """Returns the sweeps of an experiment file: `def sweep_NAME(): yield {"router.k": 4}`, and those of its BASE.

    Args:
      source: as `read` takes it; a saved config has no sweeps.

    Returns:
      The file (None for a saved config), and by name a function that lists the sweep's points, nested or dotted.
      It raises a ConfigError with the file's line where the generator does not yield mappings.

    Raises:
      ConfigError: no such file, or the file is broken.
    """
    path, _ = _find(source)
    if path.is_dir() or path.suffix == ".json":
        return None, {}
    return path, _sweeps(path)


def _sweeps(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Callable[[], list[Mapping]]]:
    _check_circle(path, above)
    space = _execute(path)
    base = _base(path, space)
    found = _sweeps(base[0], (*above, path)) if base else {}
    for name, value in space.items():
        if name.startswith(_PREFIX) and name != _PREFIX and callable(value):
            found[name.removeprefix(_PREFIX)] = functools.partial(_points, path, name, value)
    return found


def _points(path: Path, name: str, generator: Callable) -> list[Mapping]:
    with _located(path):
        points = list(itertools.islice(generator(), _MOST_POINTS + 1))
    if not points:
        raise ConfigError(f"{path}: {name} yields no point")
    if len(points) > _MOST_POINTS:
        raise ConfigError(f"{path}: {name} yields more than {_MOST_POINTS} points")
    for i, point in enumerate(points, 1):
        if not isinstance(point, Mapping | ml_collections.ConfigDict):
            got = type(point).__name__
            raise ConfigError(
                f"{path}: {name} wants to yield dicts of field -> value; point {i} is a {got}"
            )
    return points


def _base(path: Path, space: Mapping) -> tuple[Path, str] | None:
    """Returns the file and preset that an executed file names as its base; None where it names none."""
    base = space.get("BASE", "")
    if not isinstance(base, str):
        raise ConfigError(f"{path}: BASE wants a file's name, got {base!r}")
    if not base:
        return None
    name, _, preset = base.partition(":")
    other = path.parent / name
    if not other.is_file():
        raise ConfigError(f"{path}: BASE names {base!r}, and {other} is no file")
    return other, preset


def _check_circle(path: Path, above: tuple[Path, ...]) -> None:
    if any(path.samefile(other) for other in above):
        chain = " -> ".join(map(str, (*above, path)))
        raise ConfigError(f"{above[0]}: BASE leads back to a file that it came from: {chain}")


def _merged(base: Mapping, changes: Mapping) -> dict:
    """Nested values with the changes on top."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _line(error: Exception, path: Path) -> int:
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == str(path)), 1)


def _check_preset(path: Path, preset: str, space: Mapping) -> None:
    presets = [name for name in space.get("PRESETS", ()) if name]
    if preset and preset not in presets:
        known = f"; it has {', '.join(presets)}" if presets else "; it has none"
        guess = spelling.hint(preset, presets, prefix=f"{path}:") or known
        raise ConfigError(f"{path}: no preset {preset!r}{guess}")


def outline(path: Path) -> tuple[str, list[str]]:
    """Returns an experiment file's first docstring line and its presets, without executing it."""
    tree = ast.parse(path.read_bytes())
    first = (ast.get_docstring(tree) or "").partition("\n")[0]
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PRESETS":
            value = node.value
            keys = (
                value.keys if isinstance(value, ast.Dict) else getattr(value, "elts", ())
            )  # else computed
            return first, [key.value for key in keys if key.value]
    return first, []


def sweep_names(path: Path) -> list[str]:
    """Returns the names of an experiment file's own sweeps, without executing it."""
    names = (n.name for n in ast.parse(path.read_bytes()).body if isinstance(n, ast.FunctionDef))
    return [name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX)]
