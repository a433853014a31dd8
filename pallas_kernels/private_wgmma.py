"""What interpret mode lacks for Hopper's `wgmma`. Private interfaces of JAX, under the rules of private_jax.py."""

from __future__ import annotations

import collections
import functools
import types

import jax
import numpy as np

from pallas_kernels.private_jax import _task_clock, once


@once
def interpret_wgmma_from_registers() -> None:
    """Lets interpret mode run `wgmma` with the left operand in registers, and gives its reads of SMEM vector clocks.

    Without it a left operand that is an array fails ("HostAllocationKey"), products are outside race detection, and
    `wgmma_wait` does nothing.

    Assumes: products happen when they are issued, so a wait is only a matter of clocks: what a product reads counts as
    read at an unknown time until a wait that covers it, as a TMA store's source does. An accumulator is read by its own
    thread alone. Registers of an operand that are overwritten too early are not noticed.
    """
    from jax._src.pallas.mosaic_gpu import primitives
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret

    interpreter = jaxpr_interpret.JaxprInterpreter
    interpret, commit_smem = interpreter.interpret, interpreter._interpret_commit_smem_p
    deref = gpu_callbacks.wgmma_accumulator_deref
    wgmma, wait = _clocked_wgmma(gpu_callbacks)

    def interpret_with_waits(self, jaxpr, token, *args):
        # Waits are dropped before any method sees them: they go by way of a primitive that has one.
        def visible(eqn):
            if eqn.primitive is not primitives.wgmma_wait_p:
                return eqn
            return eqn.replace(
                primitive=primitives.commit_smem_p, params={"wgmma": eqn.params["n"]}
            )

        jaxpr = jaxpr.replace(eqns=[visible(eqn) for eqn in jaxpr.eqns])
        return interpret(self, jaxpr, token, *args)

    def commit_or_wait(self, eqn, token, get_invals):
        if "wgmma" not in eqn.params:
            return commit_smem(self, eqn, token, get_invals)
        return _call_back(self, wait, token, n=eqn.params["wgmma"]), []

    def product(self, eqn, token, get_invals):
        values = _wgmma_operands(jaxpr_interpret, eqn, get_invals())
        fixed = functools.partial(wgmma, source_info=eqn.source_info)
        return _call_back(self, fixed, token, **values), []

    def waiting_deref(*, token, thread, wait_n, **others):
        if wait_n is not None:
            token = wait(token=token, mesh_location=None, thread=thread, n=wait_n)
        return deref(token=token, thread=thread, wait_n=wait_n, **others)

    interpreter.interpret = interpret_with_waits
    interpreter._interpret_commit_smem_p = commit_or_wait
    interpreter._interpret_wgmma_ref_p = product
    gpu_callbacks.wgmma_accumulator_deref = waiting_deref


def _call_back(interpreter, fn, token, **values):
    """Calls fn outside of XLA, for its effect: returns the new token."""
    from jax._src import callback
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    return callback.io_callback(
        fn,
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token=token,
        mesh_location=interpreter.mesh_location,
        thread=interpreter.thread,
        **values,
    )


def _wgmma_operands(jaxpr_interpret: types.ModuleType, eqn, invals) -> dict[str, object]:
    """Returns accumulator, a and b: pairs of an allocation's key and transforms; a register array has None for them."""
    from jax._src.state import types as state_types

    values, leaves = invals[:3], invals[3:]
    empty = jax.tree.structure([])
    trees = [eqn.params[f"{name}_transforms_tree"] or empty for name in ("acc", "a", "b")]
    transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
    found = {}
    for name, var, value, transform in zip("cab", eqn.invars, values, transforms, strict=False):
        if isinstance(var.aval, state_types.AbstractRef):
            found[name] = jaxpr_interpret.resolve_ref(var.aval, value, transform)
        else:
            found[name] = (value, None)
    return found


def _clocked_wgmma(gpu_callbacks: types.ModuleType):
    """Returns what interpret mode does for a product, and for a wait until at most n are in flight."""

    def in_flight(memory, thread):
        reads = memory.__dict__.setdefault("wgmma_reads", {})
        return reads.setdefault(thread, collections.deque())

    @gpu_callbacks.fail_on_exception
    def wgmma(*, token, mesh_location, thread, c, a, b, source_info):
        memory = gpu_callbacks._get_shared_memory()
        log = gpu_callbacks.memory.GPULoggingInfo(mesh_location, thread, source_info)
        clock = _task_clock(memory, thread, None, memory.get_next_tma_thread_id())

        def locate(key, transforms):
            key = gpu_callbacks.HostAllocationKey.from_array(key)
            kept = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
            return key, memory.access(key, kept)

        def read(value, transforms):
            if transforms is None:
                return np.asarray(value).astype(before.dtype)
            where = locate(value, transforms)
            value, _, _ = memory.get_buffer_content(*where, thread, logging_info=log)
            if clock is not None:
                gpu_callbacks.get_races().check_read(
                    thread, clock.async_smem_clock, *where, source_info=source_info
                )
            return np.asarray(value).astype(before.dtype)

        total = locate(*c)
        before, _, _ = memory.get_buffer_content(*total, thread, logging_info=log)
        after = before + read(*a) @ read(*b)
        memory.store_buffer_content(*total, after, thread, logging_info=log)
        if clock is not None:
            in_flight(memory, thread).append(clock)
        return token

    @gpu_callbacks.fail_on_exception
    def wait(*, token, mesh_location, thread, n):
        memory = gpu_callbacks._get_shared_memory()
        pending = in_flight(memory, thread)
        while len(pending) > n:
            done = pending.popleft()
            with memory.lock:
                memory.clocks[thread].update(done)
        return token

    return wgmma, wait
