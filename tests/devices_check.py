"""Run by invariance_test in a process with 8 virtual devices: steps on 1, 2 and 8, accumulated and not."""

import jax
from small_step import BALANCE, assert_same_steps, small_config, two_steps

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def steps(num_devices, accumulation_steps=1, **fields):
    config = small_config(batch_size=16, balance=BALANCE, **fields)
    return two_steps(config, accumulation_steps, num_devices)


whole = steps(1)
assert_same_steps(whole, steps(2))
assert_same_steps(whole, steps(8, accumulation_steps=2))
# What `auto` picks runs inside shard_map as well.
assert_same_steps(whole, steps(8, implementation="auto"))
# Each device has two experts of eight, and rows travel.
eight = dict(num_experts=8)
assert_same_steps(steps(1, moe=eight), steps(4, moe=eight | dict(parallel=True)))
print("equal on 1, 2 and 8 devices")
