"""Models to compile for GPUs that are not here, experts packed in NVFP4: how much memory a device needs.

    moelab kernels fit --config=serving/packed --target=b200
    moelab kernels fit --config=serving/packed:qwen3_235b --target=b200 --devices=8
    moelab kernels fit --config=serving/packed:trillion --target=gb200 --devices=72

Shapes only: OLMoE's (arXiv:2409.02060), Qwen3-235B-A22B's (arXiv:2505.09388), and a hypothetical model with 64 layers
of 360 experts of DeepSeek-V3's size (arXiv:2412.19437), 1.01e12 expert parameters.

`moelab run --config=experiments/serving/packed.py` would train OLMoE's shape; nobody has.

Lab book: what was compiled; not yet run on hardware
  machine    2 cores AMD EPYC (AVX2), no GPU
  wall time  60 to 85 s each, on a busy machine
  result     memory of each device, below
  date       2026-11-25

  (OLMoE)     1 B200    experts 3.38 GiB at 4.500 bits a parameter, other weights 0.63 GiB, temporary 0.05 GiB
  qwen3_235b  8 B200    of each: experts 14.87 GiB, other weights 12.83 GiB, temporary 0.16 GiB
  trillion    72 GB200  of each: experts 7.38 GiB, other weights 16.50 GiB, temporary 0.24 GiB
"""

import ml_collections

PRESETS = {
    "": dict(  # OLMoE
        model=dict(num_layers=16, width=2048, num_heads=16, num_kv_heads=16, head_dim=128),
        moe=dict(num_experts=64, expert_width=1024),
    ),
    "qwen3_235b": dict(
        model=dict(num_layers=94, width=4096, num_heads=64, num_kv_heads=4, head_dim=128),
        moe=dict(num_experts=128, expert_width=1536, parallel=True, receive_factor=2.0),
    ),
    "trillion": dict(
        model=dict(num_layers=64, width=7168, num_heads=64, num_kv_heads=8, head_dim=128),
        moe=dict(num_experts=360, expert_width=2048, parallel=True, receive_factor=2.0),
    ),
}


def get_config(preset: str = "") -> ml_collections.ConfigDict:
    """Returns the fields that differ from the defaults of moelab/schema.py."""
    config = ml_collections.ConfigDict(PRESETS[preset])
    config.router = dict(kind="top_k", k=8)
    return config
