"""Evaluation in several precisions on the same documents: nats per document, load per domain, router agreement.

B sequences, L tokens, T = B*L tokens, E experts, M MoE layers, D documents, N assignments.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moelab import checkpoint, data, loss, metrics, optimizer, quant, schema
from moelab import config as configs
from moelab import model as model_lib
from moelab import step as step_lib
from moelab.progress import note
from moelab.quant import packing, recipes

REFERENCE = "float32"


class Measured(NamedTuple):
    """What one precision gave on a list of batches.

    Attributes:
      nats_D: float64 nats of each document of the split (0 where it was not evaluated).
      token_count_D: int64 targets of each document that were evaluated.
      load_MGE: float64 assignments per MoE layer, domain and expert.
      chosen_MTE: bool per MoE layer, valid token and expert, packed along E (numpy.packbits).
    """

    nats_D: np.ndarray
    token_count_D: np.ndarray
    load_MGE: np.ndarray
    chosen_MTE: np.ndarray


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """All precisions of one split.

    Attributes:
      rows: the card's rows, one per precision.
      columns: of documents.parquet.
      load_by_domain: share per MoE layer, domain and expert in float32.
      tokens, documents: how many were evaluated.
    """

    rows: list[dict[str, Any]]
    columns: dict[str, list]
    load_by_domain: list
    tokens: int
    documents: int


def forward(
    model: model_lib.Transformer, variables: dict, batch, replay_MTK: jax.Array | None = None
) -> tuple[jax.Array, list]:
    """Runs one batch as evaluation does.

    Args:
      model: in the precision to evaluate.
      variables: what `variables_of` returned.
      batch: data.Batch.
      replay_MTK: int32 columns to select instead of the routers' own choice, or None.

    Returns:
      float32 nats_BL of each target, and per MoE layer its LayerReport with the Routing in `trace`.
    """
    inputs = model_lib.Inputs(batch.token_BL, batch.mask_BL, batch.domain_B, replay_MTK=replay_MTK)
    out = model.apply(variables, inputs, train=False, trace=True)
    _, nats_T = loss.sharded_cross_entropy(
        out.hidden_BLD.reshape(batch.token_BL.size, -1),
        model_lib.head(model, variables["params"]),
        batch.target_BL.reshape(-1),
        batch.mask_BL.reshape(-1).astype(jnp.float32),
        chunk=0,
        mesh=model.mesh,
    )
    return nats_T.reshape(batch.token_BL.shape), step_lib.in_block_order(out.reports)


def make_step(model: model_lib.Transformer):
    """Returns a jitted (variables, batch) -> (nats_BL, chosen_MTE packed along E)."""

    @jax.jit
    def step(variables: dict, batch):
        nats_BL, layers = forward(model, variables, batch)
        num_tokens = batch.token_BL.size
        chosen = [_chosen(layer.trace, num_tokens, layer.load_E.size) for layer in layers]
        packed = jnp.stack(chosen) if chosen else jnp.zeros((0, num_tokens, 0), jnp.uint8)
        return nats_BL, packed

    return step


def _chosen(routing, num_tokens: int, num_experts: int) -> jax.Array:
    """Marks each token's experts, packed eight to a byte: (T, ceil(E / 8)) uint8."""
    hit_TE = jnp.zeros((num_tokens, num_experts + 1), jnp.uint8)
    hit_TE = hit_TE.at[routing.token_N, routing.expert_N].set(1)
    return jnp.packbits(hit_TE[:, :num_experts], axis=1)


