"""Quantization: what training for four bits gives, over five paired seeds, for a MoE and its dense control.

    moelab run --config=experiments/families/quantization.py --workdir=runs/families_quantization
    moelab sweep --config=families/quantization --sweep=models,recipes --seeds=0-4 --jobs=2 --drop_checkpoints
    moelab baselines add runs/quantization-models-recipes-seeds --family=quantization

Without a sweep it is the MoE in float32: ../ablation.py with the Switch loss at 400 steps. Quantization-aware training
begins at step 250, so that an arm and its control are one run until then and see the same data after; FP4 training is
quantized from the first step. Every arm is evaluated in float32, NVFP4 and MXFP4, weights alone and with activations.
The dense control has one expert of twice the width, so that both run through the same code. The learning rate is the
one tuned for routing.py: its reference is this one.

Lab book
  machine    2 cores of an AMD EPYC (AVX-512), two runs at a time, jax 0.12.0.1
  wall time  85 to 115 s a run, NVFP4 training 160 to 180 s
  result     two of the five seeds, see ../baselines/README.md: too few for a sentence
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
