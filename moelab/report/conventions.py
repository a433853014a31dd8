"""What a coefficient of the Switch balancing loss is called elsewhere: the number to write there for the same gradient.

Here the term is  coefficient * mean over M MoE layers of  E * sum_i f_i P_i,  f_i = N_i / sum_j N_j,  averaged over the
tokens of the step: 1 at perfect balance for any k. Others do not divide the counts by k, add the layers up, or add the
micro-batches up, so that the same number means something else by a factor of k, M or the accumulation steps.

The formulas were read in each system's code (snapshots of 2025 and 2026), not run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Equivalent:
    """A coefficient in another system's convention.

    Attributes:
      system: its name.
      setting: what the number is called there.
      value: the number to write; None where it depends on more than is known here.
      formula: how it follows from this project's coefficient.
      at_balance: the unweighted loss that the system has at perfect balance, added up as it adds layers.
      caveat: what else differs.
    """

    system: str
    setting: str
    value: float | None
    formula: str
    at_balance: float
    caveat: str


def equivalent(
    coefficient: float,
    k: int,
    num_experts: int,
    num_moe_layers: int,
    accumulation_steps: int = 1,
) -> list[Equivalent]:
    """Converts a coefficient of `balance.switch_loss`, all choices counted, to five conventions.

    Args:
      coefficient: a >= 0.
      k: experts per token.
      num_experts: E; every system multiplies by it.
      num_moe_layers: M.
      accumulation_steps: A, micro-batches per optimizer step.

    Raises:
      ValueError: a number out of range.

    >>> [(row.system, row.value) for row in equivalent(0.08, k=8, num_experts=64, num_moe_layers=16)][0]
    ('Megatron-Core', 0.005)
    """
    if coefficient < 0 or not 1 <= k <= num_experts or min(num_moe_layers, accumulation_steps) < 1:
        raise ValueError(
            "wants coefficient >= 0, 1 <= k <= num_experts, num_moe_layers >= 1 and accumulation_steps >= 1; got "
            f"{coefficient}, k={k} of {num_experts}, {num_moe_layers}, {accumulation_steps}"
        )
    a, layers, steps = coefficient, num_moe_layers, accumulation_steps
    alone = steps == 1
    return [
        Equivalent(
            "Megatron-Core",
            "moe_aux_loss_coeff",
            a / layers,
            "a / M",
            float(layers),
            "Divides the counts by k. Each layer adds its loss to the gradient: a sum over layers, though the log "
            "shows their mean. Micro-batches are averaged, unless calculate_per_token_loss is set.",
        ),
        Equivalent(
            "MegaBlocks",
            "moe_loss_weight",
            a,
            "a",
            1.0,
            "Divides by k and by num_layers, which must all be MoE layers. Micro-batches are averaged if the trainer "
            "divides the loss by their number.",
        ),
        Equivalent(
            "OLMo-core",
            "lb_loss_weight",
            a,
            "a",
            1.0,
            "Divides by k. scale_loss_by_num_layers (on by default) divides by the number of layers; off, the layers "
            "are added up: write a / M. Micro-batches are weighted by their tokens, as here.",
        ),
        Equivalent(
            "MaxText",
            "load_balance_loss_weight",
            a / k if alone else None,
            "a / k" if alone else "a / k * tokens per step / A",
            float(k),
            "Not divided by k; the mean over layers. Counts and scores are those of each sequence: the same loss as "
            "balance.switch_loss.scope=sequence."
            + (
                ""
                if alone
                else " With gradient accumulation its gradient is divided by the tokens of the step, as that of a sum "
                "over tokens is; hence the factor."
            ),
        ),
        Equivalent(
            "Hugging Face",
            "router_aux_loss_coef",
            a / (k * steps),
            "a / k" if alone else "a / (k A)",
            float(k),
            "Mixtral and OLMoE: not divided by k. The tokens of all layers are concatenated before the "
            "product, so that one layer's overload can hide another's: the same loss only where all layers "
            "route alike. Counted only with output_router_logits=True."
            + ("" if alone else " Trainer adds the micro-batches' losses up."),
        ),
    ]


def of_config(config: Mapping[str, Any], num_moe_layers: int) -> list[Equivalent] | None:
    """Converts the coefficient of a run's config; None where that loss is off, counts first choices only or cannot be.

    Args:
      config: of a result card; sections may be missing.
      num_moe_layers: M.
    """
    loss = (config.get("balance") or {}).get("switch_loss") or {}
    router, experts = config.get("router") or {}, config.get("moe") or {}
    k, num_experts = router.get("k"), experts.get("num_experts")
    if not loss.get("coefficient") or loss.get("first_choice_only") or not (k and num_experts):
        return None
    steps = (config.get("train") or {}).get("accumulation_steps", 1)
    possible = loss["coefficient"] > 0 and 1 <= k <= num_experts and min(num_moe_layers, steps) >= 1
    if not possible:
        return None
    return equivalent(loss["coefficient"], k, num_experts, num_moe_layers, steps)
