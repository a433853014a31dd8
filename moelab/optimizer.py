"""Optimizers and schedules from optax, with rules by path for what is decayed and what is orthogonalised."""

from __future__ import annotations

import jax
import optax
from optax import contrib

# Matrices of these names are weights proper: decayed, and orthogonalised by Muon. The rest (embedding, head, norms,
# router) is neither. Rank says nothing here, since scan stacks a leading axis of layers.
MATRICES = ("query", "key", "value", "output", "gate_up", "down")


def is_matrix(path: tuple) -> bool:
    """Whether a parameter's path ends in one of MATRICES."""
    return path[-1].key in MATRICES


def _by_path(tree, function):
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(path), tree)


def schedule(config, peak: float) -> optax.Schedule:
    """Returns the learning rate as a function of the optimizer's updates so far."""
    s, steps = config.schedule, config.train.num_steps
    warmup = optax.linear_schedule(0.0, peak, s.warmup_steps)
    if s.kind == "warmup_cosine":
        rest = max(1, steps - s.warmup_steps)
        later = optax.cosine_decay_schedule(peak, rest, s.final_scale)
        return optax.join_schedules([warmup, later], [s.warmup_steps])
    decay_steps = max(1, round(s.decay_share * steps))
    decay = optax.linear_schedule(peak, peak * s.final_scale, decay_steps)
    bounds = [s.warmup_steps, max(s.warmup_steps, steps - decay_steps)]
    return optax.join_schedules([warmup, optax.constant_schedule(peak), decay], bounds)


def make(config, params) -> optax.GradientTransformation:
    """Builds the optimizer of a config for a tree of parameters (or their shapes).

    Args:
      config: a full config; `config.optimizer.kind` picks.
      params: the parameter tree; only its structure is read.
    """
    o = config.optimizer
    matrices = _by_path(params, is_matrix)
    if o.kind == "adamw":
        return optax.adamw(
            schedule(config, o.learning_rate),
            b1=o.b1,
            b2=o.b2,
            eps=o.epsilon,
            weight_decay=o.weight_decay,
            mask=matrices,
        )
    # Weights are [..., out, in]: the last axis is contracted, the one before is the output, the others are a batch of
    # matrices. Leaves that are not matrices get None and go to AdamW.
    numbers = contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
    return contrib.muon(
        schedule(config, o.learning_rate),
        ns_steps=o.newton_schulz_steps,
        beta=o.beta,
        nesterov=o.nesterov,
        weight_decay=o.weight_decay,
        adam_b1=o.adam_b1,
        adam_b2=o.adam_b2,
        eps=o.epsilon,
        adam_learning_rate=schedule(config, o.adam_learning_rate),
        muon_weight_dimension_numbers=_by_path(
            params, lambda path: numbers if is_matrix(path) else None
        ),
    )
