"""Runs Triton kernels in Triton's interpreter, in a process of its own: TRITON_INTERPRET is read at the import.

    python -m tests.triton_interpreted triton_w4a16 OUT.npz

writes every result of a family's cases, and of those of its mutants, to OUT.npz; the tests judge them. PyTorch is not
needed: a numpy array with guards around it stands in for a tensor, so that a kernel that writes out of bounds is found
and one that reads there gets NaN.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"

import importlib  # noqa: E402
import sys  # noqa: E402

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from pallas_kernels.grouped_matmul import triton_launch  # noqa: E402

GUARD = 1 << 16  # bytes on either side
_TYPES = {
    "bfloat16": tl.bfloat16,
    "float16": tl.float16,
    "float32": tl.float32,
    "int32": tl.int32,
    "uint8": tl.uint8,
}


def _patch_once() -> None:
    """Has the interpreter patch the language once a module, not in each call of a device function: twice as fast."""
    patched = set()

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


class _Storage:
    """The bytes of an array between two guards of 0xff: NaN in every float format, and no sensible index."""

    def __init__(self, array: np.ndarray):
        self.size = array.nbytes
        self.bytes = np.full(self.size + 2 * GUARD, 0xFF, np.uint8)
        self.inside[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    @property
    def inside(self) -> np.ndarray:
        return self.bytes[GUARD : GUARD + self.size]

    def data_ptr(self) -> int:
        return self.bytes.ctypes.data + GUARD

    def cpu(self) -> "_Storage":
        return _Storage(self.inside)

    def copy_(self, other: "_Storage") -> None:
        outside = (other.bytes[:GUARD], other.bytes[GUARD + other.size :])
        if any((guard != 0xFF).any() for guard in outside):
            raise IndexError("the kernel wrote out of bounds")
        self.inside[:] = other.inside


class Tensor:
    """As much of `torch.Tensor` as the interpreter asks for."""

    def __init__(self, array: np.ndarray):
        self.dtype = _TYPES[array.dtype.name]
        self.storage = _Storage(array)

    def untyped_storage(self) -> _Storage:
        return self.storage

    def data_ptr(self) -> int:
        return self.storage.data_ptr()

    def new_empty(self, size: int, device: str) -> "Tensor":
        other = object.__new__(Tensor)
        other.dtype = self.dtype
        return other

    def set_(self, storage: _Storage, offset: int, size: object, stride: object) -> None:
        self.storage = storage

    def storage_offset(self) -> int:
        return 0

    def size(self) -> None:
        return None

    def stride(self) -> None:
        return None

    def numpy(self, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        return self.storage.inside.view(dtype).reshape(shape)


def interpret(kernel, call: triton_launch.Call) -> np.ndarray:
    """Runs one launch; what the kernel leaves unwritten is NaN."""
    operands = [
        None if array is None else Tensor(np.asarray(array)) for array in call.operands.values()
    ]
    unwritten = np.full(call.out.shape, -1, np.dtype(f"i{call.out.dtype.itemsize}"))
    y = Tensor(unwritten.view(call.out.dtype))
    kernel[(call.programs,)](*operands, y, **call.constants, INTERPRET=True)
    return y.numpy(call.out.dtype, call.out.shape)


def interpret_or_fail(kernel, call: triton_launch.Call) -> np.ndarray:
    """Likewise; NaN everywhere where a (mutated) kernel raises."""
    try:
        return interpret(kernel, call)
    except Exception as error:
        print(f"raised: {error!r}", file=sys.stderr)
        return np.full(call.out.shape, np.nan, call.out.dtype)


def main(family: str, path: str) -> None:
    """Runs what tests/<family>_test.py wants and stores it as float32."""
    _patch_once()
    jobs = importlib.import_module(f"tests.{family}_jobs")
    found = {}
    for name, array in jobs.results(interpret, interpret_or_fail, Tensor):
        found[name] = np.asarray(jnp.asarray(array).astype(jnp.float32))
    np.savez(path, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
