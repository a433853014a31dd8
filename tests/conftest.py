"""Settings of every test: the platform, the flag that moelab sets, strict promotion; warnings are errors.

CPU, or what `make test-gpu` asks for.
"""

import os

os.environ["JAX_PLATFORMS"] = os.environ.get("MOELAB_TEST_PLATFORM", "cpu")

from moelab import environment

environment.prepare()

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
