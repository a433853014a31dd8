"""Another run's model in this run: the teacher of a distillation, or what the training starts from."""

from __future__ import annotations

from typing import NamedTuple

import jax

from moelab import checkpoint, evaluate, parallel
from moelab import model as model_lib
from moelab.errors import ConfigError


class Teacher(NamedTuple):
    """The high-precision model that is distilled, its variables, and where it comes from."""

    model: model_lib.Transformer
    variables: dict
    detail: dict


def load(config, dataset, mesh) -> Teacher | None:
    """Loads the model that a config distils."""
    run = config.quantization.teacher
    if not run:
        return None
    loaded = load_other(run, dataset)
    model = model_lib.from_dataset(loaded.config, dataset, mesh)
    variables = {"params": loaded.state.params, "router_state": loaded.state.router_state}
    detail = {"run": run, "step": loaded.step, "digest": checkpoint.state_digest(loaded.state)}
    return Teacher(model, jax.device_put(variables, parallel.replicated(mesh)), detail)


def load_other(run: str, dataset) -> evaluate.Loaded:
    """Another run's last state, which must know the same tokens."""
    loaded = evaluate.load_run(run)
    if loaded.dataset.tokenizer.sha256 != dataset.tokenizer.sha256:
        raise ConfigError(f"{run} was trained with another tokenizer")
    return loaded
