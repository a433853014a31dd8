"""Every use of private interfaces of JAX, Pallas and jax-triton, in one place, for the versions that it was read for.

Each installer makes one patch, once, and says what it assumes and what stops working without it. On another version of
JAX all of them raise: the assumptions have to be read again first.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import os
import threading
import types
import weakref
from collections.abc import Iterator

import jax
import numpy as np

VERSIONS = ("0.12.0", "0.12.0.1")


def once(install):
    """Decorates an installer: checks JAX's version, then runs it at most once per process."""

    @functools.wraps(install)
    def checked():
        if jax.__version__ not in VERSIONS:
            raise RuntimeError(
                f"{install.__name__} patches private interfaces of jax {' or '.join(VERSIONS)}, "
                f"but this is {jax.__version__}: read pallas_kernels/private_jax.py against it first"
            )
        install()

    return functools.cache(checked)


@once
def interpret_block_scaled() -> None:
    """Lets interpret mode run block-scaled `tcgen05_mma` and `async_copy_scales_to_tmem`, race detection included.

    Without it the copy is refused ("source must be an SMEM ref") and the product asserts that there are no scales.

    Assumes: scales in TMEM are kept at their logical shape (rows, columns), so the copy undoes the 32x16 atoms; the
    copy takes the parameters of `async_copy_smem_to_tmem`; copies and products that one thread issues run in that
    order, so that one buffer of scales serves every step (CUTLASS's block-scaled mainloop relies on it too). One CTA,
    no sparsity.
    """
    from jax._src.pallas.mosaic_gpu import primitives
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret

    interpret = jaxpr_interpret.JaxprInterpreter.interpret

    def interpret_with_scales(self, jaxpr, token, *args):
        def ordinary(eqn):
            if eqn.primitive is not primitives.async_copy_scales_to_tmem_p:
                return eqn
            return eqn.replace(primitive=primitives.async_copy_smem_to_tmem_p)

        jaxpr = jaxpr.replace(eqns=[ordinary(eqn) for eqn in jaxpr.eqns])
        return interpret(self, jaxpr, token, *args)

    jaxpr_interpret.JaxprInterpreter.interpret = interpret_with_scales
    gpu_callbacks.TcGen05Copy = _scale_copy(gpu_callbacks)
    gpu_callbacks.TcGen05Mma = _scaled_mma(gpu_callbacks)


def _scale_copy(gpu_callbacks: types.ModuleType) -> type:
    """Returns TcGen05Copy with copies of scale atoms: (R, C, 32, 16) in SMEM to (128 R, 4 C) in TMEM."""

    class ScaleCopy(gpu_callbacks.TcGen05Copy):
        def forms_pipeline(self, parent):
            in_order = isinstance(parent, gpu_callbacks.TcGen05Copy | gpu_callbacks.TcGen05Mma)
            return in_order and parent.collective_axis == self.collective_axis

        def __call__(self, pipeline_clock, tma_thread_id):
            memory, log = _interpreter(gpu_callbacks, self)
            if memory.buffer_shape_and_dtype(self.smem_key).shape[-2:] != (32, 16):
                return super().__call__(pipeline_clock, tma_thread_id)
            assert self.collective_axis is None, "2-CTA copies of scales are not interpreted"
            clock = _task_clock(memory, self.thread, pipeline_clock, tma_thread_id)
            where = {"source_info": self.source_info}
            tiles, _, _ = memory.get_buffer_content(
                self.smem_key, self.smem_access, self.thread, logging_info=log
            )
            if clock is not None:
                gpu_callbacks.get_races().check_read(
                    self.thread, clock.async_smem_clock, self.smem_key, self.smem_access, **where
                )
            memory.store_buffer_content(
                self.tmem_key,
                self.tmem_access,
                _without_atoms(np.asarray(tiles)),
                self.thread,
                increment_clock=False,
                logging_info=log,
            )
            if clock is not None:
                gpu_callbacks.get_races().check_write(
                    self.thread, clock.generic_clock, self.tmem_key, self.tmem_access, **where
                )
            return clock

    return ScaleCopy


