"""The Switch loss over micro-batches of four sequences.

    moelab run --config=experiments/balance/micro_batch.py --workdir=runs/micro_batch

The counterpart of `global_batch`: the same steps, cut the same way.

Lab book
  machine    2 cores of an AMD EPYC (AVX2), 24 GiB, jax 0.12.0.1
  wall time  see experiments/README.md
  result     see experiments/README.md, which is generated from the result cards
  date       2026-11-23, schema 1
"""

import ml_collections

BASE = "../ablation.py"


def get_config() -> ml_collections.ConfigDict:
    """Returns what differs from the base."""
    config = ml_collections.ConfigDict()
    config.router = dict(kind="top_k", k=2, score="sigmoid")
    config.train = dict(accumulation_steps=4)
    config.balance = dict(switch_loss=dict(coefficient=0.01))
    return config
