"""Settings of every test: CPU with the flag that moelab itself sets, strict promotion, warnings are errors."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

from moelab import environment

environment.prepare()

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
