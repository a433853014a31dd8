"""Quantization: what training for four bits gives, over five paired seeds, for a MoE and its dense control.

    moelab run --config=experiments/families/quantization.py --workdir=runs/families_quantization
    moelab sweep --config=families/quantization --sweep=learning_rates --seeds=100-101 --jobs=2
    moelab report runs/quantization-learning_rates-seeds --split=validation
    moelab sweep --config=families/quantization --sweep=models,recipes --seeds=0-4 --jobs=2 --drop_checkpoints
    moelab baselines add runs/quantization-models-recipes-seeds --family=quantization

Without a sweep it is the MoE in float32: ../ablation.py with the Switch loss at 400 steps. Quantization-aware training
begins at step 250, so that an arm and its control are one run until then and see the same data after; FP4 training is
quantized from the first step. Every arm is evaluated in float32, NVFP4 and MXFP4, weights alone and with activations.
The dense control has one expert of twice the width, so that both run through the same code. The learning rate is the
one tuned for routing.py: its reference is this one. For NVFP4 QAT of the MoE it was tuned as well.

Lab book
  machine    2 cores of an AMD EPYC (AVX-512), two runs at a time, jax 0.12.0.1
  wall time  75 to 85 s of training a run, NVFP4 training 110 to 140 s, and 15 to 25 s of evaluation
  result     at this size there is nothing to give back: rounding a MoE trained in float32 to NVFP4 takes 0.0016
             [0.0012, 0.0020] bits per byte, to MXFP4 0.0036 [0.0029, 0.0044], 0.0021 [0.0012, 0.0029] more (dense
             control 0.0041 [0.0034, 0.0048] more); QAT against that -0.0006 [-0.0017, +0.0005] and -0.0005 [-0.0012,
             +0.0003], none. For the dense control NVFP4 QAT is worse than rounding, +0.0015 [+0.0008, +0.0022], Holm
             p 0.006. NVFP4 training +0.0051 [-0.0074, +0.0175] (MoE), +0.0075 [+0.0006, +0.0143] (dense). In NVFP4
             as in float32 the MoE is below its dense control, 2.1040 against 2.1197
  date       2026-11-30
"""

import ml_collections

BASE = "../ablation.py"


def get_config() -> ml_collections.ConfigDict:
    """Returns what differs from the base."""
    config = ml_collections.ConfigDict()
    config.router = dict(kind="top_k", k=2)
    config.balance = dict(switch_loss=dict(coefficient=0.01))
    config.optimizer = dict(learning_rate=1e-2)
    config.train = dict(num_steps=400)
    config.checkpoint = dict(every=400)
    config.evaluation = dict(
        every=400, precisions=("float32", "nvfp4_w", "nvfp4_wa", "mxfp4_w", "mxfp4_wa")
    )
    return config


def sweep_models():
    """The sparse model and the dense one of equal active parameters."""
    yield {"name": "moe", "router.k": 2}
    yield {
        "name": "dense",
        "moe.num_experts": 1,
        "moe.expert_width": 256,
        "router.k": 1,
        "balance.switch_loss.coefficient": 0.0,
    }


def sweep_recipes():
    """How they are trained."""
    yield {"name": "float32", "quantization.recipe": "none"}
    for format in ("nvfp4", "mxfp4"):
        recipe = f"{format}_qat"
        yield {"name": recipe, "quantization.recipe": recipe, "quantization.start_step": 250}
    yield {"name": "nvfp4_training", "quantization.recipe": "nvfp4_training"}


def sweep_learning_rates():
    """The published grid without its lower end, on quantization-aware training of the MoE in NVFP4."""
    for rate in (2.5e-3, 5e-3, 1e-2, 2e-2):
        yield {
            "name": f"nvfp4_qat,learning_rate={rate}",
            "optimizer.learning_rate": rate,
            "quantization.recipe": "nvfp4_qat",
            "quantization.start_step": 250,
        }
