"""Settings of every test: the platform, the flag that moelab sets, strict promotion; warnings are errors.

CPU, or what `make test-gpu` asks for. Most files compile without LLVM's optimisations, since compiling takes most of
the time; those in OPTIMISED, whose subject is bits and loops, and what runs in its own process compile as users do.
"""

import gc
import os
import pathlib

os.environ["JAX_PLATFORMS"] = os.environ.get("MOELAB_TEST_PLATFORM", "cpu")
# The threads of an interpreted kernel wait for one another: with one worker a core, two cores could wait for ever.
os.environ.setdefault("PJRT_NPROC", "8")

from moelab import environment

environment.prepare()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# What these test is bits, rounding or the loops that XLA makes, so they compile as users do.
OPTIMISED = (
    "formats_",
    "few_rows_",
    "expert_mlp_",
    "grouped_matmul_",
    "given_scales_",
    "reliability_",
)


@pytest.fixture(autouse=True, scope="module")
def _optimisations(request):
    """Turns LLVM's optimisations off but for those files."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, not request.module.__name__.startswith(OPTIMISED))
    yield
    jax.config.update(name, before)


# Of the 65,530 that Linux gives a process: each compiled program takes several, and without one LLVM crashes.
MOST_MAPPINGS = 15_000


@pytest.fixture(autouse=True, scope="module")
def _mappings():
    """Forgets compiled programs after a file, where there are many."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


# Files are handed out in this order, the others after them: a long one at the end would keep one core waiting.
LONG_FILES = (
    "quantized_training_test",
    "reliability_test",
    "kernels_verify_test",
    "mosaic_sm100_mlp_test",
    "calibration_test",
    "routes_test",
    "step_test",
    "quantized_model_test",
    "quality_test",
    "upcycle_test",
    "model_test",
    "cli_test",
    "quantized_gradients_test",
    "kernels_choice_test",
    "exchange_test",
    "invariance_test",
    "group_invariance_test",
)


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.module.__name__, len(place)))
