"""Checks config.quantization: names, roles that the model has, widths that the blocks divide, what goes together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ml_collections

from moelab.quant import precisions, recipes
from pallas_kernels.formats import FORMATS

SECTION = "quantization"


def problems(config: ml_collections.ConfigDict) -> Iterator[tuple[str, str]]:
    """Yields (path, message) of everything that is wrong with the section."""
    q = config.quantization
    try:
        recipe = recipes.named(q.recipe, q.format, tuple(q.roles), q.activation_scale)
    except ValueError as error:
        yield f"{SECTION}.{_field(str(error))}", str(error)
        return
    yield from _numbers(q, config.train.num_steps)
    unknown = list(_formats(q))
    yield from unknown or _roles(config, recipe)
    yield from _other_runs(config)
    yield from _oscillation(config, recipe)


def _field(message: str) -> str:
    for name, words in (("format", "4-bit format"), ("activation_scale", "activation_scale")):
        if words in message:
            return name
    return "recipe" if "unknown recipe" in message else "roles"


def _numbers(q: ml_collections.ConfigDict, num_steps: int) -> Iterator[tuple[str, str]]:
    least = dict.fromkeys(
        ("start_step", "end_step", "first_layers", "last_layers", "flip_every"), 0
    ) | dict.fromkeys(("reset_every", "reset_start"), 0)
    for name, bound in (least | {"reset_window": 1}).items():
        if q[name] < bound:
            yield f"{SECTION}.{name}", f"must be at least {bound}, got {q[name]}"
    if 0 < q.end_step <= q.start_step:
        message = f"must be 0 or more than quantization.start_step={q.start_step}, got {q.end_step}"
        yield f"{SECTION}.end_step", message
    if q.start_step and q.start_step >= num_steps:
        message = f"must be less than train.num_steps={num_steps}, got {q.start_step}"
        yield f"{SECTION}.start_step", message
    if not 0 <= q.teacher_share <= 1:
        yield f"{SECTION}.teacher_share", f"must be between 0 and 1, got {q.teacher_share}"
    if not q.temperature > 0:
        yield f"{SECTION}.temperature", f"must be greater than 0, got {q.temperature}"
    if not q.reset_ratio > 0:
        yield f"{SECTION}.reset_ratio", f"must be greater than 0, got {q.reset_ratio}"
    if q.activation_scale == "static":
        yield f"{SECTION}.activation_scale", "must not be static: nothing is calibrated in training"
    if q.reset_every and q.reset_window > q.reset_every:
        message = f"must be at most quantization.reset_every={q.reset_every}, got {q.reset_window}"
        yield f"{SECTION}.reset_window", message


def _formats(q: ml_collections.ConfigDict) -> Iterator[tuple[str, str]]:
    for change in q.roles:
        _, _, format = recipes.split_role(change)
        if format is not None and format not in FORMATS:
            allowed = ", ".join(FORMATS)
            yield f"{SECTION}.roles", f"has no format {format!r} ({change}); there are {allowed}"


def _roles(config: ml_collections.ConfigDict, recipe: recipes.Recipe) -> Iterator[tuple[str, str]]:
    widths = _widths(config)
    for change in config.quantization.roles:
        role, _, format = recipes.split_role(change)
        if format is not None and not widths[role]:
            yield f"{SECTION}.roles", f"names {role}, which this model does not have ({change})"
    if recipe.quantizes and not any(
        widths[role] and getattr(recipe, role) != recipes.PLAIN for role in recipes.ROLES
    ):
        yield f"{SECTION}.recipe", f"{recipe.name} quantizes nothing that this model has"
    for role, names in widths.items():
        formats = getattr(recipe, role)
        if not names or formats == recipes.PLAIN:
            continue
        yield from _one_row(role, formats)
        try:
            precisions.matmul(recipe, formats, routed=role in recipes.EXPERT_ROLES)
        except ValueError as error:
            yield f"{SECTION}.roles", f"{role}: {error}"
        for path, width, parts in names:
            for part in parts:
                format = getattr(formats, part)
                yield from _divides(role, part, format, path, width)


def _one_row(role: str, formats: recipes.Formats) -> Iterator[tuple[str, str]]:
    """Formats whose scales span rows mix tokens, or ids: only matrices of feed-forwards and projections have them."""
    parts = ["activation", "gradient"]
    if role in ("router", "embedding", "head"):
        parts.append("weight")
    for part in parts:
        format = getattr(formats, part)
        if format in FORMATS and (FORMATS[format].block_rows > 1):
            yield (
                f"{SECTION}.roles",
                f"{role}.{part}={format} shares scales between rows; choose a 1D format",
            )


def _divides(role, part, format, path, width) -> Iterator[tuple[str, str]]:
    spec = FORMATS[format] if format in FORMATS else None
    if spec is None or spec.block is None or spec.partial or width % spec.block == 0:
        return
    yield (
        path,
        f"must be a multiple of {spec.block} for {role}.{part}={format} "
        f"(quantization.recipe), got {width}",
    )


def _widths(config: ml_collections.ConfigDict) -> dict[str, list[tuple[str, int, tuple]]]:
    """The (field, width, parts) that blocks of each role run along; empty: the model has no such role."""
    m, moe = config.model, config.moe
    inputs, both = ("weight", "activation"), ("weight", "activation", "gradient")
    sparse = moe.num_experts > 0
    every_layer = sparse and not moe.num_dense_layers and moe.every == 1
    width, expert = ("model.width", m.width), ("moe.expert_width", moe.expert_width)
    heads = ("model.head_dim", m.num_heads * m.head_dim)
    keys = ("model.head_dim", m.num_kv_heads * m.head_dim)
    # Gradients, and 1x16 weights in the input gradient, have blocks along the output axis: gate and up 2F, down D.
    feed = [(*width, both), (*expert, both)]
    return {
        "expert_gate_up": [(*width, inputs), (*expert, ("weight", "gradient"))] if sparse else [],
        "expert_down": [(*expert, inputs), (*width, ("weight", "gradient"))] if sparse else [],
        "shared_experts": feed if sparse and moe.num_shared_experts else [],
        "dense_mlp": []
        if every_layer
        else [(*width, both), ("model.dense_width", m.dense_width, both)],
        "attention": [(*width, both), (*heads, both), (*keys, ("weight", "gradient"))],
        "router": [(*width, inputs)] if sparse and not moe.slots_per_expert else [],
        "embedding": [(*width, inputs)],
        "head": [(*width, inputs)],
        "kv_cache": [("model.head_dim", m.head_dim, inputs)],
    }


def _other_runs(config: ml_collections.ConfigDict) -> Iterator[tuple[str, str]]:
    runs = {
        f"{SECTION}.teacher": config.quantization.teacher,
        "train.start_from": config.train.start_from,
    }
    for path, run in runs.items():
        if run and not (Path(run) / "config.json").is_file():
            yield path, f"must be the directory of a run, got {run!r}"
    if config.train.start_from and config.upcycle.run:
        yield "train.start_from", "must be empty with upcycle.run: a run starts from one place"


def _oscillation(
    config: ml_collections.ConfigDict, recipe: recipes.Recipe
) -> Iterator[tuple[str, str]]:
    q = config.quantization
    weight = recipe.expert_gate_up.weight
    rounds = weight and config.moe.num_experts and weight == recipe.expert_down.weight
    for name in ("flip_every", "reset_every"):
        if q[name] and not rounds:
            message = "must be 0 unless the recipe rounds all experts' weights to one format"
            yield f"{SECTION}.{name}", f"{message}; quantization.recipe is {q.recipe}"
