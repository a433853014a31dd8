"""The small model that the files in `routing/` and `balance/` change in one respect each.

    moelab run --config=experiments/ablation.py --workdir=runs/ablation

4 layers of width 128, 16 experts of width 128 of which a token passes 2, float32, AdamW, the five-domain corpus. Small
enough that three seeds of forty methods fit an afternoon on two cores; that is a twentieth of an epoch, so that slow
controllers have little time to act. No balancing: this is the control of `balance/`.

Lab book
  machine    2 cores of an AMD EPYC (AVX2), 24 GiB, jax 0.12.0.1
  wall time  see experiments/README.md
  result     see experiments/README.md, which is generated from the result cards
  date       2026-11-23, schema 1
"""

import ml_collections

# The files of routing/ and balance/, each folder's reference first.
ROUTING = (
    "top_k",
    "base",
    "batch_priority",
    "coarse",
    "cosine",
    "expert_choice",
    "fine_grained",
    "group_limited_max",
    "group_limited_sum",
    "gshard",
    "hash_balanced",
    "hash_random",
    "noisy_top_k",
    "olmoe",
    "oracle",
    "remoe",
    "select_then_softmax",
    "shared_expert",
    "sigmoid_bias",
    "sinkhorn",
    "soft_moe",
    "sqrt_softplus",
    "switch",
    "top_p",
    "uniform",
    "zero_computation",
)
BALANCE = (
    "switch_loss",
    "adaptive",
    "capacity_100",
    "capacity_125",
    "capacity_200",
    "global_batch",
    "importance",
    "loss_free_bias",
    "micro_batch",
    "mutual_information",
    "none",
    "quantile_ema",
    "quantile_exact",
    "quantile_histogram",
    "quantile_local",
    "sequence",
    "z_loss",
)


def get_config() -> ml_collections.ConfigDict:
    """Returns the fields that differ from the defaults of moelab/schema.py."""
    config = ml_collections.ConfigDict()
    config.model = dict(
        num_layers=4, width=128, num_heads=4, num_kv_heads=2, head_dim=32, tied_head=False
    )
    config.moe = dict(num_experts=16, expert_width=128)
    config.optimizer = dict(kind="adamw", learning_rate=5e-3)
    config.schedule = dict(kind="warmup_stable_decay", warmup_steps=10, decay_share=0.4)
    config.train = dict(num_steps=150, batch_size=16, length=128)
    config.evaluation = dict(tokens_per_domain=8192, batch_size=32, precisions=("float32",))
    config.checkpoint = dict(every=150)
    return config


def sweep_routing():
    """Every file of routing/."""
    for name in ROUTING:
        yield {"name": f"routing/{name}", "config": f"routing/{name}"}


def sweep_balance():
    """Every file of balance/."""
    for name in BALANCE:
        yield {"name": f"balance/{name}", "config": f"balance/{name}"}
