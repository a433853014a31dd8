"""A built dataset on disk: token files, an index of documents, a manifest, and their verification.

    manifest.json        counts, sources, hashes; nothing that differs between two builds
    tokenizer.json
    <split>/documents.npz
    <split>/<number>-<domain>.bin    documents one after the other, each ended by end_id

N documents of a split, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import pathlib
import zipfile

import numpy as np

from moelab.data import files, tokenizer
from moelab.data.document import DataError
from moelab.data.split import SPLITS, order_key
from moelab.spelling import hint

FORMAT = 1  # of the folder; raised when old folders can no longer be read
MANIFEST = "manifest.json"
INDEX = "documents.npz"


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSplit:
    """The documents of one split.

    Documents are numbered over the whole split, domain by domain, in the order of their source.

    Attributes:
      name: "train", "validation" or "test".
      domains: names; a domain's position is its index everywhere.
      tokens: for each domain the concatenated documents, uint16 or uint32, memory-mapped.
      end_id: the token that ends every document.
      domain_N: int32 index of the document's domain.
      offset_N: int64 position of its first token in tokens[domain].
      num_tokens_N: int64 tokens, the end token included.
      num_bytes_N: int64 UTF-8 bytes of the text; 0 where unknown (token files without tokenizer).
    """

    name: str
    domains: tuple[str, ...]
    tokens: tuple[np.ndarray, ...]
    end_id: int
    domain_N: np.ndarray
    offset_N: np.ndarray
    num_tokens_N: np.ndarray
    num_bytes_N: np.ndarray
    _id_bytes: np.ndarray
    _id_stop_N: np.ndarray

    def __len__(self) -> int:
        return len(self.domain_N)

    @functools.cached_property
    def ids(self) -> tuple[str, ...]:
        """The documents' ids."""
        content, start, result = self._id_bytes.tobytes(), 0, []
        for stop in self._id_stop_N.tolist():
            result.append(content[start:stop].decode())
            start = stop
        return tuple(result)

    def document(self, index: int) -> np.ndarray:
        """Returns the tokens of one document, its end token included."""
        start = self.offset_N[index]
        return self.tokens[self.domain_N[index]][start : start + self.num_tokens_N[index]]

    def take(self, chosen_N: np.ndarray) -> TokenSplit:
        """Returns a split of the documents that bool chosen_N marks, numbered anew; the tokens are not copied."""
        ids = [self.ids[i].encode() for i in np.flatnonzero(chosen_N).tolist()]
        columns = ("domain_N", "offset_N", "num_tokens_N", "num_bytes_N")
        return dataclasses.replace(
            self,
            **{name: getattr(self, name)[chosen_N] for name in columns},
            _id_bytes=np.frombuffer(b"".join(ids), np.uint8),
            _id_stop_N=np.cumsum([len(one) for one in ids], dtype=np.int64),
        )

    def of_domain(self, domain: int) -> np.ndarray:
        """Returns the indices of a domain's documents, which are consecutive."""
        first, last = np.searchsorted(self.domain_N, [domain, domain + 1])
        return np.arange(first, last)

    def by_hash(self, domain: int) -> np.ndarray:
        """Returns the indices of a domain's documents in the order of their hash: a fixed shuffle."""
        name = self.domains[domain]
        return np.array(
            sorted(
                self.of_domain(domain),
                key=lambda index: order_key(name, self.ids[index], self.name),
            ),
            np.int64,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Tokens of a corpus in three splits.

    Attributes:
      directory: where it lies.
      manifest: sources, counts, hashes; manifest["sha256"] names all of it.
      tokenizer: encode, decode, vocab_size, end_id, sha256.
    """

    directory: pathlib.Path
    manifest: dict
    tokenizer: tokenizer.Bytes | tokenizer.Bpe | tokenizer.External

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, in the order of their index."""
        return tuple(self.manifest["domains"])

    @property
    def sha256(self) -> str:
        """Hash of everything: texts, splits, tokenizer and tokens."""
        return self.manifest["sha256"]

    @functools.cached_property
    def token_counts(self) -> tuple[int, ...]:
        """How often each id of the vocabulary occurs in the training split."""
        size = self.tokenizer.vocab_size
        parts = [np.bincount(t, minlength=size) for t in self.split("train").tokens]
        return tuple(sum(parts, np.zeros(size, np.int64)).tolist())

    def split(self, name: str) -> TokenSplit:
        """Opens a split; an empty one has no documents, and whoever needs some says so.

        Raises:
          DataError: the name is none of train, validation, test.
        """
        if name not in SPLITS:
            known = ", ".join(SPLITS)
            raise DataError(f"no split {name!r}, wanted one of {known}{hint(name, SPLITS)}")
        return self._splits[name]

    @functools.cached_property
    def quality(self):
        """Labels and scores of the training documents (quality.table.Table); None where there are none."""
        from moelab.data.quality import table  # which imports this

        return table.read(self.directory)

    def with_training(self, split: TokenSplit) -> Dataset:
        """Returns the dataset with another training split; manifest and `quality` stay those of the whole."""
        found = dataclasses.replace(self)
        found.__dict__["_splits"] = self._splits | {"train": split}  # as cached_property does
        return found

    @functools.cached_property
    def _splits(self) -> dict[str, TokenSplit]:
        return {name: self._open(name) for name in SPLITS}

    def _open(self, name: str) -> TokenSplit:
        dtype = np.dtype(self.manifest["dtype"])
        counts = self.manifest["splits"][name]["domains"]
        tokens = tuple(
            _map(self.directory / counts[domain]["file"], dtype, counts[domain]["tokens"])
            for domain in self.domains
        )
        with np.load(self.directory / name / INDEX, allow_pickle=False) as index:
            columns = {column: index[column] for column in INDEX_COLUMNS}
        return TokenSplit(name, self.domains, tokens, self.tokenizer.end_id, *columns.values())


def _map(path: pathlib.Path, dtype: np.dtype, num_tokens: int) -> np.ndarray:
    return np.memmap(path, dtype, "r", shape=num_tokens) if num_tokens else np.zeros(0, dtype)


# Columns of documents.npz, in the order of TokenSplit's fields.
INDEX_COLUMNS = ("domain", "offset", "num_tokens", "num_bytes", "id_bytes", "id_stop")


def write_index(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a split's index."""
    write_arrays(path, {name: arrays[name] for name in INDEX_COLUMNS})


def write_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an .npz without time stamps (numpy.savez has them): the same arrays, the same bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in arrays:
            content = io.BytesIO()
            np.lib.format.write_array(content, arrays[name], allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue())


def manifest_sha256(manifest: dict) -> str:
    """Returns the hash of a manifest's canonical JSON, its own "sha256" left out."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def load(directory: pathlib.Path | str) -> Dataset:
    """Opens a dataset that build() made; sizes are checked here, contents by verify().

    Raises:
      DataError: it is no dataset, is of another format, or a file is missing or cut.
    """
    directory = pathlib.Path(directory)
    manifest = read_manifest(directory)
    problems = size_problems(directory, manifest)
    if problems:
        raise DataError(f"{directory}: damaged: {'; '.join(problems)}; delete it and build again")
    return Dataset(directory, manifest, tokenizer.load(directory, manifest["tokenizer"]))


def read_manifest(directory: pathlib.Path) -> dict:
    """Reads and checks manifest.json.

    Raises:
      DataError: it is missing, not JSON, of another format, or does not have its own hash.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise DataError(f"{directory}: no dataset: {MANIFEST} is missing")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path}: not of format {FORMAT}; delete {directory} and build again")
    if manifest.get("sha256") != manifest_sha256(manifest):
        raise DataError(f"{path}: does not have the sha256 that it states")
    return manifest


def size_problems(directory: pathlib.Path, manifest: dict) -> list[str]:
    """Lists the files that are missing or have another size than the manifest says."""
    problems = []
    for name, entry in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry["size"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, wanted {entry['size']}")
    return problems


def verify(directory: pathlib.Path | str) -> list[str]:
    """Reads every byte of a dataset and lists what is not as its manifest says; empty means sound."""
    directory = pathlib.Path(directory)
    try:
        manifest = read_manifest(directory)
    except DataError as error:
        return [str(error)]
    problems = size_problems(directory, manifest)
    for name, entry in manifest["files"].items():
        path = directory / name
        if path.is_file() and path.stat().st_size == entry["size"]:
            came = files.digest(path)
            if came != entry["sha256"]:
                problems.append(
                    f"{name} has sha256 {came[:16]}..., wanted {entry['sha256'][:16]}..."
                )
    return problems
