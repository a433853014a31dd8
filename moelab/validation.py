"""Checks what types cannot: ranges, divisibility, names. All problems are listed at once, each with its fix.

A router or mechanism file may add its own with `validate(fields, config) -> list[(field, message)]`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_collections

from moelab import fields, schema, spelling
from moelab.errors import UserError


class Problem(NamedTuple):
    """One thing that is wrong with a config."""

    path: str  # dotted
    message: str  # what is wrong, and what would be right

    def __str__(self) -> str:
        return f"{self.path} {self.message}"


# Smallest value of a count, or of a number that must not be negative.
_AT_LEAST = {
    1: """model.num_layers model.width model.num_heads model.num_kv_heads model.head_dim model.dense_width
        moe.expert_width moe.every train.num_steps train.batch_size train.length train.accumulation_steps
        train.max_nonfinite_steps evaluation.batch_size checkpoint.every checkpoint.keep logging.every
        optimizer.newton_schulz_steps data.vocab_size mixture.num_buckets""",
    0: """seed moe.num_experts moe.num_shared_experts moe.num_dense_layers moe.capacity_factor
        moe.slots_per_expert train.clip_norm
        train.head_chunk evaluation.every evaluation.tokens_per_domain schedule.warmup_steps
        optimizer.weight_decay data.end_id mixture.unique_tokens mixture.epochs""",
    257: "tokenizer.vocab_size",  # 256 bytes and the end of a document
}
_POSITIVE = """model.rope_base model.norm_epsilon optimizer.learning_rate optimizer.adam_learning_rate
    optimizer.epsilon"""
_DECAYS = (
    "optimizer.b1 optimizer.b2 optimizer.beta optimizer.adam_b1 optimizer.adam_b2"  # in [0, 1)
)
_SHARES = "schedule.final_scale schedule.decay_share mixture.anneal_share"  # in [0, 1]
_CHOICES = {"model.dtype": ("float32", "bfloat16"), "data.dtype": ("uint16", "uint32")}


def validate(config: ml_collections.ConfigDict, num_devices: int | None = None) -> list[Problem]:
    """Returns everything that is wrong with a config, in the order of its sections.

    Args:
      config: complete, as `config.load` makes it.
      num_devices: devices that share a batch; None: not known, not checked.
    """
    problems = [
        *_ranges(config),
        *_model(config),
        *_steps(config),
        *_batches(config, num_devices),
        *_data(config),
        *_mixture(config),
        *_names(config),
        *_kernel(config, num_devices),
        *_parallel(config, num_devices),
        *_open_sets(config),
        *_upcycle(config),
        *_quantization(config),
    ]
    sections = list(config)
    return sorted(problems, key=lambda problem: sections.index(problem.path.partition(".")[0]))


def _value(config: ml_collections.ConfigDict, path: str) -> tuple:
    """Returns (value,), or () where the chosen kinds have no such field."""
    for key in path.split("."):
        if key not in config:
            return ()
        config = config[key]
    return (config,)


def _ranges(config: ml_collections.ConfigDict) -> Iterator[Problem]:
    checks = [(paths, lambda x, n=n: x >= n, f"at least {n}") for n, paths in _AT_LEAST.items()]
    checks.append((_POSITIVE, lambda x: x > 0, "greater than 0"))
    checks.append((_DECAYS, lambda x: 0 <= x < 1, "at least 0 and less than 1"))
    checks.append((_SHARES, lambda x: 0 <= x <= 1, "between 0 and 1"))
    checks.append(("seed", lambda x: x < 2**32, "less than 2**32"))
    for paths, right, wanted in checks:
        for path in paths.split():
            for value in _value(config, path):
                if not right(value):
                    yield Problem(path, f"must be {wanted}, got {value}")


def _model(config: ml_collections.ConfigDict) -> Iterator[Problem]:
    model, moe = config.model, config.moe
    if model.num_kv_heads > 0 and model.num_heads % model.num_kv_heads:
        yield Problem(
            "model.num_kv_heads",
            f"must divide model.num_heads={model.num_heads}, got {model.num_kv_heads}; "
            f"set it to {_divisor(model.num_heads, model.num_kv_heads)}",
        )
    if model.head_dim % 2:
        yield Problem(
            "model.head_dim",
            f"must be even for rotary positions, got {model.head_dim}; set it to {model.head_dim + 1}",
        )
    if moe.num_dense_layers > model.num_layers:
        yield Problem(
            "moe.num_dense_layers",
            f"must be at most model.num_layers={model.num_layers}, got {moe.num_dense_layers}",
        )
    yield from _blocks(config)
    if moe.num_experts > 0:
        yield from _sparse(config)


def _sparse(config: ml_collections.ConfigDict) -> Iterator[Problem]:
    model, moe = config.model, config.moe
    dense_only = moe.num_dense_layers + moe.every > model.num_layers >= moe.num_dense_layers
    if moe.every > 0 and model.num_layers > 0 and dense_only:
        yield Problem(
            "moe.every",
            f"leaves no layer with experts: {model.num_layers} layers, the first {moe.num_dense_layers} dense, then "
            f"each {moe.every}th; for a dense model set moe.num_experts=0",
        )
    declared = importlib.import_module("moelab.balancing").router_of(config)
    if declared.by_score and not moe.capacity_factor > 0:
        message = (
            f"{config.router.kind} orders tokens under a capacity: set moe.capacity_factor above 0"
        )
        yield Problem("router.kind", message)
    if declared.slots is None and moe.capacity_factor > 0:
        message = (
            f"must be 0 with router.kind={config.router.kind}, which has its capacity built in"
        )
        yield Problem("moe.capacity_factor", message)
    if moe.slots_per_expert > 0:
        if moe.capacity_factor:
            yield Problem(
                "moe.capacity_factor", "must be 0 with Soft MoE: its slots are its capacity"
            )
        if config.router.kind != "top_k":
            yield Problem("router.kind", "must be left at top_k with Soft MoE, which has no router")


def _divisor(number: int, near: int) -> int:
    """The largest divisor of number that is at most near."""
    return next((d for d in range(min(near, number), 0, -1) if number % d == 0), 1)


def _blocks(config: ml_collections.ConfigDict) -> Iterator[Problem]:
    """Block-scaled formats share a scale among 32 or 16 values along the summed axis; caches, along a head's."""
    recipes = importlib.import_module("moelab.quant.recipes")
    formats = importlib.import_module("pallas_kernels.formats").FORMATS
    needed: dict[str, tuple[int, str]] = {}
    for name in config.evaluation.precisions:
        if name not in recipes.NAMES:
            continue
        recipe = recipes.get(name)
        weights = [getattr(recipe, role) for role in recipes.EXPERT_ROLES]
        experts = [f for w in weights for f in (w.weight, w.activation)]
        uses = (
            {"model.width": experts, "moe.expert_width": experts} if config.moe.num_experts else {}
        )
        uses["model.head_dim"] = [recipe.kv_cache.activation]
        for path, used in uses.items():
            specs = [formats[f] for f in used if f is not None]
            block = max((s.block for s in specs if s.block and not s.partial), default=1)
            if block > needed.get(path, (1, ""))[0]:
                needed[path] = (block, name)
    for path, (block, name) in needed.items():
        (width,) = _value(config, path)
        if width % block:
            yield Problem(
                path,
                f"must be divisible by {block} to evaluate {name}, got {width}; "
                f"set it to {-(-width // block) * block} or shorten evaluation.precisions",
            )


