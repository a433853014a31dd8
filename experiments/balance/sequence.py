"""The Switch loss over each sequence (DeepSeek-V3, arXiv:2412.19437, eq. 17-20).

    moelab run --config=experiments/balance/sequence.py --workdir=runs/sequence

The coefficient is that of `switch_loss`, a hundred times the paper's, so that the scopes can be compared.

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
    config.balance = dict(switch_loss=dict(coefficient=0.01, scope="sequence"))
    return config