def _scaled_mma(gpu_callbacks: types.ModuleType) -> type:
    """Returns TcGen05Mma with block scales: accumulator += (a * a_scale) @ (b * b_scale) in float32."""

    class ScaledMma(gpu_callbacks.TcGen05Mma):
        def __call__(self, pipeline_clock, tma_thread_id):
            if self.a_scale_key is None:
                return super().__call__(pipeline_clock, tma_thread_id)
            assert self.collective_axis is None, "2-CTA products are not interpreted"
            assert self.a_sparse_metadata_key is None, "sparse products are not interpreted"
            memory, log = _interpreter(gpu_callbacks, self)
            clock = _task_clock(memory, self.thread, pipeline_clock, tma_thread_id)

            def read(key, access, in_smem):
                value, _, _ = memory.get_buffer_content(key, access, self.thread, logging_info=log)
                if clock is not None:
                    proxy = clock.async_smem_clock if in_smem else clock.generic_clock
                    gpu_callbacks.get_races().check_read(
                        self.thread, proxy, key, access, source_info=self.source_info
                    )
                return np.asarray(value).astype(np.float32)

            a_scale = memory.access(self.a_scale_key, self.a_scale_transforms or ())
            b_scale = memory.access(self.b_scale_key, self.b_scale_transforms or ())
            total = _scaled_product(
                read(self.a_key, self.a_access, True),
                read(self.b_key, self.b_access, True).T,
                read(self.a_scale_key, a_scale, False),
                read(self.b_scale_key, b_scale, False),
            )
            acc = self.acc_key, self.acc_access
            if self.accumulate:
                total = total + memory.get_buffer_content(*acc, None, logging_info=log)[0]
            memory.store_buffer_content(
                *acc, total, self.thread, increment_clock=False, logging_info=log
            )
            if clock is not None:
                gpu_callbacks.get_races().check_write(
                    self.thread, clock.generic_clock, *acc, source_info=self.source_info
                )
            if self.barrier_key:
                memory.get_barrier(self.barrier_key).arrive(
                    thread=self.thread, clock=clock, logging_info=log
                )
            return None if clock is None else clock.copy()

    return ScaledMma


def _scaled_product(
    a_MK: np.ndarray, b_NK: np.ndarray, a_scale: np.ndarray, b_scale: np.ndarray
) -> np.ndarray:
    """(a * a_scale) @ (b * b_scale)^T; scales may have more rows than their operand, as TMEM has them by 128."""
    block = a_MK.shape[1] // a_scale.shape[1]
    a_MK = a_MK * np.repeat(a_scale[: len(a_MK)], block, axis=1)
    b_NK = b_NK * np.repeat(b_scale[: len(b_NK)], block, axis=1)
    return a_MK @ b_NK.T


def _without_atoms(tiles: np.ndarray) -> np.ndarray:
    """Inverts `formats.swizzle`: (R, C, 32, 16) -> (128 R, 4 C)."""
    rows, columns = tiles.shape[:2]
    atoms = tiles.reshape(rows, columns, 32, 4, 4).transpose(0, 3, 2, 1, 4)
    return atoms.reshape(rows * 128, columns * 4)


def _interpreter(gpu_callbacks: types.ModuleType, task):
    """Returns the interpreter's memory and what it says of a task in its log."""
    memory = gpu_callbacks._get_shared_memory()
    log = gpu_callbacks.memory.GPULoggingInfo(task.mesh_location, task.thread, task.source_info)
    return memory, log


def _task_clock(memory, thread, pipeline_clock, tma_thread_id):
    """Returns the vector clock of an asynchronous task: after its thread and what it is pipelined with."""
    if not memory.detect_races:
        return None
    clock = memory.get_clock(thread)
    if pipeline_clock is not None:
        clock.update(pipeline_clock)
    clock.inc(tma_thread_id)
    return clock


@once
def compile_interpreted_threads_once() -> None:
    """Lets interpret mode compile a kernel's program once for all of its threads, and keep it for the next call.

    Without it every warpgroup and every warp compiles the same program, in each call: most of a small test's time.

    Assumes: `thread_map` hands every thread the same jaxpr, and arguments of the same types.
    """
    from jax._src.pallas.mosaic.interpret import thread_map

    lock, programs = threading.Lock(), weakref.WeakKeyDictionary()

    def run_jaxpr(jaxpr, consts, *args):
        with lock:
            if jaxpr not in programs:
                traced = jax.jit(thread_map._run, static_argnums=0).trace(jaxpr, consts, *args)
                programs[jaxpr] = traced.lower().compile()
            program = programs[jaxpr]
        program(consts, *args)

    thread_map._run_jaxpr = run_jaxpr


