"""Records which experts a run's tokens go to, and evaluates a run under routes that were recorded.

B sequences, L tokens each, T valid tokens, M MoE layers, K slots per token, E experts, C columns of the routers'
scores, D documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import moelab
from moelab import config as configs
from moelab import data, diagnostics, evaluate, routers, schema
from moelab import model as model_lib
from moelab.data.quality import buckets
from moelab.errors import UserError
from moelab.quant import recipes
from moelab.router import Router
from moelab.trace import Trace

CHOSEN, COMPUTED = "chosen", "computed"  # what a trace's header says under `columns`


class RoutesError(UserError):
    """A run whose routes cannot be recorded, or a trace that it cannot replay."""


class _Pass(NamedTuple):
    """What one pass over the evaluation batches gave.

    Attributes:
      nats_D, token_count_D: as in evaluate.Measured.
      column_MTK: column that each slot of a valid token chose, C for none.
      weight_MTK: float32 factor of the slot in the combined output.
      dropped_M: share of the routers' choices that a capacity removed.
      logit_norm_M: mean Euclidean norm of a token's logits.
    """

    nats_D: np.ndarray
    token_count_D: np.ndarray
    column_MTK: np.ndarray
    weight_MTK: np.ndarray
    dropped_M: np.ndarray
    logit_norm_M: np.ndarray


class _Opened(NamedTuple):
    """A run in one precision, and the text to run it on."""

    loaded: evaluate.Loaded
    recipe: recipes.Recipe
    model: model_lib.Transformer
    router: Router
    part: Any  # data.dataset.TokenSplit
    split: str
    batches: list


def record(
    workdir: str | Path,
    *,
    step: str | int = "latest",
    precision: str = "float32",
    split: str = "test",
    weights: bool = False,
    before_capacity: bool = False,
) -> Trace:
    """Runs the evaluation batches of a run and keeps the routes of their tokens.

    A token is an input of the model; its document is that of the target after it. The header says where the trace comes
    from: moelab, run, config_sha256, step, precision, split, dataset_sha256, tokenizer_sha256, router, slots, columns
    (`computed` or `chosen`), leak, per MoE layer dropped_share and logit_norm, and of training text with labels or
    scores quality (by, names, of_document).

    Args:
      workdir: the run directory.
      step: a checkpoint's step, or latest.
      precision: a name of quant.recipes.
      split: train, validation or test.
      weights: keep the combine weights too.
      before_capacity: record what the routers chose, assignments included that a capacity dropped. This is what
        replays a router with renormalised weights under a capacity exactly; without a capacity both are the same.

    Raises:
      RoutesError: the run has no MoE layers, or its experts choose tokens.
      ConfigError, checkpoint.CheckpointError: no such run or step.
    """
    opened = _open(workdir, step, precision, split)
    found = _run(opened, before_capacity)
    return _trace(opened, found, weights, before_capacity)


def replay(
    workdir: str | Path, trace: Trace, *, step: str | int = "latest", precision: str = "float32"
) -> dict[str, Any]:
    """Evaluates a run with its own routes and with those of a trace, on the same batches.

    Indices alone are replayed: the weights are computed anew from the live logits, as in arXiv:2510.11370. A ReMoE gate
    that is zero stays zero.

    Args:
      workdir: the run directory; the trace may be of another checkpoint or precision, or of another run.
      trace: of the same tokens, MoE layers, slots and columns.
      step: a checkpoint's step, or latest.
      precision: a name of quant.recipes.

    Returns:
      step, precision, split, tokens, documents, layers, and two `rows`, routes free and replayed: replayed, loss (nats
      per token), loss_delta (against the free row), bits_per_byte, flip_rate (per MoE layer, against the trace),
      token_flip_rate (share of tokens with a flip in any layer).

    Raises:
      RoutesError: the trace is of other text, layers, slots or columns, or experts choose tokens.
      ConfigError, checkpoint.CheckpointError: no such run or step.
    """
    split = trace.header.get("split", "test")  # another program's trace may not say
    if split not in data.split.SPLITS:
        raise RoutesError(f"the trace is of the split {split!r}, which runs do not have")
    opened = _open(workdir, step, precision, split)
    _check(opened, trace)
    before_capacity = trace.header.get("columns", COMPUTED) == CHOSEN
    free = _run(opened, before_capacity)
    forced = _run(opened, before_capacity, list(_cut(trace, opened.batches)))
    tokens = len(trace.token_id_T)
    return {
        "step": opened.loaded.step,
        "precision": precision,
        "split": split,
        "tokens": tokens,
        "documents": int((free.token_count_D > 0).sum()),
        "layers": list(trace.layers),
        "rows": [_row(opened, trace, found, free, before_capacity) for found in (free, forced)],
    }


def default_path(workdir: str | Path, step: str | int, precision: str, split: str) -> Path:
    """Names the file in a run directory: routes.npz for the last checkpoint in float32 on the test split.

    >>> default_path("runs/a", 200, "nvfp4_wa", "test").name
    'routes_200_nvfp4_wa.npz'
    """
    usual = ("latest", evaluate.REFERENCE, "test")
    parts = [str(p) for p, u in zip((step, precision, split), usual, strict=True) if p != u]
    return Path(workdir) / ("_".join(["routes", *parts]) + ".npz")


def _open(workdir: str | Path, step: str | int, precision: str, split: str) -> _Opened:
    recipe = recipes.get(precision)
    config = configs.load(workdir).config
    if not model_lib.moe_layers(config):
        raise RoutesError(f"{workdir} has no MoE layers, so there are no routes")
    router = _router(config)
    if config.moe.slots_per_expert:
        raise RoutesError(f"{workdir} is Soft MoE, which mixes all tokens: there are no routes")
    if router.slots is None:
        raise RoutesError(
            f"{workdir}: in router.kind={config.router.kind} experts choose tokens; a trace lists the experts that "
            "tokens chose"
        )
    loaded = evaluate.load_run(workdir, step)
    model = evaluate.in_precision(config, loaded.dataset, recipe)
    part = loaded.dataset.split(split)
    batches = evaluate.batches_of(config, loaded.dataset, split)
    return _Opened(loaded, recipe, model, router, part, split, batches)


def _router(config) -> Router:
    """Builds the router for what it declares; it routes nothing."""
    fields = config.router.to_dict()
    return routers.make(fields.pop("kind"), num_experts=config.moe.num_experts, **fields)


def _make_step(model: model_lib.Transformer, router: Router, before_capacity: bool):
    """Returns a jitted (variables, batch, replay_MTK) -> (nats_BL, per-layer arrays)."""

    @jax.jit
    def step(variables: dict, batch, replay_MTK):
        nats_BL, layers = evaluate.forward(model, variables, batch, replay_MTK)
        shape = (batch.token_BL.size, router.slots)

        def column_TK(routing):
            if before_capacity:
                return routing.aux.choice_N.reshape(shape)
            expert_TK = routing.expert_N.reshape(shape)
            # Columns without computation have ids one above their place; E itself is nobody.
            column_TK = jnp.where(expert_TK > router.num_experts, expert_TK - 1, expert_TK)
            return jnp.where(expert_TK == router.num_experts, router.num_columns, column_TK)

        def stacked(values):
            return jnp.stack(list(values))

        return nats_BL, {
            "column_MTK": stacked(column_TK(layer.trace) for layer in layers),
            "weight_MTK": stacked(layer.trace.weight_N.reshape(shape) for layer in layers),
            "dropped_M": stacked(layer.dropped for layer in layers),
            "kept_M": stacked(jnp.sum(layer.load_E) + layer.idle for layer in layers),
            "logit_norm_M": stacked(layer.logit_norm for layer in layers),
        }

    return step


def _run(
    opened: _Opened, before_capacity: bool, replays: Sequence[np.ndarray] | None = None
) -> _Pass:
    state, num_documents = opened.loaded.state, len(opened.part)
    variables, _ = evaluate.variables_of(
        state.params, state.router_state, opened.recipe, opened.model.kept_blocks
    )
    step = _make_step(opened.model, opened.router, before_capacity)
    nats_D, count_D = np.zeros(num_documents), np.zeros(num_documents, np.int64)
    columns, weights, tokens = [], [], 0
    dropped_M = kept_M = norm_M = np.zeros(())
    for i, batch in enumerate(opened.batches):
        given = step(variables, batch, None if replays is None else replays[i])
        nats_BL, layers = jax.device_get(given)
        nats, count = evaluate.by_document(nats_BL, batch, num_documents)
        nats_D, count_D = nats_D + nats, count_D + count
        valid_T = np.asarray(batch.mask_BL).reshape(-1)
        columns.append(layers["column_MTK"][:, valid_T])
        weights.append(layers["weight_MTK"][:, valid_T])
        dropped_M, kept_M = dropped_M + layers["dropped_M"], kept_M + layers["kept_M"]
        norm_M = norm_M + layers["logit_norm_M"].astype(np.float64) * valid_T.sum()
        tokens += int(valid_T.sum())
    return _Pass(
        nats_D,
        count_D,
        np.concatenate(columns, axis=1),
        np.concatenate(weights, axis=1),
        dropped_M / np.maximum(dropped_M + kept_M, 1),
        norm_M / max(tokens, 1),
    )


def _text(batches: Sequence) -> dict[str, np.ndarray]:
    """Lists id, domain and document of the valid tokens, batch by batch, row by row."""
    parts: dict[str, list] = {"token_id_T": [], "domain_T": [], "document_T": []}
    for batch in batches:
        mask_BL = np.asarray(batch.mask_BL)
        domain_BL = np.broadcast_to(np.asarray(batch.domain_B)[:, None], mask_BL.shape)
        for name, array in zip(parts, (batch.token_BL, domain_BL, batch.document_BL), strict=True):
            parts[name].append(np.asarray(array)[mask_BL])
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _trace(opened: _Opened, found: _Pass, weights: bool, before_capacity: bool) -> Trace:
    loaded, router = opened.loaded, opened.router
    header = {
        "moelab": moelab.__version__,
        "config_sha256": configs.sha256(loaded.config),
        "step": loaded.step,
        "precision": opened.recipe.name,
        "split": opened.split,
        "dataset_sha256": loaded.dataset.sha256,
        "tokenizer_sha256": loaded.dataset.tokenizer.sha256,
        "router": loaded.config.router.kind,
        "slots": router.slots,
        "columns": CHOSEN if before_capacity else COMPUTED,
        "leak": opened.model.leak,
        "dropped_share": found.dropped_M.tolist(),
        "logit_norm": found.logit_norm_M.tolist(),
    }
    text = _text(opened.batches)
    quality = _quality(loaded.dataset, opened.split, text["document_T"])
    header |= {"quality": quality} if quality else {}
    return Trace(
        expert_MTK=found.column_MTK,
        weight_MTK=found.weight_MTK if weights else None,
        layers=tuple(model_lib.moe_layers(loaded.config)),
        domains=loaded.dataset.domains,
        num_experts=router.num_experts,
        num_columns=router.num_columns,
        header=header,
        **text,
    )


def _quality(dataset, split: str, document_T: np.ndarray) -> dict[str, Any] | None:
    """The header's quality buckets of the documents, where the text has any: labels, else the first filter's scores."""
    table = dataset.quality
    if split != "train" or table is None:
        return None
    by = buckets.LABEL if len(table.kinds) > 1 else table.filters[0].partition(" ")[0]
    names, bucket_N = buckets.divide(dataset, by, schema.Mixture().num_buckets)
    documents = np.unique(document_T).tolist()
    of_document = {str(number): int(bucket_N[number]) for number in documents}
    return {"by": by, "names": list(names), "of_document": of_document}


def _check(opened: _Opened, trace: Trace) -> None:
    """Refuses a trace that does not fit the run's routers or text."""
    router, text = opened.router, _text(opened.batches)
    for what, theirs, ours in (
        ("MoE layers in the blocks", trace.layers, model_lib.moe_layers(opened.loaded.config)),
        ("experts", trace.num_experts, router.num_experts),
        ("columns", trace.num_columns, router.num_columns),
        ("slots per token", trace.expert_MTK.shape[2], router.slots),
        ("tokens", len(trace.token_id_T), len(text["token_id_T"])),
    ):
        if (list(theirs) if isinstance(theirs, tuple) else theirs) != ours:
            raise RoutesError(f"the trace and the run differ in {what}: {theirs} and {ours}")
    for name, what in (("token_id_T", "token ids"), ("document_T", "documents")):
        odd_T = getattr(trace, name) != text[name]
        if odd_T.any():
            raise RoutesError(
                f"the trace is of other text than the run's {opened.split} split: {what} of "
                f"{int(odd_T.sum())} of {len(odd_T)} tokens differ, first at {int(odd_T.argmax())}"
            )


