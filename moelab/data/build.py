"""Documents in, a dataset folder out: split, train the tokenizer, encode, write, rename.

A dataset is built in a temporary folder and renamed into place, so that it is there whole or not at
all; its name is a hash of the text and of every setting, so that a second call only opens it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from moelab import schema
from moelab.data import dataset, quality, sources, tokenizer
from moelab.data import writer as writing
from moelab.data.document import DataError, Document, TokenDocument
from moelab.data.split import SPLITS, split_of

BATCH_CHARACTERS = 4_000_000  # text encoded together

Progress = Callable[[str, int, int], None]


def build(data_section, tokenizer_section, *, cache=None, progress: Progress | None = None):
    """Opens the dataset of a config, and builds it first where the cache does not have it.

    Args:
      data_section: a dataclass of schema.KINDS["data"], or a ConfigDict or dict with its fields.
      tokenizer_section: likewise of schema.KINDS["tokenizer"].
      cache: folder for datasets; default $MOELAB_CACHE, else ./cache.
      progress: called with (what is done, documents so far, documents in all or 0 if unknown).

    Returns:
      A Dataset. Two processes that build the same one get the same folder.

    Raises:
      DataError: the data, or a setting of it, is not as wanted.
    """
    root = cache_directory(cache) / "data"
    section = as_section("data", data_section)
    settings = as_section("tokenizer", tokenizer_section)
    source = sources.open_source(section, root / "files")
    directory = root / _name(source, section, settings)
    if not _usable(directory):
        progress = progress or _silent
        with _lock(root / f".{directory.name}.lock", progress) as locked:
            if locked:
                _remove_leftovers(directory)
            if not _usable(directory):  # another process may have built it meanwhile
                _build_into(directory, source, section, settings, progress)
    return dataset.load(directory)


def cache_directory(cache=None) -> pathlib.Path:
    """Returns the cache's folder: the one given, else $MOELAB_CACHE, else ./cache."""
    return pathlib.Path(cache or os.environ.get("MOELAB_CACHE") or "cache").absolute()


def _silent(text: str, done: int, total: int) -> None:
    del text, done, total


def as_section(name: str, section):
    """Makes the frozen dataclass of a section; config.py has checked the names before."""
    kinds = schema.KINDS[name]
    if isinstance(section, tuple(kinds.values())):
        return section
    fields = dict(section)
    kind = fields.get("kind")
    if kind not in kinds:
        raise DataError(f"{name}.kind is {kind!r}, wanted one of {', '.join(kinds)}")
    fields = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
    try:
        return kinds[kind](**fields)
    except TypeError as error:
        raise DataError(f"{name}: {error}") from error


def _name(source, section, settings) -> str:
    """Names a dataset by all that decides its bytes; a path is not among that, its files are."""
    content = {
        "format": dataset.FORMAT,
        "source": source.name,
        "identity": source.identity(),
        "tokenizer": _tokenizer_identity(section, settings),
    } | quality.identity(section)
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return f"{source.name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"


def _tokenizer_identity(section, settings) -> dict:
    if section.kind == "tokens":
        return {"kind": "external"}
    if settings.kind == "byte":
        return {"kind": "byte"}
    import tokenizers

    return dataclasses.asdict(settings) | {"version": tokenizers.__version__}


def _usable(directory: pathlib.Path) -> bool:
    if not directory.is_dir():
        return False
    try:
        return not dataset.size_problems(directory, dataset.read_manifest(directory))
    except DataError:
        return False


@contextlib.contextmanager
def _lock(path: pathlib.Path, progress: Progress) -> Iterator[bool]:
    """Keeps a second process from the same work; yields whether the file system can do that.

    Where it cannot, the rename still leaves one whole dataset.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress("waiting for another process that builds this dataset", 0, 0)
                fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        except (ImportError, OSError):  # not POSIX, or a network file system without locks
            locked = False
        yield locked


def _remove_leftovers(directory: pathlib.Path) -> None:
    """Removes what killed builders left; only under the lock, or it could be a live one's."""
    for leftover in directory.parent.glob(f".tmp-{directory.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _build_into(directory: pathlib.Path, source, section, settings, progress: Progress) -> None:
    if directory.exists():
        print(f"WARNING: {directory} is damaged and is built again", file=sys.stderr, flush=True)
        shutil.rmtree(directory)
    prefix = f".tmp-{directory.name}-"
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=directory.parent))
    try:
        _write(temporary, source, section, settings, progress)
        temporary.chmod(0o755)
        os.rename(temporary, directory)
    except OSError:
        if not _usable(directory):  # else another process was first, with the same bytes
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(directory: pathlib.Path, source, section, settings, progress: Progress) -> None:
    progress("reading", 0, 0)
    made, total = _make_tokenizer(source, section, settings, progress)
    (directory / tokenizer.FILE).write_text(made.text, encoding="utf-8")
    writer = writing.Writer(directory, made)
    documents = ((one, split_of(one.domain, one.id)) for one in source.documents())
    found = quality.prepare(source, section, made, progress)
    if found:
        documents, total = found.documents(), 0  # how many are left of all splits is not counted
    with contextlib.closing(writer):
        for done, (document, split, tokens, num_bytes) in enumerate(_encoded(documents, made), 1):
            writer.add(document, split, tokens, num_bytes)
            if done % 500 == 0:
                progress("encoding", done, total)
    if not writer.rows:
        raise DataError("the data has no document with text in it")
    progress("encoding", writer.num_documents, writer.num_documents)
    manifest = writing.manifest(writer, source, made, found)
    (directory / dataset.MANIFEST).write_text(
        json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8"
    )


def _make_tokenizer(source, section, settings, progress: Progress):
    """Returns the tokenizer and the number of documents (0 where a pass to count them is not needed)."""
    if section.kind == "tokens":
        text = source.tokenizer_file.read_text(encoding="utf-8") if source.tokenizer_file else ""
        return tokenizer.External(section.vocab_size, section.end_id, text), 0
    if settings.kind == "byte":
        return tokenizer.Bytes(), 0
    counts = collections.Counter()

    def training_texts() -> Iterator[str]:
        for document in source.documents():
            split = split_of(document.domain, document.id)
            counts[split] += 1
            if split == "train" and document.text:
                counts["characters"] += len(document.text)
                yield document.text

    progress("training the tokenizer", 0, 0)
    made = tokenizer.train_bpe(training_texts(), settings.vocab_size)
    total = sum(counts[split] for split in SPLITS)
    if not counts["characters"]:
        raise DataError(
            f"the training split is empty ({total} documents in all), and the tokenizer is trained "
            "on it; add documents or set tokenizer.kind = byte"
        )
    return made, total


def _encoded(
    documents: Iterable[tuple[Document | TokenDocument, str]], made
) -> Iterator[tuple[Document | TokenDocument, str, np.ndarray, int]]:
    """Yields every document and its split with its tokens and the bytes of its text."""
    for batch in _batches(documents):
        if isinstance(batch[0][0], TokenDocument):
            for document, split in batch:
                yield document, split, document.token_T, document.num_bytes
            continue
        tokens = made.encode_batch([document.text for document, _ in batch])
        for (document, split), token_T in zip(batch, tokens, strict=True):
            yield document, split, token_T, len(document.text.encode())


def _batches(documents: Iterable[tuple]) -> Iterator[list[tuple]]:
    batch, characters = [], 0
    for document, split in documents:
        batch.append((document, split))
        characters += len(
            document.token_T if isinstance(document, TokenDocument) else document.text
        )
        if characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
