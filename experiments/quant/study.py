"""Does 4-bit keep the quality? A MoE and the dense model of equal active parameters, by every recipe.

    moelab run --config=experiments/quant/study.py --workdir=runs/quant/moe
    moelab run --config=experiments/quant/study.py:moe_nvfp4_qat --workdir=runs/quant/moe_nvfp4_qat \
        --config.train.start_from=runs/quant/moe
    python bench/quant_study.py run            # all of it, three seeds

Without a preset it is the MoE: ablation.py with the Switch loss; `dense` has one expert of twice the width, so that
both run through the same code. What ends in `_more`, `_qat` or `_qad` goes on from a finished run for 60 steps at a
fifth of the learning rate: `_more` in high precision, the control; `_qat` with fake quantization of weights and
activations; `_qad` likewise, but towards the high-precision model's output distribution (set quantization.teacher to
the same run) and at a tenth of that rate: at the full one the divergence in training grew, on the one seed that was
tried. `_training` starts from nothing with quantized gradients.

Lab book
  machine    2 cores of an AMD EPYC (AVX-512), 24 GiB, jax 0.12.0.1
  wall time  see experiments/README.md
  result     see experiments/README.md, which is generated from the result cards
  date       2026-11-24, schema 1
"""

import ml_collections

BASE = "../ablation.py"

MODELS = {
    "moe": {"router": {"k": 2}, "balance": {"switch_loss": {"coefficient": 0.01}}},
    "dense": {"moe": {"num_experts": 1, "expert_width": 256}, "router": {"k": 1}},
}
CONTINUED = {
    "train": {"num_steps": 60},
    "optimizer": {"learning_rate": 1e-3},
    "schedule": {"warmup_steps": 5, "decay_share": 0.5},
    "checkpoint": {"every": 60},
}
FORMATS = ("mxfp4", "nvfp4")
POST_TRAINING = (
    *("float32", "bf16", "fp8_w", "fp8_wa", "fp8_block_wa", "mxfp8_w", "mxfp8_wa"),
    *("mxfp4_w", "mxfp4_wa", "mxfp4_floor_w", "mxfp4_floor_wa", "mxfp4_even_w", "mxfp4_even_wa"),
    *("mxfp4_ceil_w", "mxfp4_ceil_wa", "nvfp4_w", "nvfp4_wa", "nvfp4_46_w", "nvfp4_46_wa"),
    *("int4_w", "mxfp8_kv", "mxfp4_kv", "nvfp4_kv"),
)


def _evaluated(*formats):
    return {
        "evaluation": {
            "precisions": ("float32", *(f"{f}_{x}" for f in formats for x in ("w", "wa")))
        }
    }


def _quantized(recipe):
    return {"quantization": {"recipe": recipe}}


METHODS = {
    "": {"evaluation": {"precisions": POST_TRAINING}},
    "_more": CONTINUED | _evaluated(*FORMATS),
    "_nvfp4_training": _quantized("nvfp4_training") | _evaluated("nvfp4"),
    "_fp8_block": _quantized("fp8_block") | _evaluated("fp8_block"),
}
for _format in FORMATS:
    _changes = CONTINUED | _quantized(f"{_format}_qat") | _evaluated(_format)
    _slower = {"optimizer": {"learning_rate": 1e-4}}
    METHODS |= {f"_{_format}_qat": _changes, f"_{_format}_qad": _changes | _slower}

PRESETS = {
    "": {},
    "moe_more": {},
    "moe_nvfp4_qat": {},
    "moe_mxfp4_qat": {},
    "moe_nvfp4_qad": {},
    "moe_mxfp4_qad": {},
    "moe_nvfp4_training": {},
    "moe_fp8_block": {},
    "dense": {},
    "dense_more": {},
    "dense_nvfp4_qat": {},
    "dense_mxfp4_qat": {},
    "dense_nvfp4_qad": {},
    "dense_mxfp4_qad": {},
    "dense_nvfp4_training": {},
    "dense_fp8_block": {},
}


def get_config(preset: str = "") -> ml_collections.ConfigDict:
    """Returns what differs from the base."""
    config = ml_collections.ConfigDict()
    model, _, method = (preset or "moe").partition("_")
    for changes in (MODELS[model], METHODS[f"_{method}" if method else ""]):
        for section, fields in changes.items():
            if section not in config:
                config[section] = ml_collections.ConfigDict()
            config[section].update(fields)
    return config
