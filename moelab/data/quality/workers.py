"""Maps a function over documents in several processes, in order, as a stream, with a bounded number in flight."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from moelab.data.document import Document

CHUNK = 400_000  # characters that one call gets
ALONE = 3  # with at most so many chunks, starting processes costs more than it saves
_started: list[int] = []  # workers of the processes that may be waiting


def num_workers() -> int:
    """Returns the cores that this process may use, or $MOELAB_DATA_WORKERS."""
    asked = os.environ.get("MOELAB_DATA_WORKERS", "")
    return int(asked) if asked.isdigit() and int(asked) else len(os.sched_getaffinity(0))


def chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Cuts a stream of documents into lists of about CHUNK characters."""
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= CHUNK:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def map_chunks(
    function: Callable[[list[Document]], Any],
    documents: Iterable[Document],
    workers: int | None = None,
) -> Iterator[Any]:
    """Yields function(chunk) for each chunk of the documents, in order.

    Args:
      function: picklable, as a partial of a module's function is.
      documents: read as results are asked for, a few chunks ahead.
      workers: processes; 1: this one; None: num_workers().
    """
    stream = chunks(documents)
    first = list(itertools.islice(stream, ALONE + 1))
    workers = workers or num_workers()
    if workers == 1 or len(first) <= ALONE:
        yield from map(function, itertools.chain(first, stream))
        return
    try:
        import joblib
    except ImportError:  # without the extra `data`: one process, the same results
        yield from map(function, itertools.chain(first, stream))
        return
    _started.append(workers)
    # loky's processes need no guard around the caller's main module, and are not forks of its threads.
    parallel = joblib.Parallel(
        workers, backend="loky", return_as="generator", max_nbytes=None, batch_size=1
    )
    work = joblib.delayed(function)
    yield from parallel(work(chunk) for chunk in itertools.chain(first, stream))


def stop() -> None:
    """Ends the processes that `map_chunks` left waiting for more."""
    if _started:
        from joblib.externals import loky

        loky.get_reusable_executor(max_workers=_started.pop()).shutdown(wait=True)
        _started.clear()