def _steps(config: ml_collections.ConfigDict) -> Iterator[Problem]:
    steps, schedule = config.train.num_steps, config.schedule
    if schedule.warmup_steps > steps:
        yield Problem(
            "schedule.warmup_steps",
            f"must be at most train.num_steps={steps}, got {schedule.warmup_steps}",
        )
    for share in _value(config, "schedule.decay_share"):
        if schedule.warmup_steps <= steps < schedule.warmup_steps + share * steps:
            yield Problem(
                "schedule.decay_share",
                f"leaves no room for schedule.warmup_steps={schedule.warmup_steps} in "
                f"train.num_steps={steps}, got {share}; shorten one of them",
            )


def _batches(config: ml_collections.ConfigDict, num_devices: int | None) -> Iterator[Problem]:
    batch, parts = config.train.batch_size, config.train.accumulation_steps
    if parts > 0 and batch % parts:
        yield Problem(
            "train.accumulation_steps", f"must divide train.batch_size={batch}, got {parts}"
        )
    elif parts > 0 and num_devices and batch // parts % num_devices:
        yield Problem(
            "train.batch_size",
            f"must be divisible by accumulation_steps * devices = {parts} * {num_devices}, got {batch}",
        )
    if num_devices and config.evaluation.batch_size % num_devices:
        yield Problem(
            "evaluation.batch_size",
            f"must be divisible by the {num_devices} devices, got {config.evaluation.batch_size}",
        )


