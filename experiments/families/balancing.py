"""Balancing: none, Switch loss, z-loss, bias, quantile, over eight paired seeds, with a dense control.

    moelab run --config=experiments/families/balancing.py --workdir=runs/families_balancing
    moelab sweep --config=families/balancing --sweep=learning_rates --seeds=100-101 --jobs=2
    moelab report runs/balancing-learning_rates-seeds --split=validation
    moelab sweep --config=families/balancing --sweep=mechanisms --seeds=0-7 --jobs=2 --drop_checkpoints
    moelab baselines add runs/balancing-mechanisms-seeds --family=balancing

Without a sweep it is the reference: sigmoid scores, top-2, no balancing. A mechanism is its file in ../balance/, at 400
steps instead of 150. `switch_z_loss` has the z-loss on top of the Switch loss. The learning rate is of a grid on the
reference.

Lab book
  machine    2 cores of an AMD EPYC (AVX-512), two runs at a time, jax 0.12.0.1
  wall time  85 to 120 s a run, other work beside some of them; 48 runs in 39 minutes
  result     see ../baselines/README.md: bias, quantiles and the Switch loss cost nothing that eight seeds can show
             (detectable: 0.004 to 0.006 bits per byte) and bring MaxVio from 4.5 to 0.3, 0.2 and 1.1; with Switch loss
             and z-loss 0.005 are gained, p = 0.059 with Holm's correction; the dense control is 0.031 worse
  date       2026-11-30
"""

import ml_collections

BASE = "../ablation.py"

RATE = 1e-2  # the lowest mean of learning_rates
LENGTH = {
    "train.num_steps": 400,
    "checkpoint.every": 400,
    "evaluation.every": 400,
    "optimizer.learning_rate": RATE,
}
# arm -> file
MECHANISMS = {
    "none": "none",
    "switch_loss": "switch_loss",
    "switch_z_loss": "z_loss",
    "loss_free_bias": "loss_free_bias",
    "quantile_ema": "quantile_ema",
}


def get_config() -> ml_collections.ConfigDict:
    """Returns what differs from the base."""
    config = ml_collections.ConfigDict()
    config.router = dict(kind="top_k", k=2, score="sigmoid")
    config.optimizer = dict(learning_rate=RATE)
    config.train = dict(num_steps=400)
    config.checkpoint = dict(every=400)
    config.evaluation = dict(every=400)
    return config


def sweep_mechanisms():
    """The arms, each a file of its own, and the control."""
    for name, file in MECHANISMS.items():
        yield {"name": name, "config": f"../balance/{file}.py", **LENGTH}
    yield {"name": "dense_active", "moe.num_experts": 0, "model.dense_width": 256}


def sweep_learning_rates():
    """The published grid, on the reference."""
    for rate in (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2):
        yield {"optimizer.learning_rate": rate}
