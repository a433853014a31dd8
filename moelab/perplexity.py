"""Scores texts by a trained model of the toolkit: bits per byte of each document, as evaluation measures them.

B sequences, L tokens, N documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np

from moelab import data, evaluate
from moelab import model as model_lib
from moelab.data.document import Document
from moelab.errors import UserError

BATCH = 16  # sequences that are computed together


def bits_per_byte(
    run: str | Path,
    documents: Iterable[Document],
    *,
    step: str | int = "latest",
    tokens: int = 256,
) -> Iterator[tuple[int, float]]:
    """Reads documents and yields, for each, what a run's model thinks of it.

    The documents of a stream follow one another, as in training and evaluation: the first tokens of one are predicted
    from the last of the one before it.

    Args:
      run: the run directory; its own tokenizer is used.
      documents: read once.
      step: a checkpoint's step, or latest.
      tokens: of a document's beginning that are scored; 0: all.

    Yields:
      (number of the document, bits per UTF-8 byte of what was scored), in order.

    Raises:
      UserError: there is no such run, or its model sees later tokens.
    """
    loaded = evaluate.load_run(run, step)
    model = model_lib.from_dataset(loaded.config, loaded.dataset)
    if model.leak:
        raise UserError(f"{run} is no causal language model ({model.leak}): it has no perplexity")
    variables = {"params": loaded.state.params, "router_state": loaded.state.router_state}
    variables = jax.device_put(variables, jax.devices()[0])
    forward = jax.jit(lambda variables, batch: evaluate.forward(model, variables, batch)[0])
    made, length = loaded.dataset.tokenizer, loaded.config.train.length
    nats: dict[int, float] = {}
    size: dict[int, int] = {}
    rest: dict[int, int] = {}
    done = 0
    for batch in _batches(_scored(documents, made, tokens, size, rest), made.end_id, length):
        nats_BL = np.asarray(forward(variables, batch))
        mask_BL = batch.mask_BL
        for number, value in zip(
            batch.document_BL[mask_BL].tolist(), nats_BL[mask_BL].tolist(), strict=True
        ):
            nats[number] = nats.get(number, 0.0) + value
            rest[number] -= 1
        while rest.get(done) == 0:
            yield done, nats.pop(done, 0.0) / np.log(2) / max(1, size.pop(done))
            rest.pop(done)
            done += 1


def _scored(
    documents: Iterable[Document], made, tokens: int, size: dict[int, int], rest: dict[int, int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (number, tokens to score), and notes how many bytes and tokens those are."""
    for number, document in enumerate(documents):
        token_T = np.array(made.encode(document.text), np.int32)
        whole = not tokens or len(token_T) <= tokens
        token_T = token_T if whole else token_T[:tokens]
        text = document.text if whole else made.decode(token_T.tolist())
        size[number], rest[number] = len(text.encode()), len(token_T)
        yield number, token_T


def _batches(
    scored: Iterable[tuple[int, np.ndarray]], end_id: int, length: int
) -> Iterator[data.Batch]:
    """Packs documents one after the other into batches of full windows; the last one is padded."""
    target, document, size = [], [], 0
    last = end_id
    for number, token_T in scored:
        target.append(token_T)
        document.append(np.full(len(token_T), number, np.int32))
        size += len(token_T)
        if size >= BATCH * length:
            target_T, document_T = np.concatenate(target), np.concatenate(document)
            while len(target_T) >= BATCH * length:
                yield _batch(target_T[: BATCH * length], document_T[: BATCH * length], last, length)
                last = int(target_T[BATCH * length - 1])
                target_T, document_T = target_T[BATCH * length :], document_T[BATCH * length :]
            target, document, size = [target_T], [document_T], len(target_T)
    if target:
        yield _batch(np.concatenate(target), np.concatenate(document), last, length)


def _batch(target_T: np.ndarray, document_T: np.ndarray, before: int, length: int) -> data.Batch:
    count, shape = len(target_T), (BATCH, length)
    token_T = np.concatenate([[before], target_T[:-1]]).astype(np.int32) if count else target_T

    def padded(array_T: np.ndarray, fill) -> np.ndarray:
        full = np.full(BATCH * length, fill, array_T.dtype)
        full[:count] = array_T
        return full.reshape(shape)

    return data.Batch(
        padded(token_T, 0),
        padded(target_T, 0),
        padded(np.ones(count, bool), False),
        np.zeros(BATCH, np.int32),
        padded(document_T, -1),
    )
