"""Expert choice: each expert takes its best tokens (arXiv:2202.09368).

    moelab run --config=experiments/routing/expert_choice.py --workdir=runs/expert_choice

Not causal: experts see the whole batch, so its loss is not comparable.

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
    config.router = dict(kind="expert_choice", k=2)
    return config
