"""A family so small that the tests run it again; its numbers mean nothing.

    moelab run --config=experiments/families/smoke.py --workdir=runs/families_smoke
    moelab sweep --config=families/smoke --sweep=arms --seeds=0-2
    moelab baselines add runs/smoke-arms-seeds --family=smoke

../tiny.py, evaluated in float32.

Lab book
  machine    2 cores of an AMD EPYC, jax 0.12.0.1; one job, both cores
  wall time  see ../baselines/README.md, which is generated from the result cards
  result     see ../baselines/README.md
  date       2026-11-29
"""

import ml_collections

BASE = "../tiny.py"


def get_config() -> ml_collections.ConfigDict:
    """Returns what differs from the base."""
    config = ml_collections.ConfigDict()
    config.train = dict(num_steps=30)
    config.evaluation = dict(precisions=("float32",), every=15)
    return config


def sweep_arms():
    """Two arms."""
    yield {"name": "top_k", "router.k": 2}
    yield {"name": "one_expert", "router.k": 1}
