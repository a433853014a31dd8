"""The hardware job: what no machine without a GPU can show. Runs in this order: layouts, numerics, timing.

    make test-gpu                                 # on a machine with an NVIDIA GPU and the extras cuda and aot

Without a GPU every test is skipped. With MOELAB_INTERPRET=1 the Mosaic kernels for Blackwell run in Pallas'
interpreter instead, which checks the tests themselves, not the kernels' layouts.
"""

from __future__ import annotations

import os

import pytest

from pallas_kernels import device
from pallas_kernels.grouped_matmul import kernels

INTERPRETED = os.environ.get("MOELAB_INTERPRET") == "1"
_BLACKWELL = device.Device("gpu", "an interpreted B200", (10, 0), 2)
_ORDER = ("layout", "numerics", "timing")


def pytest_collection_modifyitems(items):
    mine = [item for item in items if "gpu" in item.path.parts]
    for item in mine:
        item.add_marker(pytest.mark.gpu)
    rank = {
        item: next((i for i, w in enumerate(_ORDER) if w in item.path.name), 9) for item in mine
    }
    items[:] = [item for item in items if item not in rank] + sorted(mine, key=rank.get)


@pytest.fixture
def here():
    """The GPU, or a skip that says why there is none."""
    if INTERPRETED:
        import jax.experimental.pallas.mosaic_gpu as plgpu

        with device.assume(_BLACKWELL), kernels.interpreted(plgpu.InterpretGPUParams()):
            yield _BLACKWELL
        return
    found = device.current()
    if not found.is_cuda:
        pytest.skip(
            f"needs an NVIDIA GPU, this is {found}: the kernels have not yet run on hardware"
        )
    yield found


@pytest.fixture(params=list(kernels.KERNELS))
def kernel(request, here):
    """Each kernel that runs here."""
    chosen = kernels.KERNELS[request.param]
    reason = chosen.wrong_device(here)
    if INTERPRETED and not chosen.name.startswith("mosaic"):
        reason = reason or f"{chosen} is no Mosaic kernel"
    if reason:
        pytest.skip(reason)
    return chosen
