"""Routing, eight methods over five paired seeds, with controls.

    moelab run --config=experiments/families/routing.py --workdir=runs/families_routing
    moelab sweep --config=families/routing --sweep=learning_rates --seeds=100-101 --jobs=2
    moelab report runs/routing-learning_rates-seeds --split=validation
    moelab sweep --config=families/routing --sweep=methods --seeds=0-4 --jobs=2 --drop_checkpoints
    moelab baselines add runs/routing-methods-seeds --family=routing

Without a sweep it is the reference, softmax top-2 with the Switch loss. A method is its file in ../routing/, at 400
steps instead of 150 (0.82 M tokens, a seventh of an epoch). Equal active parameters unless a file says otherwise;
`sigmoid_switch_loss` tells what of `sigmoid_bias` is the score's: it has the score and the reference's loss.
`dense_active` has one feed-forward of the width of two experts, `dense_total` one of all sixteen. The learning rate is
tuned once, on the reference, with other seeds and on the validation split (`learning_rates`); the headline contrasts
have `learning_rates_sigmoid_bias` and `learning_rates_dense` too.

Lab book
  machine    2 cores of an AMD EPYC (AVX-512), two runs at a time, jax 0.12.0.1
  wall time  75 to 120 s a run (dense_total 210 s), of which 64 to 104 s are training; 50 runs in 46 minutes, and those
             of sigmoid_switch_loss are the balancing family's. The first grid took 142 s a run, before a step took two
             thirds of the time
  result     see ../baselines/README.md: fine-grained experts are better than softmax top-2 with the Switch loss by
             0.019 bits per byte, sigmoid scores with the loss-free bias by 0.017, hashing and ReMoE worse, all with
             Holm's correction; top-1 is worse by 0.015 without it. The bias is not what gains: sigmoid scores with the
             Switch loss gain as much, and against them the bias is -0.0002 [-0.0042, +0.0039]. The dense models of
             equal active and of equal total parameters are 0.013 and 0.014 worse, which five seeds do not settle; the
             larger has the learning rate of the smaller
  date       2026-11-30
"""

import ml_collections

BASE = "../ablation.py"

RATE = 1e-2  # the lowest mean of learning_rates, and of the grids of both headline contrasts
LENGTH = {
    "train.num_steps": 400,
    "checkpoint.every": 400,
    "evaluation.every": 400,
    "optimizer.learning_rate": RATE,
}
RATES = (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2)
METHODS = (
    "top_k",
    "sigmoid_bias",
    "switch",
    "expert_choice",  # sees later tokens: apart
    "hash_balanced",
    "remoe",
    "fine_grained",
    "zero_computation",
)
DENSE = {"moe.num_experts": 0}


def get_config() -> ml_collections.ConfigDict:
    """Returns what differs from the base."""
    config = ml_collections.ConfigDict()
    config.router = dict(kind="top_k", k=2)
    config.balance = dict(switch_loss=dict(coefficient=0.01))
    config.optimizer = dict(learning_rate=RATE)
    config.train = dict(num_steps=400)
    config.checkpoint = dict(every=400)
    config.evaluation = dict(every=400)
    return config


def sweep_methods():
    """The arms, each a file of its own, and the controls."""
    for name in METHODS:
        yield {"name": name, "config": f"../routing/{name}.py", **LENGTH}
    yield {"name": "sigmoid_switch_loss", "config": "../balance/switch_loss.py", **LENGTH}
    yield {"name": "dense_active", **DENSE, "model.dense_width": 256}
    yield {"name": "dense_total", **DENSE, "model.dense_width": 2048}


def sweep_learning_rates():
    """The published grid, on the reference."""
    for rate in RATES:
        yield {"optimizer.learning_rate": rate}


def sweep_learning_rates_sigmoid_bias():
    """The grid of a headline contrast."""
    for rate in RATES:
        yield {
            "config": "../routing/sigmoid_bias.py",
            "name": f"sigmoid_bias,learning_rate={rate}",
            **LENGTH,
            "optimizer.learning_rate": rate,
        }


def sweep_learning_rates_dense():
    """The grid of the dense control of equal active parameters."""
    for rate in RATES:
        yield {"optimizer.learning_rate": rate, **DENSE, "model.dense_width": 256}