def _data(config: ml_collections.ConfigDict) -> Iterator[Problem]:
    data = config.data
    for path in _value(config, "data.path"):
        if not path:
            yield Problem("data.path", f"must name the {data.kind} data; it is empty")
        elif not Path(path).exists():
            yield Problem("data.path", f"must exist, got {path!r}")
    for domains in _value(config, "data.domains"):
        yield from _listed("data.domains", domains, schema.Corpus().domains)
    quality = importlib.import_module("moelab.data.quality")
    for path, parse in (
        ("data.inject", quality.parse_injectors),
        ("data.filter", quality.parse_filters),
    ):
        for texts in _value(config, path):
            try:
                parse(texts)
            except UserError as error:
                yield Problem(path, str(error).removeprefix(f"{path}: "))
    if data.kind == "tokens" and data.end_id >= data.vocab_size > 0:
        yield Problem(
            "data.end_id", f"must be less than data.vocab_size={data.vocab_size}, got {data.end_id}"
        )
    if data.kind == "tokens" and data.dtype == "uint16" and data.vocab_size > 2**16:
        yield Problem(
            "data.dtype", f"must be uint32 for data.vocab_size={data.vocab_size}, got uint16"
        )


def _mixture(config: ml_collections.ConfigDict) -> Iterator[Problem]:
    check = importlib.import_module("moelab.data.mixture").problems
    for field, message in check(schema.Mixture(**config.mixture), config.data):
        yield Problem(f"mixture.{field}", message)


def _names(config: ml_collections.ConfigDict) -> Iterator[Problem]:
    choices = dict(_CHOICES)
    implementations = importlib.import_module("pallas_kernels").IMPLEMENTATIONS
    choices["moe.implementation"] = ("auto", *implementations)
    activations = importlib.import_module("pallas_kernels.grouped_matmul.activation").ACTIVATIONS
    choices["moe.activation"] = tuple(activations)
    for path, names in choices.items():
        for value in _value(config, path):
            if value not in names:
                yield Problem(path, f"must be one of {', '.join(names)}, got {value!r}")
    names, recipes = config.evaluation.precisions, importlib.import_module("moelab.quant.recipes")
    yield from _listed("evaluation.precisions", names, recipes.NAMES)
    tasks = importlib.import_module("moelab.tasks").KINDS
    if config.evaluation.tasks:
        yield from _listed("evaluation.tasks", config.evaluation.tasks, tasks)
    if config.moe.implementation == "ragged_dot":  # better now than after the training
        packed = [name for name in names if name in recipes.NAMES and recipes.get(name).packed]
        if packed:
            message = (
                f"cannot evaluate {packed[0]}: ragged_dot multiplies plain weights only; use auto"
            )
            yield Problem("moe.implementation", message)