def reset_interpreter() -> None:
    """Forgets what a kernel that raised in interpret mode left behind, so that the next one can run."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    gpu_callbacks.reset_gpu_interpret_mode_state()


@once
def infer_assumed_architecture() -> None:
    """Lets Mosaic lower for the device of `device.assume`.

    Without it Mosaic asks the default device, takes a CPU for compute capability 9.0, and refuses what only Blackwell
    has ("f4e2m1fn casts only supported on Blackwell and newer").

    Assumes: every caller of `_infer_arch` looks it up in its module.
    """
    from jax.experimental.mosaic.gpu import utils

    from pallas_kernels import device

    infer = utils._infer_arch

    def infer_assumed() -> tuple[int, int]:
        assumed = device.assumed()
        return infer() if assumed is None or assumed.capability is None else assumed.capability

    utils._infer_arch = infer_assumed


@once
def eliminate_dead_triton_calls() -> None:
    """Gives jax-triton's kernel call the rule for dead code that this JAX wants.

    Without it any `triton_call` under jit raises ("_triton_kernel_call_dce_rule() takes 2 positional arguments but 3
    were given"): rules are called with the liveness of the inputs too.
    """
    from jax._src.interpreters import partial_eval
    from jax_triton import triton_lib

    def rule(used_outs, live_ins, eqn):
        if not any(used_outs) and not partial_eval.has_effects(eqn, live_ins):
            return [False] * len(eqn.invars), None
        return [True] * len(eqn.invars), eqn

    partial_eval.dce_rules[triton_lib.triton_kernel_call_p] = rule


_TRITON_CODE: contextvars.ContextVar[list | None] = contextvars.ContextVar("code", default=None)


@contextlib.contextmanager
def recorded_triton() -> Iterator[list[tuple[str, int]]]:
    """Collects (PTX, bytes of shared memory) of every Triton kernel that is lowered inside the context."""
    _record_triton()
    code: list[tuple[str, int]] = []
    token = _TRITON_CODE.set(code)
    try:
        yield code
    finally:
        _TRITON_CODE.reset(token)


@once
def _record_triton() -> None:
    """Lets `recorded_triton` see what jax-triton compiles.

    Assumes: `_compile_kernel` returns its result last, and every use of the cache of kernels goes through the property
    `_kernel_cache`, which is empty while recording: a kernel that was compiled before would not be seen.
    """
    from jax_triton import triton_lib

    compile_kernel = triton_lib.TritonFunction._compile_kernel
    cache = triton_lib.TritonFunction._kernel_cache.fget

    def compile_and_record(self, *args, **options):
        found = compile_kernel(self, *args, **options)
        if _TRITON_CODE.get() is not None:
            _TRITON_CODE.get().append((found[-1].binary, found[-1].shared_mem_bytes))
        return found

    triton_lib.TritonFunction._compile_kernel = compile_and_record
    triton_lib.TritonFunction._kernel_cache = property(
        lambda self: cache(self) if _TRITON_CODE.get() is None else {}
    )


# (what is collected, what is added to hashes)
_MOSAIC: contextvars.ContextVar[tuple[dict[str, int], bytes]] = contextvars.ContextVar("mosaic")


@contextlib.contextmanager
def recorded_mosaic() -> Iterator[dict[str, int]]:
    """Collects name -> bytes of dynamic shared memory of the Mosaic kernels that are lowered inside the context.

    The compiler keeps kernels for as long as the process lives, by a hash from Python, and JAX keeps programs on disk:
    inside the context kernels get another hash and are compiled again, so that their code can be seen.
    """
    _record_mosaic()
    shared: dict[str, int] = {}
    token = _MOSAIC.set((shared, os.urandom(16)))
    try:
        yield shared
    finally:
        _MOSAIC.reset(token)


@once
def _record_mosaic() -> None:
    """Lets `recorded_mosaic` see the launch of every kernel, and changes the hash that it is kept by.

    Assumes: modules go through `core._run_serde_pass` just before they are hashed, with the launch in a function's
    first block, its shared memory an i32 constant; `core` uses hashlib for this hash alone, and nothing checks it.
    """
    from jax.experimental.mosaic.gpu import core

    serde = core._run_serde_pass

    def record(module, *, serialize, **options):
        if serialize and _MOSAIC.get(None):
            _MOSAIC.get()[0].update(_shared_bytes(module))
        return serde(module, serialize=serialize, **options)

    def salted(data: bytes):
        return hashlib.sha256(data + _MOSAIC.get((None, b""))[1])

    core._run_serde_pass = record
    core.hashlib = types.SimpleNamespace(sha256=salted)


def _shared_bytes(module) -> Iterator[tuple[str, int]]:
    """Yields (name, bytes of dynamic shared memory) of a Mosaic module's kernel."""
    for function in module.body.operations:
        for region in function.operation.regions:
            operations = (op for block in region.blocks for op in block.operations)
            for launch in (op.operation for op in operations if op.operation.name == "gpu.launch"):
                sizes = [v.owner.attributes["value"].value for v in launch.operands if _is_i32(v)]
                yield function.operation.attributes["sym_name"].value, sizes[0] if sizes else 0


def _is_i32(value) -> bool:
    return str(value.type) == "i32"
