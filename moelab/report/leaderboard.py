"""experiments/baselines/README.md, generated from the committed cards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from moelab import atomic, schema
from moelab.report import arms, arms_measures, arms_tables, baselines, canvas, crossing, tables
from moelab.report.baselines import Family
from moelab.report.runs import ReportError, Run

HEAD = f"""\
# Baselines

Generated from `cards/` by `moelab baselines render`; a test fails when it is stale. A card is a run's whole result card
with its learning curve, no weights. Numbers are bits per byte on fixed documents of the test split, lower is better;
those of the tables that chose a learning rate or a filter are of the validation split. How many documents is said under
each table.

{arms_tables.PAIRED}

    moelab verify experiments/baselines/cards/FAMILY/ARM.json   # digests, config hashes, sums of committed cards
    moelab verify --rerun FAMILY/ARM                            # run it again: must land within the drift
    moelab verify --rerun FAMILY/ARM --seed=7                   # another seed: within the prediction interval

The drift is what the same seed gave on other kinds of machine in runs of as many tokens (`drift.json`, 95 %); where
none was measured the prediction interval of the arm's seeds takes its place. To cite an arm, name it, its seeds and the
commit of this repository (`moelab report cards/FAMILY --bibtex` has the methods' papers;
[CITATION.cff](../../CITATION.cff) the toolkit). The tables of earlier studies, three seeds each, are in
[experiments/README.md](../README.md).
"""

_DRAWING = "2"  # another where a picture would look otherwise


def render(folder: Path | str = baselines.FOLDER) -> str:
    """Writes the leaderboard of every family.

    Raises:
      ReportError: a card that cannot be read, or runs of a family that do not compare.
    """
    folder = Path(folder)
    parts = [HEAD]
    for found in baselines.families(folder).values():
        parts.append(_family(found, _runs(found, folder)))
    return "\n".join(parts)


def pictures(folder: Path | str = baselines.FOLDER) -> dict[Path, tuple[arms.Comparison, str]]:
    """Returns what the pictures of the leaderboard show and are made from: a digest of the table and its cards.

    Raises:
      ReportError: as `render`, or there is something to draw and no matplotlib (extra `report`).
    """
    folder, found = Path(folder), {}
    for family in baselines.families(folder).values():
        grouped = arms.group(_runs(family, folder))
        for wanted in family.tables:
            compared = _compared(family, wanted, grouped) if "picture" in wanted else None
            if compared is not None and crossing.drawable(compared):
                if not canvas.available():
                    raise ReportError(
                        f"{wanted['picture']}: drawing wants the extra `report`: pip install 'moelab[report]'"
                    )
                runs = [run for arm in compared.arms for run in arm.runs.values()]
                made_from = [
                    _DRAWING,
                    json.dumps(wanted),
                    *(run.card["card_sha256"] for run in runs),
                ]
                digest = hashlib.sha256("\n".join(made_from).encode()).hexdigest()
                found[folder / wanted["picture"]] = compared, digest
    return found


def write(folder: Path | str = baselines.FOLDER) -> list[Path]:
    """Writes the leaderboard and its pictures.

    Raises:
      ReportError: as `render`.
    """
    readme, drawn = Path(folder) / baselines.README, pictures(folder)
    text = render(folder)
    for path, (compared, digest) in drawn.items():
        with atomic.replacing(path) as temporary:
            crossing.write_png(compared, temporary, digest)
    return [atomic.write_text(readme, text), *drawn]


def add(runs: Sequence[Run], family: str, folder: Path | str = baselines.FOLDER) -> list[Path]:
    """Writes finished runs as cards of a family, and the leaderboard; where that is refused nothing is changed.

    Returns:
      The files written.

    Raises:
      ReportError: as `baselines.texts`; the family's runs do not compare with them.
    """
    made, folder = baselines.texts(runs, family, folder), Path(folder)
    tables_of = [table for found in baselines.families(folder).values() for table in found.tables]
    drawn = [folder / table["picture"] for table in tables_of if "picture" in table]
    paths = [*made, folder / baselines.README, *drawn]
    before = {path: path.read_bytes() if path.exists() else None for path in paths}
    try:
        for path, text in made.items():
            atomic.write_text(path, text)
        return [*made, *write(folder)]
    except BaseException:
        for path, content in before.items():
            if content is None:
                path.unlink(missing_ok=True)
            elif path.read_bytes() != content:
                path.write_bytes(content)
        raise


def stale(folder: Path | str = baselines.FOLDER) -> list[Path]:
    """Lists the files that `write` would change.

    Raises:
      ReportError: as `render`.
    """
    readme = Path(folder) / baselines.README
    same = readme.is_file() and readme.read_text(encoding="utf-8") == render(folder)
    old = [
        path
        for path, (_, digest) in pictures(folder).items()
        if canvas.png_made_from(path) != digest
    ]
    return [*([] if same else [readme]), *old]


def _runs(family: Family, folder: Path) -> list[Run]:
    paths = sorted((folder / baselines.CARDS / family.name).glob("*.json"))
    return [run for path in paths for run in baselines.load(path)]


def _compared(found: Family, wanted, grouped: list[arms.Arm]) -> arms.Comparison | None:
    """The comparison of a table; None where none of its arms has run."""
    chosen = [a for a in grouped if a.name in wanted["arms"]] if "arms" in wanted else grouped
    if not chosen:
        return None
    reference = wanted.get("reference", "")
    return arms.compare(
        chosen,
        reference if reference in {arm.name for arm in chosen} else "",
        wanted.get("precision", "float32"),
        different_tokens=found.different_tokens,
    )


def _family(found: Family, runs: list[Run]) -> str:
    commands = "\n".join(f"    {command}" for command in found.commands)
    parts = [f"## {found.title}\n", f"{found.text}\n", f"{commands}\n"]
    if not runs:
        return "\n".join([*parts, "No run yet.\n"])
    grouped = arms.group(runs)
    for wanted in found.tables:
        parts.append(_table(wanted, _compared(found, wanted, grouped)))
    return "\n".join(parts)


def _table(wanted, compared: arms.Comparison | None) -> str:
    if compared is None:
        return f"{wanted.get('title', 'This table')}: no run yet.\n"
    shown = {arm.name for arm in compared.arms}
    missing = sorted({*wanted.get("arms", ()), *filter(None, [wanted.get("reference")])} - shown)
    main = arms_tables.main_table(compared)
    parts = [f"{tables.markdown_text(main.title)}.\n", tables.to_markdown(main)]
    told = [*arms_tables.notes(compared), *crossing.notes(compared)]
    parts += [f"- {tables.markdown_text(note)}" for note in told]
    ran = compared.reference.first.config_schema
    if ran != schema.SCHEMA:
        parts.append(
            f"- Of schema {ran} of configs; this moelab has {schema.SCHEMA}, where defaults or meanings differ: these "
            "arms cannot be run again with it."
        )
    if missing:
        text = f"- Not run yet: {', '.join(missing)}."
        if wanted.get("reference") in missing:
            text += f" {compared.reference.name} stands in as the reference."
        parts.append(text)
    parts += ["", arms_tables.limits(compared) + "\n"]
    if "picture" in wanted and crossing.drawable(compared):
        parts.append(
            f"![Validation against training FLOPs]({wanted['picture']})\n\n{crossing.CAPTION}\n"
        )
    points = arms_tables.points_table(compared)
    parts += [
        "<details><summary>Every point, domains</summary>\n",
        tables.to_markdown(points),
    ]
    for table in arms_measures.all_tables(compared):
        parts += [f"{tables.markdown_text(table.title)}.\n", tables.to_markdown(table)]
    parts.append("</details>\n")
    return "\n".join(parts)
