"""Users' own documents: a folder of text, JSON lines or Parquet, read as a stream.

Every reader yields Documents one at a time, in a fixed order, and can be read twice. What it cannot
read is an error with file and line; nothing is skipped.
"""

from __future__ import annotations

import gzip
import json
import pathlib
import sys
import zlib
from collections.abc import Iterator

from moelab import schema
from moelab.data import corpus, files, token_files
from moelab.data.document import DataError, Document
from moelab.spelling import hint

JSON_PATTERNS = tuple(f"**/*{end}{gz}" for end in (".jsonl", ".ndjson") for gz in ("", ".gz"))


class _FileSource:
    """What the three readers share: a selection of files, known by content."""

    fallback = False
    domains = ()  # those found, by name

    def __init__(self, name: str, selection: list, memory: pathlib.Path, settings: dict):
        self.name = name
        self.selection = selection
        self._settings = settings
        self._digests = files.digests(selection, memory)

    def identity(self) -> dict:
        """Returns what decides the content: the reader's settings and every file's hash."""
        return {"settings": self._settings, "files": self._digests}

    def origins(self) -> dict[str, dict]:
        """Returns nothing: where users' files come from is theirs to say."""
        return {}

    def documents(self) -> Iterator[Document]:
        """Yields every document, file by file."""
        for name, path in self.selection:
            yield from self.read(name, path)

    def read(self, name: str, path: pathlib.Path) -> Iterator[Document]:
        """Yields the documents of one file."""
        raise NotImplementedError


class TextSource(_FileSource):
    """A folder of UTF-8 text files, a document each; the first folder level is the domain."""

    def __init__(self, section: schema.TextFolder, memory: pathlib.Path):
        self.root = files.existing(section.path)
        if not self.root.is_dir():
            raise DataError(f"data.path {section.path}: a file came, a folder of texts was wanted")
        selection = files.select(self.root, (section.pattern,))
        # The domain of files at the top is the folder's own name, so the name is content too.
        folder = self.root.resolve().name
        if any("/" not in name for name, _ in selection):
            files.check_name(folder, self.root.resolve())
        super().__init__("text", selection, memory, {"folder": folder})

    def read(self, name: str, path: pathlib.Path) -> Iterator[Document]:
        """Yields the file's text, its bytes unchanged."""
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise DataError(f"{path}:{line}: not UTF-8 (byte {error.start})") from error
        parts = name.split("/")
        domain = parts[0] if len(parts) > 1 else self.root.resolve().name
        yield Document(domain, name, text)


class _TableSource(_FileSource):
    """Readers of records with a text column and, if wanted, columns for the domain and the id."""

    def __init__(self, section, patterns: tuple[str, ...], memory: pathlib.Path):
        selection = files.select(files.existing(section.path), patterns)
        self.columns = section
        settings = {
            field: getattr(section, field)
            for field in ("text_column", "domain_column", "id_column")
        }
        super().__init__(section.kind, selection, memory, settings)

    def document(self, record: dict, name: str, row: int, where: str) -> Document:
        """Makes a document of one record; `row` counts from 1, `where` names it in errors."""
        wanted = self.columns
        text = _field(record, wanted.text_column, "data.text_column", where)
        text = "" if text is None else text  # a null is an empty document, and counted as one
        if not isinstance(text, str):
            raise DataError(
                f"{where}: {wanted.text_column!r} is {type(text).__name__}, wanted a string"
            )
        domain = pathlib.PurePosixPath(name).name.split(".")[0]
        if wanted.domain_column:
            domain = _label(record, wanted.domain_column, "data.domain_column", where)
        document_id = f"{name}:{row}"
        if wanted.id_column:
            document_id = _label(record, wanted.id_column, "data.id_column", where)
        for value in (text, domain, document_id):
            _check_encodable(value, where)
        return Document(domain, document_id, text)


def _field(record: dict, column: str, option: str, where: str):
    if column not in record:
        raise DataError(
            f"{where}: no column {column!r} ({option}); it has {', '.join(map(repr, record))}"
            + hint(column, record)
        )
    return record[column]


def _label(record: dict, column: str, option: str, where: str) -> str:
    value = _field(record, column, option, where)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(f"{where}: {column!r} is {value!r}, wanted a name or number ({option})")
    return str(value)


def _check_encodable(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise DataError(f"{where}: not Unicode text: {error.reason} ({error.start})") from error


class JsonSource(_TableSource):
    """JSON lines, plain or gzip: an object per line; blank lines hold no document."""

    def __init__(self, section: schema.JsonLines, memory: pathlib.Path):
        super().__init__(section, JSON_PATTERNS, memory)

    def read(self, name: str, path: pathlib.Path) -> Iterator[Document]:
        """Yields the file's documents, line by line."""
        opened = gzip.open if path.suffix == ".gz" else open
        number = 0
        try:
            with opened(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        where = f"{path}:{number}"
                        yield self.document(_parse(line, where), name, number, where)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: damaged gzip after line {number}: {error}") from error


def _parse(line: bytes, where: str) -> dict:
    try:
        record = json.loads(line.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start} of the line)") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} (column {error.colno})") from error
    except RecursionError:
        raise DataError(f"{where}: lists or objects inside each other, too deep to read") from None
    except ValueError as error:  # the limit that Python sets on the digits of an integer
        most = sys.get_int_max_str_digits()
        raise DataError(f"{where}: an integer of more than {most:,} digits") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: {type(record).__name__}, wanted an object {{...}} per line")
    return record


class ParquetSource(_TableSource):
    """Parquet files, a document per row, read in batches of rows."""

    def __init__(self, section: schema.Parquet, memory: pathlib.Path):
        super().__init__(section, ("**/*.parquet",), memory)

    def read(self, name: str, path: pathlib.Path) -> Iterator[Document]:
        """Yields the file's documents, row by row."""
        import pyarrow
        import pyarrow.parquet

        options = ("text_column", "domain_column", "id_column")
        wanted = {option: getattr(self.columns, option) for option in options}
        wanted = {option: column for option, column in wanted.items() if column}
        row = 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                present = dict.fromkeys(file.schema_arrow.names)
                for option, column in wanted.items():
                    _field(present, column, f"data.{option}", str(path))
                columns = list(dict.fromkeys(wanted.values()))
                for batch in file.iter_batches(batch_size=1024, columns=columns):
                    for record in batch.to_pylist():
                        row += 1
                        yield self.document(record, name, row, f"{path}: row {row}")
        except (pyarrow.ArrowInvalid, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: unreadable Parquet after row {row}: {error}") from error


def open_source(section, memory: pathlib.Path):
    """Opens the source that a data section describes.

    Args:
      section: a dataclass of schema.KINDS["data"].
      memory: folder of the cache where file hashes are remembered.

    Returns:
      An object with `name`, `fallback`, `identity()`, `origins()` and `documents()`, which yields
      Documents or TokenDocuments.

    Raises:
      DataError: the path, the selection or the installed corpus is not as wanted.
    """
    match section:
        case schema.Corpus():
            return corpus.open_corpus(section.domains)
        case schema.TextFolder():
            return TextSource(section, memory)
        case schema.JsonLines():
            return JsonSource(section, memory)
        case schema.Parquet():
            return ParquetSource(section, memory)
        case schema.TokenFile():
            return token_files.TokenSource(section, memory)
    raise DataError(f"data: no source for {section!r}")
