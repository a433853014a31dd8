"""Safetensors files of numpy arrays, bfloat16 and the 8-bit floats included."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from moelab.errors import UserError

# What a file's header calls a dtype. safetensors writes all of these, but reads those of numpy alone.
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorFileError(UserError):
    """A file that cannot be written or read; the message names it."""


def save(
    path: str | Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes arrays to a safetensors file, by an atomic replacement.

    Args:
      path: of the file.
      arrays: by name; dtypes of DTYPES.
      metadata: text for the header.

    Raises:
      TensorFileError: an array of another dtype.
    """
    path = Path(path)
    for name, array in arrays.items():
        if array.dtype not in _NAMES:
            allowed = ", ".join(map(str, _NAMES))
            raise TensorFileError(f"{path}: {name} is {array.dtype}; a file holds {allowed}")
    # Not ascontiguousarray, which makes a vector of a scalar.
    dense = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    temporary = path.with_name(path.name + ".tmp")
    safetensors.numpy.save_file(dense, temporary, dict(metadata or {}))
    os.replace(temporary, path)


def load(path: str | Path) -> dict[str, np.ndarray]:
    """Reads all arrays of a safetensors file, with safetensors' own parser.

    Raises:
      TensorFileError: no such file, a damaged one, or a dtype that is not in DTYPES.
    """
    path = Path(path)
    try:
        tensors = safetensors.deserialize(path.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise TensorFileError(f"{path} cannot be read: {error}") from None
    return {name: _array(path, name, tensor) for name, tensor in tensors}


def _array(path: Path, name: str, tensor: dict) -> np.ndarray:
    if tensor["dtype"] not in DTYPES:
        raise TensorFileError(
            f"{path}: {name} has dtype {tensor['dtype']}; known are {', '.join(DTYPES)}"
        )
    dtype = DTYPES[tensor["dtype"]]
    return np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
