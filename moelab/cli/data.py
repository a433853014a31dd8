"""`moelab data ...`: text that is built, described, scored, filtered. No jax beyond what the config imports."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from moelab import environment
from moelab.cli import output, quality_tables
from moelab.cli.running import load_config
from moelab.errors import UserError
from moelab.progress import data_progress


def build(args: argparse.Namespace) -> int:
    """Builds the dataset of a config, or finds it built, and prints its folder."""
    dataset = _dataset(args)
    if args.json:
        output.print_json(
            {"directory": dataset.directory, "sha256": dataset.sha256, "domains": dataset.domains}
        )
    else:
        print(dataset.directory)
    return 0


def show(args: argparse.Namespace) -> int:
    """Prints sources, counts and a sample of each domain, and what was injected and filtered."""
    from moelab import data

    dataset = _dataset(args)
    found = data.describe(dataset)
    if "quality" in found and found["quality"]["outcomes"]:
        found["all_filters"] = _together(found["quality"])
    if args.json:
        output.print_json(found)
        return 0
    print(f"{found['directory']}\nsha256 {found['sha256']}\n")
    keys = ("split", "domain", "documents", "bytes", "tokens", "bytes_per_token")
    output.print_table(keys, [[_cell(row[key]) for key in keys] for row in found["rows"]])
    keys = list(dict.fromkeys(key for row in found["sources"] for key in row if key != "sha256"))
    if len(keys) > 1:
        print()
        output.print_table(keys, [[row.get(key) for key in keys] for row in found["sources"]])
    if "quality" in found:
        quality_tables.print_labels(found["quality"])
        quality_tables.print_outcomes(found["quality"]["outcomes"], found.get("all_filters"))
    if dataset.tokenizer.kind != "external":
        print()
        texts = ((one.domain, " ".join(one.text[:200].split())) for one in data.sample(dataset))
        output.print_table(("domain", "sample"), [(domain, text[:70]) for domain, text in texts])
    return 0


def tools(args: argparse.Namespace) -> int:
    """Prints what data.inject and data.filter can name: kinds, fields, defaults, meanings."""
    from moelab import fields
    from moelab.data.quality import filters, inject

    rows = [
        {
            "where": where,
            "kind": kind,
            "field": field.path.partition(".")[2],
            "type": field.type,
            "default": field.default,
            "meaning": field.doc,
        }
        for where, folder, name in (
            ("data.inject", inject, "Injector"),
            ("data.filter", filters, "Filter"),
        )
        for kind in folder.KINDS
        for field in fields.of_class(kind, getattr(folder.module(kind), name)).values()
    ]
    if args.json:
        output.print_json({"rows": rows})
    else:
        output.print_table(list(rows[0]), [list(row.values()) for row in rows])
    return 0


def score(args: argparse.Namespace) -> int:
    """Prints what each filter, alone, makes of the training documents, and writes their scores."""
    from moelab import data

    endings = (".csv", ".jsonl", ".parquet")
    if args.out and not args.out.endswith(endings):
        raise UserError(f"--out: wants FILE{', '.join(endings)}, got {args.out!r}")
    _check_out(args)
    config = _with_tools(args)
    table, outcomes = data.score(
        config.data, config.tokenizer, progress=data_progress(not args.json)
    )
    if args.json:
        output.print_json({"documents": len(table), "outcomes": outcomes})
    else:
        quality_tables.print_outcomes(outcomes)
    if args.out:
        data.write_scores(table, args.out)
        output.note(f"{args.out}: {len(table):,} documents")
    return 0


def filter(args: argparse.Namespace) -> int:
    """Builds the dataset with filters and prints what each of them removed."""
    from moelab import data

    if args.out and not args.out.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"--out: wants FILE.jsonl or FILE.jsonl.gz, got {args.out!r}")
    _check_out(args)
    config = _with_tools(args)
    dataset = data.build(config.data, config.tokenizer, progress=data_progress(not args.json))
    found = dataset.manifest["quality"]
    together = _together(found)
    if args.json:
        built = {"directory": dataset.directory, "sha256": dataset.sha256}
        output.print_json(built | found | {"all_filters": together})
    else:
        quality_tables.print_labels(found)
        quality_tables.print_outcomes(found["outcomes"], together)
        print(f"\n{dataset.directory}")
    if args.out:
        count = data.write_text(dataset, args.out)
        output.note(f"{args.out}: {count:,} training documents")
    return 0


def _together(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the filters did together; the manifest's "quality" has what it takes, in every dataset that there is."""
    from moelab.data.quality import truth

    return truth.of_all(found["labels"], found["kept_labels"])


def _check_out(args: argparse.Namespace) -> None:
    """Finds out before the work that its result could not be written."""
    from moelab import atomic

    if args.out:
        atomic.check_target(args.out)


def _with_tools(args: argparse.Namespace):
    """The config with --tool in the place of data.filter."""
    from moelab.data import quality

    environment.prepare()
    quality.parse_filters(args.tool, "--tool")  # so that an error names the option
    config = load_config(args).config
    if "filter" not in config.data:
        raise UserError(f"data.kind={config.data.kind} is no text: there is nothing to judge")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.filter = tuple(args.tool) or tuple(config.data.filter)
    if not config.data.filter:
        from moelab.data.quality import filters

        raise UserError(
            f"'{args.parser.prog}' wants --tool=KIND, or a config with data.filter; there are "
            + ", ".join(filters.KINDS)
        )
    return config


def _dataset(args: argparse.Namespace):
    from moelab import data

    environment.prepare()
    config = load_config(args).config
    progress = data_progress(not args.json)
    return data.build(config.data, config.tokenizer, progress=progress)


def _cell(value: object) -> object:
    return f"{value:.3f}" if isinstance(value, float) else value
