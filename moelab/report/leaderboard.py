"""experiments/baselines/README.md, generated from the committed cards."""

from __future__ import annotations

from pathlib import Path

from moelab import schema
from moelab.report import arms, arms_tables, baselines, crossing, tables
from moelab.report.baselines import Family
from moelab.report.runs import Run

HEAD = """\
# Baselines

Generated from `cards/` by `moelab baselines render`; a test fails when it is stale. A card is a run's whole result card
with its learning curve, no weights. Numbers are bits per byte on the fixed test split, lower is better.

    moelab verify experiments/baselines/cards/FAMILY/ARM.json   # digests, config hashes, sums of committed cards
    moelab verify --rerun FAMILY/ARM                            # run it again: must land within the measured drift
    moelab verify --rerun FAMILY/ARM --seed=7                   # another seed: within the prediction interval

To cite one, name the arm, the seeds and the first digits of a card's SHA-256 (`moelab report CARD --bibtex` has the
methods' papers; [CITATION.cff](../../CITATION.cff) the toolkit). The tables of earlier studies, three seeds each, are
in [experiments/README.md](../README.md).
"""


def render(folder: Path | str = baselines.FOLDER) -> str:
    """Writes the leaderboard of every family.

    Raises:
      ReportError: a card that cannot be read, or runs of a family that do not compare.
    """
    folder = Path(folder)
    parts = [HEAD]
    for found in baselines.families(folder).values():
        runs = [
            r
            for p in sorted((folder / baselines.CARDS / found.name).glob("*.json"))
            for r in baselines.load(p)
        ]
        parts.append(_family(found, runs))
    return "\n".join(parts)


def _family(found: Family, runs: list[Run]) -> str:
    commands = "\n".join(f"    {command}" for command in found.commands)
    parts = [f"## {found.title}\n", f"{found.text}\n", f"{commands}\n"]
    if not runs:
        return "\n".join([*parts, "No run yet.\n"])
    grouped = arms.group(runs)
    for wanted in found.tables:
        chosen = [a for a in grouped if a.name in wanted["arms"]] if "arms" in wanted else grouped
        parts.append(_table(found, wanted, chosen))
    return "\n".join(parts)


def _table(found: Family, wanted, chosen: list[arms.Arm]) -> str:
    if not chosen:
        return f"{wanted.get('title', 'This table')}: no run yet.\n"
    there = {arm.name for arm in chosen}
    reference = wanted.get("reference", "")
    missing = sorted(set(wanted.get("arms", ())) - there)
    compared = arms.compare(
        chosen,
        reference if reference in there else "",
        wanted.get("precision", "float32"),
        different_tokens=found.different_tokens,
    )
    main = arms_tables.main_table(compared)
    parts = [f"{main.title}.\n", tables.to_markdown(main)]
    told = [*arms_tables.notes(compared), *crossing.notes(compared)]
    parts += [f"- {note}" for note in told]
    ran = compared.reference.first.config_schema
    if ran != schema.SCHEMA:
        parts.append(
            f"- Of schema {ran} of configs; this moelab has {schema.SCHEMA}, where defaults or meanings differ: these "
            "arms cannot be run again with it."
        )
    if missing:
        parts.append(f"- Not run yet: {', '.join(missing)}.")
    parts += ["", arms_tables.limits(compared) + "\n"]
    points = arms_tables.points_table(compared)
    parts += [
        "<details><summary>Every point</summary>\n",
        tables.to_markdown(points),
        "</details>\n",
    ]
    return "\n".join(parts)
