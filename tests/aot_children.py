"""What tests run in a compiler's process of its own (`aot.in_process`)."""

import dataclasses
import os
import time

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.verify import expect, runner
from pallas_kernels.verify.case import Case

ROWS, COLUMNS = 64, 256


def die(target, arguments):
    """Yields once, then ends the process as LLVM does."""
    yield {"target": target.name, "arguments": arguments}
    print("about to end", flush=True)  # not a result
    os.abort()


def hang(target, arguments):
    """Yields nothing for long."""
    time.sleep(60)
    yield from ()


def _halve(x, change=lambda x: x * jnp.bfloat16(0.5)):
    """Changes numbers on their way through shared memory: a kernel as small as they get."""

    def kernel(x_gmem, out_gmem, x_smem, out_smem, barrier):
        plgpu.copy_gmem_to_smem(x_gmem, x_smem, barrier)
        plgpu.barrier_wait(barrier)
        out_smem[...] = change(x_smem[...])
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_gmem)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, jnp.bfloat16),
        scratch_types=[
            plgpu.SMEM(x.shape, jnp.bfloat16),
            plgpu.SMEM(x.shape, jnp.bfloat16),
            plgpu.Barrier(),
        ],
        kernel_name="halve",
    )(x)


def as_they_are(packed):
    """uint8 as bfloat16 in pairs of bytes: a bitcast."""
    return _halve(lax.bitcast_convert_type(packed, jnp.bfloat16))


def unpacked(packed):
    """The same, but XLA touches every byte first."""
    return _halve(lax.bitcast_convert_type(packed ^ jnp.uint8(1), jnp.bfloat16))


def spilling(packed):
    """The same, but each thread holds 384 numbers."""

    def change(x):
        x = x.astype(jnp.float32)
        scaled = [x * jnp.float32(i) for i in range(1, 4)]
        total = sum(jnp.sum(s * s) for s in scaled)
        return sum(s * total for s in scaled).astype(jnp.bfloat16)

    return _halve(lax.bitcast_convert_type(packed, jnp.bfloat16), change)


def controls(target, names):
    """Checks programs of this file, as `moelab kernels verify` does."""
    shape = jax.ShapeDtypeStruct((ROWS, COLUMNS, 2), jnp.uint8)
    for name in names:
        case = Case(
            name=name,
            format="bytes",
            runs_on=lambda target: True,
            build=lambda _, name=name: (globals()[name], (shape,)),
            expectations=(
                expect.num_kernels(1),
                expect.packed_as_they_are(),
                expect.no_mma(),
                expect.instructions(expect.TMA_LOAD, at_most=1),
                expect.no_spills,
                expect.within_limits,
            ),
        )
        yield dataclasses.asdict(runner.check(target, "test", case))
