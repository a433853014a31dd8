"""`moelab data build` and `data show`: the text of a config. No jax beyond what the config's router imports."""

from __future__ import annotations

import argparse

from moelab import environment
from moelab.cli import output
from moelab.cli.running import load_config
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
    """Prints sources, counts and a sample of each domain."""
    from moelab import data

    dataset = _dataset(args)
    found = data.describe(dataset)
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
    if dataset.tokenizer.kind != "external":
        print()
        texts = ((one.domain, " ".join(one.text[:200].split())) for one in data.sample(dataset))
        output.print_table(("domain", "sample"), [(domain, text[:70]) for domain, text in texts])
    return 0


def _dataset(args: argparse.Namespace):
    from moelab import data

    environment.prepare()
    config = load_config(args).config
    progress = data_progress(not args.json)
    return data.build(config.data, config.tokenizer, progress=progress)


def _cell(value: object) -> object:
    return f"{value:.3f}" if isinstance(value, float) else value
