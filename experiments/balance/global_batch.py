"""The Switch loss over the global batch (arXiv:2501.11873).

    moelab run --config=experiments/balance/global_batch.py --workdir=runs/global_batch

Four micro-batches of four sequences, counted first; compare with `micro_batch`.

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
    config.balance = dict(switch_loss=dict(coefficient=0.01, scope="global_batch"))
    return config
