"""Compiles programs for GPUs that are not here, down to machine code, and reads what came out.

    compiled = aot.compile(fn, (jax.ShapeDtypeStruct((128, 256), jnp.bfloat16),), aot.targets()["b200"])
    compiled.kernels[0].registers, compiled.memory.temp_bytes

XLA's CUDA plugin compiles from a description of the GPU (`targets`), Mosaic GPU and Triton make PTX, and ptxas from
triton's package assembles it. Nothing runs, and no CUDA library is needed; packages: the extra `aot`.

A lowering that does not fit the architecture can end the whole process (LLVM's fatal errors): where that may happen,
`in_process` runs a function in a process of its own, one for each target.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from pallas_kernels import device, kept_code, machine_code, private_jax
from pallas_kernels.machine_code import Kernel
from pallas_kernels.targets import Target, plugin, targets

__all__ = ["Compiled", "Kernel", "Memory", "Target", "compile", "in_process", "missing", "targets"]

_PACKAGES = ("triton", "jax_triton")
# A process that only compiles: no GPU is looked for, and a compiled program is never taken from a cache, since only
# compiling shows the code.
_CHILD_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
_OPTIONS = {
    "xla_gpu_enable_cub_radix_sort": False,  # it asks a device how much memory it takes
    "xla_gpu_autotune_level": 0,  # nothing can be timed
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Device memory of a compiled program, in bytes, on each device."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What came out of the compiler.

    Attributes:
      target: the GPU that it is for.
      kernels: the Mosaic and Triton kernels, in the order in which they were compiled; XLA's own are not among them.
      hlo: the optimised program.
      memory: what it takes.
      seconds: what tracing, lowering and compiling took.
    """

    target: Target
    kernels: tuple[Kernel, ...]
    hlo: str = dataclasses.field(repr=False)
    memory: Memory
    seconds: float

    def kernel(self, name: str = "") -> Kernel:
        """Returns the only kernel whose name begins like this.

        Raises:
          ValueError: there are none, or several.
        """
        found = [kernel for kernel in self.kernels if kernel.name.startswith(name)]
        if len(found) != 1:
            names = ", ".join(kernel.name for kernel in self.kernels) or "none"
            raise ValueError(f"one kernel {name!r} was expected among: {names}")
        return found[0]


def missing() -> str:
    """Says which packages are missing to compile for a GPU, or "" if it can be done."""
    absent = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if plugin() is None:
        absent.append("jax-cuda13-plugin")
    if machine_code.tool("nvdisasm") is None and "triton" not in absent:
        absent.append("nvdisasm (in triton's package)")
    return f"not installed: {', '.join(absent)} (pip install 'moelab[aot]')" if absent else ""


def devices(target: Target, topology: str = "1x1x1") -> Sequence[jax.Device]:
    """Returns the devices of a machine that is not here, to make a mesh of.

    Args:
      target: what they are.
      topology: how many: slices x processes x devices of a process, such as "1x1x8", "1x18x4".
    """
    from jax.experimental import topologies

    description = topologies.get_topology_desc(
        topology, platform="cuda", topology=topology, target_config=target.text
    )
    return description.devices


def compile(
    fn: Callable,
    args: Sequence[object],
    target: Target,
    topology: str = "1x1x1",
    *,
    mesh: jax.sharding.Mesh | None = None,
    **jit_options: object,
) -> Compiled:
    """Compiles `fn(*args)` for a GPU. Traced with `device.assume`, so that kernels for this GPU are chosen.

    Args:
      fn: to be traced.
      args: pytrees of `jax.ShapeDtypeStruct`; without a sharding they are replicated.
      target: what to compile for.
      topology: see `devices`.
      mesh: of these devices; None: one axis "x".
      **jit_options: for `jax.jit`, such as `donate_argnums`.

    Raises:
      RuntimeError: packages are missing; ptxas refuses a kernel.
      NotImplementedError: ptxas does not know the architecture; or from `fn`.
    """
    if missing():
        raise RuntimeError(missing())
    if target.arch not in machine_code.architectures():
        raise NotImplementedError(f"ptxas does not know {target.arch} ({target.maker_name})")
    private_jax.infer_assumed_architecture()
    private_jax.eliminate_dead_triton_calls()
    _forget_other_targets(target)
    if mesh is None:
        mesh = jax.sharding.Mesh(np.array(devices(target, topology)), ("x",))
    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        kept_code.keeping(folder),
        device.assume(target.device),
        private_jax.recorded_mosaic() as mosaic,
        private_jax.recorded_triton() as triton,
        jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
    ):
        jitted = jax.jit(lambda *args: fn(*args), keep_unused=True, **jit_options)
        compiled = jitted.lower(*_placed(args, mesh)).compile(compiler_options=_OPTIONS)
        seconds = time.perf_counter() - start
        kernels = tuple(kept_code.kernels(Path(folder), mosaic, triton))
    return Compiled(
        target=target,
        kernels=kernels,
        hlo=compiled.as_text(),
        memory=_memory(compiled.memory_analysis()),
        seconds=seconds,
    )


_LAST_TARGET: list[str] = []


def _forget_other_targets(target: Target) -> None:
    """Drops what JAX has traced for another GPU: its caches do not know that a kernel was chosen by the device."""
    if _LAST_TARGET and _LAST_TARGET[0] != target.name:
        jax.clear_caches()
    _LAST_TARGET[:] = [target.name]


def _placed(args: Sequence[object], mesh: jax.sharding.Mesh) -> Sequence[object]:
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def place(leaf):
        sharding = getattr(leaf, "sharding", None) or replicated
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, tuple(args))


def _memory(stats) -> Memory:
    return Memory(
        argument_bytes=stats.argument_size_in_bytes,
        output_bytes=stats.output_size_in_bytes,
        alias_bytes=stats.alias_size_in_bytes,
        temp_bytes=stats.temp_size_in_bytes,
    )


def in_process(
    target: str, function: str, arguments: object, timeout: float = 600
) -> Iterator[object]:
    """Calls a function in a new process and yields what it yields, as it comes.

    Args:
      target: name of the GPU; the function gets the `Target`.
      function: "module:function"; called with (target, arguments), yields values that JSON can express.
      arguments: a value that JSON can express.
      timeout: seconds for all of it.

    Raises:
      RuntimeError: the process ended early, or took too long; with the end of what it said.
    """
    root = str(Path(__file__).parent.parent)
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "pallas_kernels.aot", target, function, json.dumps(arguments)]
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **_CHILD_ENVIRONMENT, "PYTHONPATH": paths},
        )
        timer = threading.Timer(timeout, child.kill)
        timer.start()
        try:
            yield from map(json.loads, child.stdout)
            code = child.wait()
        finally:
            late = not timer.is_alive()
            timer.cancel()
            child.kill()
            child.wait()
            child.stdout.close()
        if code:
            errors.seek(0)
            said = errors.read().strip().splitlines()[-12:]
            why = f"signal {-code}" if code < 0 else f"exit code {code}"
            why = f"longer than {timeout} s" if late else why
            raise RuntimeError(f"compiling for {target} ended: {why}\n" + "\n".join(said))


def _child(argv: Sequence[str]) -> None:
    """Is the other end of `in_process`: results go to standard output, all else to standard error."""
    target, function, arguments = argv
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, _, name = function.partition(":")
    call = getattr(importlib.import_module(module), name)
    for value in call(targets()[target], json.loads(arguments)):
        print(json.dumps(value), file=results, flush=True)


if __name__ == "__main__":
    _child(sys.argv[1:])
