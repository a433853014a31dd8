"""What tokens cost a model, span by span, and the rows of the tasks that ask for it.

B sequences, L tokens, S tokens of a span.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moelab import data, evaluate, task, tasks
from moelab import model as model_lib
from moelab.data import mixture
from moelab.quant import recipes
from moelab.task import Span

SHORTEST = 16  # spans are padded to a power of two from here on, so that few programs are compiled


def nats(
    step, variables: dict, spans: Sequence[Span], *, length: int, batch_tokens: int, end_id: int
) -> list[np.ndarray]:
    """Scores spans, each a sequence of its own after an end token.

    Args:
      step: a jitted (variables, data.Batch) -> nats_BL.
      variables: what `evaluate.variables_of` returned.
      spans: of at most `length` tokens.
      length: the longest that the model was trained on.
      batch_tokens: about how many tokens are computed together.
      end_id: the end token.

    Returns:
      float64 nats_S of each span, in order.

    Raises:
      ValueError: a span is empty or too long.
    """
    sizes = np.array([len(span.token_S) for span in spans])
    if len(sizes) and not (1 <= sizes.min() and sizes.max() <= length):
        raise ValueError(
            f"spans want 1 to {length} tokens; there is one of {sizes.min()} and one of {sizes.max()}"
        )
    found: list[np.ndarray] = [np.zeros(0)] * len(spans)
    buckets = np.minimum(length, np.maximum(SHORTEST, 2 ** np.ceil(np.log2(sizes)).astype(int)))
    for bucket in np.unique(buckets):
        chosen = np.flatnonzero(buckets == bucket)
        rows = max(1, batch_tokens // int(bucket))
        for start in range(0, len(chosen), rows):
            part = chosen[start : start + rows]
            batch = _batch([spans[i] for i in part], rows, int(bucket), end_id)
            nats_BL = np.asarray(step(variables, batch), np.float64)
            for row, i in enumerate(part):
                found[i] = nats_BL[row, : sizes[i]]
    return found


def _batch(spans: Sequence[Span], rows: int, length: int, end_id: int) -> data.Batch:
    token_BL = np.full((rows, length), end_id, np.int32)
    target_BL, mask_BL = token_BL.copy(), np.zeros((rows, length), bool)
    domain_B = np.full(rows, -1, np.int32)
    for row, span in enumerate(spans):
        size = len(span.token_S)
        target_BL[row, :size], mask_BL[row, :size] = span.token_S, True
        token_BL[row, 1:size] = span.token_S[:-1]
        domain_B[row] = span.domain
    return data.Batch(token_BL, target_BL, mask_BL, domain_B, np.full_like(token_BL, -1))


def make_step(model: model_lib.Transformer):
    """Returns a jitted (variables, data.Batch) -> nats_BL."""

    @jax.jit
    def step(variables: dict, batch: data.Batch) -> jax.Array:
        return evaluate.forward(model, variables, batch)[0]

    return step


def answer(
    config,
    params: Any,
    router_state: Any,
    dataset,
    kinds: Sequence[str],
    precisions: Sequence[str] = (evaluate.REFERENCE,),
) -> dict[str, Any]:
    """Asks a model the tasks, in each precision.

    Args:
      config, params, router_state, dataset, precisions: as for `evaluate.evaluate`, but nothing is added.
      kinds: of moelab.tasks; a task that the data has nothing for is left out. They see of the training split what the
        run draws from.

    Returns:
      {"rows": a dict per precision and task.Row, "left_out": kind -> why, "dropped": kind -> items too long}
    """
    length = config.train.length
    tokens = config.train.num_steps * config.train.batch_size * length
    pool = mixture.pooled(dataset, config.mixture, tokens)
    asked, left_out = {}, {}
    made = {kind: tasks.make(kind) for kind in kinds}
    for kind, one in made.items():
        try:
            asked[kind] = one.ask(pool, length)
        except task.TaskError as error:
            left_out[kind] = str(error)
    params, router_state = jax.device_put((params, router_state), jax.devices()[0])
    keep = model_lib.from_dataset(config, dataset).kept_blocks
    steps, rows = {}, []
    for name in dict.fromkeys(precisions):
        recipe = recipes.get(name)
        variables, _ = evaluate.variables_of(params, router_state, recipe, keep)
        program = evaluate.executed(recipe)
        if program not in steps:
            steps[program] = make_step(evaluate.in_precision(config, dataset, recipe))
        score = functools.partial(
            nats,
            steps[program],
            variables,
            length=length,
            batch_tokens=config.evaluation.batch_size * length,
            end_id=dataset.tokenizer.end_id,
        )
        for kind, one in asked.items():
            rows += [
                {"precision": name, **row._asdict()}
                for row in made[kind].answer(one, score(one.spans))
            ]
    dropped = {kind: one.dropped for kind, one in asked.items() if one.dropped}
    return {"rows": rows, "left_out": left_out, "dropped": dropped}


def answer_run(
    workdir: str | Path,
    kinds: Sequence[str],
    *,
    step: str | int = "latest",
    precisions: Sequence[str] = (evaluate.REFERENCE,),
) -> dict[str, Any]:
    """Asks a checkpoint of a run; as `answer`, with the step and why the model is not causal ("leak"), if so."""
    loaded = evaluate.load_run(workdir, step)
    state = loaded.state
    found = answer(
        loaded.config, state.params, state.router_state, loaded.dataset, kinds, precisions
    )
    model = model_lib.from_dataset(loaded.config, loaded.dataset)
    return found | {"step": loaded.step, "leak": model.leak}
