"""Checkpoints that notice damage: Orbax writes them, a digest of every leaf says whether they read back as saved.

Orbax makes a save asynchronous and atomic, but restores a flipped bit without a word (measured: 25 of 25). So each
step carries a manifest with the sha256 of every leaf, computed from the live arrays and committed with the step:

    <directory>/<step>/state      the arrays, one per leaf, named by their path in the state
    <directory>/<step>/manifest   JSON (see manifest.py)

A step that does not read back as its manifest says is renamed to <step>.damaged and the step before it is tried.
"""

from __future__ import annotations

import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from moelab.manifest import (
    CheckpointError,
    DamagedError,
    MismatchError,
    check_same_state,
    describe,
    describe_arrays,
    named_leaves,
    read_manifest,
    state_digest,
)

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "DamagedError",
    "MismatchError",
    "load",
    "read_manifest",
    "state_digest",
    "verify",
]

Event = Callable[[str, int, dict], None]

# Orbax moves steps beyond `keep` here, then we delete them: a kill in the middle of a deletion would otherwise leave
# half a step that looks damaged (seen once in twenty kills).
_RETIRED = "retired"


class _QuietOrbax(logging.Filter):
    """Drops Orbax's progress chatter from the absl log; its errors pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname


absl_logging.get_absl_logger().addFilter(_QuietOrbax())


class Checkpoints:
    """The checkpoints of one run: saved asynchronously, verified when restored, the newest `keep` kept.

    A context manager: leaving it waits for the save under way. One process at a time may hold a directory; to look at
    another run's checkpoints use `load`.

    Args:
      directory: where the steps are; made if absent. Half-written steps of a killed process are removed.
      keep: number of newest steps to keep, >= 1; two or more, so that a damaged one has a predecessor.
      on_event: called as on_event(event, step, detail) with "checkpoint_skipped" (detail: reason, moved_to) for each
        damaged step, and "checkpoints_exhausted" (detail: steps) when no step was good.

    Raises:
      CheckpointError: keep < 1, or the directory cannot be used.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int, on_event: Event | None = None):
        if keep < 1:
            raise CheckpointError(f"keep is {keep}; at least one checkpoint must be kept")
        self.directory = pathlib.Path(directory).absolute()
        self._on_event = on_event or (lambda event, step, detail: None)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            todelete_subdir=_RETIRED,
        )
        try:
            self._clear_retired()
            self._manager = ocp.CheckpointManager(
                self.directory, options=options, item_names=("state", "manifest")
            )
        except OSError as error:
            raise CheckpointError(f"cannot keep checkpoints in {directory}: {error}") from error

    def save(self, step: int, state: Any) -> str:
        """Starts to save `state` as `step` and returns when its arrays may be donated or overwritten.

        Args:
          step: optimizer steps done; not saved before.
          state: pytree of arrays (any dtype of jax or ml_dtypes, typed PRNG keys) and Python numbers.

        Returns:
          The state's digest, as `state_digest` gives it.

        Raises:
          CheckpointError: the step exists, a leaf is no array, or this or the previous save failed (disk full).
        """
        self.wait()
        manifest, arrays = describe(step, state)
        arguments = ocp.args.Composite(
            # Orbax copies host arrays before it returns, so views of donated buffers are safe here; it refuses empty
            # arrays, which the manifest describes completely.
            state=ocp.args.StandardSave({k: v for k, v in arrays.items() if v.size}),
            manifest=ocp.args.JsonSave(manifest),
        )
        try:
            self._clear_retired()
            # force: otherwise Orbax silently saves nothing when a later step exists.
            saved = self._manager.save(step, args=arguments, force=True)
        except Exception as error:
            where = f"step {step} in {self.directory}"
            raise CheckpointError(f"cannot save {where}: {error}") from error
        if not saved:
            raise CheckpointError(f"Orbax declined to save step {step} in {self.directory}")
        return manifest["digest"]

    def restore_latest(self, abstract_state: Any) -> tuple[int, Any] | None:
        """Restores the newest step that reads back as it was saved.

        Damaged steps are reported on stderr and to `on_event`, and renamed, so that their number can be saved again.

        Args:
          abstract_state: the state's tree, of arrays or `jax.ShapeDtypeStruct`; a leaf's sharding is honoured.

        Returns:
          (step, state), or None where there is no good step.

        Raises:
          MismatchError: the newest good step holds a state of another shape.
        """
        self.wait()
        return _newest_good(self.directory, abstract_state, self._set_aside, self._on_event)

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Restores one step, as `load` does."""
        self.wait()
        return load(self.directory, abstract_state, step)[1]

    def steps(self) -> list[int]:
        """Lists the committed steps, oldest first."""
        return _steps(self.directory)

    def wait(self) -> None:
        """Waits for the save under way; raises CheckpointError if it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise CheckpointError(f"a save in {self.directory} failed: {error}") from error

    def close(self) -> None:
        """Waits for the save under way and ends Orbax's threads."""
        try:
            self.wait()
            self._clear_retired()
        finally:
            self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _clear_retired(self) -> None:
        if (self.directory / _RETIRED).exists():
            shutil.rmtree(self.directory / _RETIRED)

    def _set_aside(self, step: int, reason: str) -> None:
        moved = _free_name(self.directory, f"{step}.damaged")
        os.rename(self.directory / str(step), moved)
        self._manager.reload()
        _warn_skipped(step, f"{reason}; kept as {moved.name}")
        self._on_event("checkpoint_skipped", step, {"reason": reason, "moved_to": moved.name})