def _kernel(config: ml_collections.ConfigDict, num_devices: int | None) -> Iterator[Problem]:
    """A GPU kernel that is named must run here; known once the devices are."""
    kernels = importlib.import_module("pallas_kernels.grouped_matmul.kernels").KERNELS
    name = config.moe.implementation
    if num_devices is None or name not in kernels:
        return
    reason = kernels[name].wrong_device(importlib.import_module("pallas_kernels.device").current())
    if reason:
        yield Problem("moe.implementation", f"cannot be {name}: {reason}; use auto")


def _parallel(config: ml_collections.ConfigDict, num_devices: int | None) -> Iterator[Problem]:
    """Experts that are split over devices."""
    moe = config.moe
    if moe.receive_factor < 0:
        yield Problem("moe.receive_factor", f"must be at least 0, got {moe.receive_factor}")
    elif moe.receive_factor and not moe.parallel:
        yield Problem("moe.receive_factor", "has no use without moe.parallel=True")
    if not moe.parallel:
        return
    if moe.slots_per_expert:
        yield Problem("moe.parallel", "splits routed experts; Soft MoE has slots, not routes")
    elif not moe.num_experts:
        yield Problem("moe.parallel", "splits experts, and moe.num_experts is 0")
    elif num_devices and moe.num_experts % num_devices:
        yield Problem(
            "moe.num_experts",
            f"must be divisible by the {num_devices} devices with moe.parallel, got {moe.num_experts}",
        )


def _listed(path: str, given: tuple[str, ...], known: tuple[str, ...]) -> Iterator[Problem]:
    if not given:
        yield Problem(path, f"must not be empty; there are {', '.join(known)}")
    for name in dict.fromkeys(given):
        if name not in known:
            guess = spelling.hint(name, known) or f"; there are {', '.join(known)}"
            yield Problem(path, f"has no {name!r}{guess}")
        elif given.count(name) > 1:
            yield Problem(path, f"must list each name once, got {name!r} {given.count(name)} times")


def _open_sets(config: ml_collections.ConfigDict) -> Iterator[Problem]:
    check_steers = importlib.import_module("moelab.balancing").check_steers
    modules = {f"balance.{name}": f"moelab.balance.{name}" for name in fields.balance_mechanisms()}
    modules["router"] = f"moelab.routers.{config.router.kind}"
    for section, name in modules.items():
        (values,) = _value(config, section)
        if section != "router" and not values[next(iter(values))]:
            continue  # a mechanism's first field is its strength: it is off
        module = importlib.import_module(name)
        if section != "router":
            for field, message in check_steers(module.Mechanism, values, config):
                yield Problem(f"{section}.{field}", message)
        check = getattr(module, "validate", None)
        if check:
            for field, message in check(values.to_dict(), config):
                yield Problem(f"{section}.{field}", message)
        else:
            yield from _unchecked(section, values, config)


def _upcycle(config: ml_collections.ConfigDict) -> Iterator[Problem]:
    if config.upcycle.run:
        for path, message in importlib.import_module("moelab.upcycle").problems(config):
            yield Problem(path, message)


def _quantization(config: ml_collections.ConfigDict) -> Iterator[Problem]:
    for path, message in importlib.import_module("moelab.quant.config_check").problems(config):
        yield Problem(path, message)


def _unchecked(section: str, values, config: ml_collections.ConfigDict) -> Iterator[Problem]:
    """What holds for every router and mechanism that brings no checks of its own."""
    num_experts = config.moe.num_experts
    if section == "router":
        k = values.k if "k" in values else 1
        if k < 1:
            yield Problem("router.k", f"must be at least 1, got {k}")
        if 0 < num_experts < k:
            yield Problem("router.k", f"must be at most moe.num_experts={num_experts}, got {k}")
    for strength in list(values)[:1] if section != "router" else ():  # a mechanism's first field
        if values[strength] < 0:
            yield Problem(f"{section}.{strength}", f"must be at least 0, got {values[strength]}")