def _cut(trace: Trace, batches: Sequence) -> Iterator[np.ndarray]:
    """Yields each batch's replay, int32 (M, B * L, K); padding chooses nothing."""
    layers, _, slots = trace.expert_MTK.shape
    done = 0
    for batch in batches:
        valid_T = np.asarray(batch.mask_BL).reshape(-1)
        column_MTK = np.full((layers, valid_T.size, slots), trace.num_columns, np.int32)
        count = int(valid_T.sum())
        column_MTK[:, valid_T] = trace.expert_MTK[:, done : done + count]
        done += count
        yield column_MTK


def _row(
    opened: _Opened, trace: Trace, found: _Pass, free: _Pass, before_capacity: bool
) -> dict[str, Any]:
    flips = diagnostics.flip_rate(trace, _trace(opened, found, False, before_capacity))
    tokens = int(found.token_count_D.sum())
    loss = float(found.nats_D.sum() / tokens)
    return {
        "replayed": found is not free,
        "loss": loss,
        "loss_delta": loss - float(free.nats_D.sum() / tokens),
        "bits_per_byte": evaluate.bits_per_byte(found, opened.part, opened.loaded.dataset.domains),
        "flip_rate": flips.layer_M.tolist(),
        "token_flip_rate": flips.token,
    }