def load(
    directory: str | os.PathLike, abstract_state: Any, step: int | None = None
) -> tuple[int, Any]:
    """Reads a checkpoint, verified, and changes nothing on disk: for evaluation, also of a run that is going on.

    Args:
      directory: of the checkpoints.
      abstract_state: the state's tree, of arrays or `jax.ShapeDtypeStruct`; a leaf's sharding is honoured.
      step: which; None: the newest good one. Damaged ones are reported on stderr.

    Returns:
      (step, state).

    Raises:
      DamagedError: the step asked for does not read back as it was saved.
      MismatchError: the step holds a state of another shape.
      CheckpointError: there is no such step, or no good one.
    """
    directory = pathlib.Path(directory).absolute()
    if step is None:
        found = _newest_good(directory, abstract_state, _warn_skipped, lambda *event: None)
        if found is None:
            raise CheckpointError(f"no good checkpoint in {directory}")
        return found
    if step not in _steps(directory):
        raise CheckpointError(f"no step {step} in {directory}; there are {_steps(directory)}")
    manifest = read_manifest(directory, step)
    leaves, treedef = named_leaves(abstract_state)
    check_same_state(manifest["leaves"], leaves, f"step {step} in {directory}")
    arrays = _read_arrays(directory / str(step), manifest)
    placed = [
        _place(arrays[name], leaf, manifest["leaves"][name].get("key"))
        for name, leaf in leaves.items()
    ]
    return step, jax.tree.unflatten(treedef, placed)


def verify(directory: str | os.PathLike) -> list[str]:
    """Hashes every kept step again and lists what differs from the manifests; changes nothing.

    Returns:
      One line per problem, empty if every step is as it was saved. Having no step at all is a problem.
    """
    directory = pathlib.Path(directory).absolute()
    steps = _steps(directory)
    problems = [] if steps else [f"no checkpoint in {directory}"]
    for step in steps:
        try:
            _read_arrays(directory / str(step), read_manifest(directory, step))
        except DamagedError as error:
            if (directory / str(step)).is_dir():  # else a training under way has just retired it
                problems.append(f"checkpoint {step}: {error}")
    return problems


def _newest_good(
    directory: pathlib.Path,
    abstract_state: Any,
    skip: Callable[[int, str], None],
    on_event: Event,
) -> tuple[int, Any] | None:
    steps = _steps(directory)
    for step in reversed(steps):
        try:
            return load(directory, abstract_state, step)
        except DamagedError as error:
            skip(step, str(error))
    if steps:
        listed = ", ".join(map(str, steps))
        _warn(f"no good checkpoint in {directory}: all of {listed} are damaged")
        on_event("checkpoints_exhausted", 0, {"steps": steps})
    return None


def _steps(directory: pathlib.Path) -> list[int]:
    # Orbax commits a step by renaming its folder to the bare number.
    if not directory.is_dir():
        return []
    names = (path.name for path in directory.iterdir())
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def _free_name(directory: pathlib.Path, name: str) -> pathlib.Path:
    path, number = directory / name, 1
    while path.exists():
        path, number = directory / f"{name}.{number}", number + 1
    return path


def _warn(text: str) -> None:
    print(f"moelab: WARNING: {text}", file=sys.stderr, flush=True)


def _warn_skipped(step: int, reason: str) -> None:
    _warn(f"skipped checkpoint {step}: {reason}; trying the one before")


def _read_arrays(path: pathlib.Path, manifest: dict) -> dict[str, np.ndarray]:
    """Reads a step's arrays to the host and compares each with the manifest."""
    wanted = manifest["leaves"]
    arrays = {k: np.zeros(v["shape"], v["dtype"]) for k, v in wanted.items() if 0 in v["shape"]}
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            for name in [k for k in wanted if k not in arrays]:
                arrays.update(reader.restore(path / "state", args=_only(name)))
    except MemoryError:
        raise  # says something about the machine, not about the step
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise DamagedError(f"its arrays cannot be read ({reason})") from error
    for name, entry in describe_arrays(arrays).items():
        for field, value in entry.items():
            if value != wanted[name][field]:
                saved = wanted[name][field]
                raise DamagedError(f"leaf {name}: {field} is {value}, was saved as {saved}")
    return arrays


def _only(name: str) -> ocp.args.PyTreeRestore:
    # One leaf at a time: where several reads fail together, Orbax closes its event loop under the later ones and a
    # traceback for each of them lands on stderr (measured cost: 7 ms a leaf).
    return ocp.args.PyTreeRestore(
        item={name: np.empty(0, np.uint8)},
        restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)},
        partial_restore=True,
    )


def _place(array: np.ndarray, leaf: Any, key: str | None) -> Any:
    """Makes of a host array what the abstract leaf is: number, numpy array, or jax array with its sharding."""
    if isinstance(leaf, bool | int | float | complex | np.generic):
        return type(leaf)(array[()])
    if isinstance(leaf, np.ndarray):
        return array
    # may_alias=False: the first step after a resume can then donate it.
    value = jax.device_put(array, may_alias=False)
    if key is not None:
        value = jax.random.wrap_key_data(value, impl=key)
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or (isinstance(leaf, jax.Array) and not leaf.committed):
        return value
    return jax.device_put(value, sharding)
