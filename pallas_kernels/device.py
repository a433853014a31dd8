"""Which accelerator a kernel is chosen for: the one that is here, or one that is assumed, to compile for it."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

import jax


@dataclasses.dataclass(frozen=True)
class Device:
    """What a choice of kernel depends on.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      name: as the maker writes it.
      capability: CUDA compute capability such as (10, 0); None where there is none.
      num_sms: streaming multiprocessors; 0 where there are none.
    """

    platform: str
    name: str
    capability: tuple[int, int] | None = None
    num_sms: int = 0

    @property
    def is_cuda(self) -> bool:
        """Whether it is an NVIDIA GPU."""
        return self.capability is not None

    @property
    def is_tcgen05(self) -> bool:
        """Whether it is a data-centre Blackwell or later: tensor memory and block-scaled FP4 `tcgen05.mma`."""
        return self.capability is not None and self.capability[0] == 10

    def __str__(self) -> str:
        if self.capability is None:
            return self.name
        return f"{self.name} (sm_{self.capability[0]}{self.capability[1]})"


CPU = Device("cpu", "cpu")

_ASSUMED: contextvars.ContextVar[Device | None] = contextvars.ContextVar("device", default=None)


def assumed() -> Device | None:
    """Returns the device of `assume`, or None outside of it."""
    return _ASSUMED.get()


def current() -> Device:
    """Returns the assumed device, or the first one that JAX has."""
    if assumed() is not None:
        return assumed()
    found = jax.devices()[0]
    if found.platform != "gpu" or "." not in str(getattr(found, "compute_capability", "")):
        return Device(found.platform, found.device_kind)
    major, minor = str(found.compute_capability).split(".")
    return Device("gpu", found.device_kind, (int(major), int(minor)), found.core_count)


@contextlib.contextmanager
def assume(device: Device) -> Iterator[None]:
    """Chooses kernels for `device` inside the context, whether it is here or not: for tracing and compiling only."""
    token = _ASSUMED.set(device)
    try:
        yield
    finally:
        _ASSUMED.reset(token)