def measure(step, variables: dict, batches: Sequence, num_documents: int, sizes) -> Measured:
    """Runs a step of `make_step` over batches.

    Args:
      batches: data.Batch, as numpy arrays.
      num_documents: D of the split.
      sizes: (num_domains, E).
    """
    num_domains, num_experts = sizes
    nats_D = np.zeros(num_documents)
    count_D = np.zeros(num_documents, np.int64)
    load = 0.0
    chosen = []
    for batch in batches:
        nats_BL, packed = jax.device_get(step(variables, batch))
        mask = np.asarray(batch.mask_BL)
        nats, count = by_document(nats_BL, batch, num_documents)
        nats_D, count_D = nats_D + nats, count_D + count
        packed = packed[:, mask.reshape(-1)]
        domain_T = np.repeat(np.asarray(batch.domain_B), mask.shape[1])[mask.reshape(-1)]
        hit = np.unpackbits(packed, axis=2, count=num_experts).astype(np.float32)
        one_hot = (domain_T[:, None] == np.arange(num_domains)[None]).astype(np.float32)
        load = load + np.einsum("mte,tg->mge", hit, one_hot).astype(np.float64)
        chosen.append(packed)
    return Measured(nats_D, count_D, load, np.concatenate(chosen, axis=1))


def by_document(nats_BL: np.ndarray, batch, num_documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums a batch's nats (float64) and counts its targets (int64) by document: (D,) both."""
    mask = np.asarray(batch.mask_BL)
    document = np.asarray(batch.document_BL)[mask]
    nats_D = np.bincount(document, nats_BL[mask].astype(np.float64), num_documents)
    return nats_D, np.bincount(document, minlength=num_documents)


def agreement(a: Measured, b: Measured) -> float | None:
    """Share of (MoE layer, token) whose set of experts is the same; None without MoE layers."""
    if not a.chosen_MTE.shape[0]:
        return None
    return float(np.mean(np.all(a.chosen_MTE == b.chosen_MTE, axis=2)))


def executed(recipe: recipes.Recipe) -> recipes.Recipe:
    """What the model computes under a recipe whose experts are packed: the packed weights say their format themselves.

    Recipes for which this is the same share one compiled program.
    """
    return recipe.without_experts_weights()


def in_precision(config, dataset, recipe: recipes.Recipe) -> model_lib.Transformer:
    """Builds a config's model as a recipe computes it from packed experts."""
    options = dict(dtype=recipe.compute_dtype, recipe=executed(recipe))
    return model_lib.from_dataset(config, dataset, **options)


def evaluate(
    config, params: Any, router_state: Any, dataset, split: str, precisions: Sequence[str]
) -> Evaluated:
    """Evaluates parameters in each precision on the same documents, float32 first: it is the reference.

    Args:
      config: of the run.
      params: float32 parameters; experts are packed per recipe, the rest stays float32 (bf16: computed in bfloat16).
      router_state: states of the balancing mechanisms, used and not changed.
      dataset: data.Dataset.
      split: validation or test.
      precisions: names of quant.recipes; float32 is added where it is missing, and what packs experts is left out of a
        model without any. A run that trained under a recipe gets a row of that recipe, every role as in training.
    """
    # On one device, whatever the state was trained on.
    params, router_state = jax.device_put((params, router_state), jax.devices()[0])
    part = dataset.split(split)
    batches = batches_of(config, dataset, split)
    sizes = (len(dataset.domains), config.moe.num_experts)
    rows, columns, steps, reference = [], {}, {}, None
    keep = model_lib.from_dataset(config, dataset).kept_blocks
    packs = bool(model_lib.moe_layers(config))
    for name in dict.fromkeys((REFERENCE, *precisions)):
        recipe = recipes.get(name)
        if recipe.packed and not packs:
            continue  # it would be the reference under another name
        variables, expert_bytes = variables_of(params, router_state, recipe, keep)
        program = executed(recipe)
        if program not in steps:
            steps[program] = make_step(in_precision(config, dataset, recipe))
        found = measure(steps[program], variables, batches, len(part), sizes)
        reference = reference or found
        rows.append(_row(recipe, found, reference, part, dataset.domains, expert_bytes))
        add_documents(columns, name, found.nats_D, found.token_count_D, part, dataset.domains)
    trained = model_lib.training_recipe(config)
    if trained.quantizes:
        model = model_lib.from_dataset(config, dataset, recipe=trained)
        variables, expert_bytes = variables_of(params, router_state, trained, keep)
        # The model rounds the master weights itself, in every role.
        variables = {"params": params, "router_state": router_state}
        found = measure(make_step(model), variables, batches, len(part), sizes)
        rows.append(_row(trained, found, reference, part, dataset.domains, expert_bytes))
        add_documents(
            columns, trained.name, found.nats_D, found.token_count_D, part, dataset.domains
        )
    share = reference.load_MGE / np.maximum(reference.load_MGE.sum(axis=2, keepdims=True), 1)
    used = reference.token_count_D > 0
    return Evaluated(
        rows, columns, share.tolist(), int(reference.token_count_D.sum()), int(used.sum())
    )


def batches_of(config, dataset, split: str) -> list:
    """The fixed subset of a split that the config evaluates, as a list of data.Batch."""
    return list(
        data.evaluation_batches(
            dataset,
            split,
            batch_size=config.evaluation.batch_size,
            length=config.train.length,
            tokens_per_domain=config.evaluation.tokens_per_domain,
        )
    )


def variables_of(
    params: Any,
    router_state: Any,
    recipe: recipes.Recipe,
    keep: frozenset[tuple[str, str]] = frozenset(),
) -> tuple[dict, int]:
    """Packs the experts by the recipe, but for the blocks of `keep`; returns what the model takes and their bytes.

    With weights alone quantized, the packed values are expanded to float32 here: multiplying those is what a
    weight-only kernel computes, and all such recipes share one compiled program.
    """
    rest, quantized = quant.pack(params, recipe, keep)
    return packed_variables(rest, quantized, router_state, recipe)


def packed_variables(
    rest: Any, quantized: Any, router_state: Any, recipe: recipes.Recipe
) -> tuple[dict, int]:
    """As `variables_of`, for experts that were packed before."""
    expert_bytes = sum(quant.expert_bytes(tree, recipe) for tree in (rest, quantized))
    variables = {"params": rest, "router_state": router_state}
    if quantized and recipe.expert_activation is None:
        variables["params"] = quant.unpack(rest, quantized, recipe.rotation)
    elif quantized:
        variables["quantized"] = packing.for_device(quantized, recipe.expert_activation)
    return variables, expert_bytes


def bits_per_byte(found: Measured, part, domains: Sequence[str]) -> dict[str, float]:
    """Sums nats over a domain's documents, in bits, over the UTF-8 bytes of their text; `all` over all domains."""
    used = found.token_count_D > 0
    bits = {}
    for i, domain in enumerate(domains):
        chosen = used & (part.domain_N == i)
        if chosen.any():
            bits[domain] = _bits(found.nats_D[chosen], part.num_bytes_N[chosen])
    bits["all"] = _bits(found.nats_D[used], part.num_bytes_N[used])
    return bits


def _bits(nats: np.ndarray, nbytes: np.ndarray) -> float:
    """NaN where the bytes are unknown: token files without their tokenizer."""
    total = int(nbytes.sum())
    return float(nats.sum() / math.log(2) / total) if total else math.nan


def _row(recipe, found: Measured, reference: Measured, part, domains, expert_bytes: int) -> dict:
    tokens = int(found.token_count_D.sum())
    loss_value = float(found.nats_D.sum() / tokens)
    return {
        "precision": recipe.name,
        "label": recipe.label,
        "weights": recipe.expert_weight,
        "activations": recipe.activation_label,
        "loss": loss_value,
        "loss_delta": loss_value - float(reference.nats_D.sum() / tokens),
        "bits_per_byte": bits_per_byte(found, part, domains),
        "expert_bytes": int(expert_bytes),
        "router_agreement": agreement(found, reference),
        "max_violation": metrics.max_violation(found.load_MGE.sum(axis=1)).tolist()
        if found.load_MGE.size
        else [],
    }


def add_documents(
    columns: dict[str, list], name: str, nats_D: np.ndarray, count_D: np.ndarray, part, domains
) -> None:
    """Appends the rows of one precision to the columns of documents.parquet; documents without targets are left out."""
    for d in np.flatnonzero(count_D):
        values = {
            "precision": name,
            "domain": domains[part.domain_N[d]],
            "document": part.ids[d],
            "nats": float(nats_D[d]),
            "bytes": int(part.num_bytes_N[d]),
            "tokens": int(count_D[d]),
        }
        for key, value in values.items():
            columns.setdefault(key, []).append(value)


class Validator:
    """Evaluates a model on the validation split while a run goes on; compiled once."""

    def __init__(self, config, model: model_lib.Transformer, dataset):
        self._config, self._dataset = config, dataset
        self._step = make_step(model)
        self._batches = batches_of(config, dataset, "validation")

    def record(self, state: step_lib.TrainState, step: int, precision: str) -> dict[str, Any]:
        """Returns the evaluation record of metrics.jsonl for a state, under the precision's name."""
        config, dataset = self._config, self._dataset
        part = dataset.split("validation")
        variables = {"params": state.params, "router_state": state.router_state}
        sizes = (len(dataset.domains), config.moe.num_experts)
        found = measure(self._step, variables, self._batches, len(part), sizes)
        load_ME = found.load_MGE.sum(axis=1)
        return {
            "kind": "evaluation",
            "step": step,
            "split": "validation",
            "precision": precision,
            "loss": float(found.nats_D.sum() / found.token_count_D.sum()),
            "bits_per_byte": bits_per_byte(found, part, dataset.domains),
            "router": metrics.router_record(model_lib.moe_layers(config), load_ME),
        }


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A run's config, data and state, read back without executing any code of the run."""

    config: Any
    dataset: Any
    step: int
    state: step_lib.TrainState


def load_run(workdir: str | Path, step: str | int = "latest") -> Loaded:
    """Reads a run directory and a checkpoint of it.

    Args:
      workdir: the run directory.
      step: a checkpoint's step, or latest.

    Raises:
      ConfigError: no run there.
      checkpoint.CheckpointError: no such step, or none that is good.
    """
    workdir = Path(workdir)
    config = configs.load(workdir).config
    written = configs.schema_of(workdir)
    if written != schema.SCHEMA:
        note(
            f"warning: {workdir} is of schema {written!r} of configs, read here as {schema.SCHEMA}: meanings may differ"
        )
    dataset = data.build(config.data, config.tokenizer)
    model = model_lib.from_dataset(config, dataset)
    shapes = jax.eval_shape(lambda: model_lib.init(model, jax.random.key(0)))["params"]
    tx = optimizer.make(config, shapes)
    abstract = step_lib.abstract_state(config, model, tx)
    wanted = None if step == "latest" else int(step)
    return Loaded(config, dataset, *checkpoint.load(workdir / "checkpoints", abstract, wanted))


def evaluate_run(
    workdir: str | Path,
    *,
    step: str | int = "latest",
    precisions: Sequence[str] = (),
    split: str = "test",
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run again and returns an evaluation section like the card's."""
    loaded = load_run(workdir, step)
    config, state = loaded.config, loaded.state
    names = tuple(precisions) or tuple(config.evaluation.precisions)
    done = evaluate(config, state.params, state.router_state, loaded.dataset, split, names)
    return section(config, loaded.dataset, split, done) | {"step": loaded.step}


def section(config, dataset, split: str, done: Evaluated) -> dict[str, Any]:
    """The card's section `evaluation`, without baselines."""
    return {
        "split": split,
        "tokens": done.tokens,
        "documents": done.documents,
        "domains": list(dataset.domains),
        "rows": done.rows,
        "baselines": {},
        "load_by_domain": done.load_by_domain,
        "layers": model_lib.moe_layers(config),
    }
