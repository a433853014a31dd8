"""`moelab config ...` and `env`: what a run would be made of, and where it would run."""

from __future__ import annotations

import argparse
import json

from moelab import config as configs
from moelab import config_file, environment, fields, schema
from moelab.cli import output
from moelab.cli.running import load_config


def show(args: argparse.Namespace) -> int:
    """Prints a whole config, then its hash and its problems."""
    environment.prepare()
    loaded = load_config(args)
    config = loaded.config
    if args.json:
        output.print_json(configs.record(config, loaded.file, loaded.overrides))
    else:
        known = configs.table(config)
        values = [(path, value) for path, value in configs.flatten(config) if path in known]
        width = max(len(path) for path, _ in values)
        for path, value in values:
            mark = " " if value == known[path].default else "*"
            print(f"{mark} {path:<{width}}  {output.as_text(value)}".rstrip())
        print(f"  sha256  {configs.sha256(config)}")
    for problem in configs.validate(config):
        output.note(f"problem: {problem}")
    return 0


def diff(args: argparse.Namespace) -> int:
    """Prints the fields in which two configs differ."""
    environment.prepare()
    a, b = configs.load(args.a), configs.load(args.b)
    rows = configs.differences(a.config, b.config)
    if args.json:
        output.print_json([{"field": path, "a": x, "b": y} for path, x, y in rows])
    elif rows:
        output.print_table(("field", a.file, b.file), rows)
    else:
        output.note("no differences")
    return 0


def listing(args: argparse.Namespace) -> int:
    """Prints the experiment files with their presets, sweeps and first docstring lines. Executes none of them."""
    found = [
        (name, path, *config_file.outline(path), config_file.sweep_names(path))
        for name, path in config_file.files()
    ]
    if args.json:
        keys = ("name", "file", "doc", "presets", "sweeps")
        output.print_json([dict(zip(keys, row, strict=True)) for row in found])
    else:
        rows = [
            (name, _few(presets), _few(sweeps, 2), doc) for name, _, doc, presets, sweeps in found
        ]
        output.print_table(("config", "presets", "sweeps", "what it is"), rows)
    return 0


def _few(presets: list[str], most: int = 4) -> list[str]:
    more = len(presets) - most
    return [*presets[:most], f"... {more} more (--json)"] if more > 0 else presets


def listed_fields(args: argparse.Namespace) -> list[tuple[fields.Field, object]]:
    """Returns (field, value) of one config, or (field, default) of every kind that a config can have."""
    if args.config:
        config = load_config(args).config
        values = dict(configs.flatten(config))
        return [(field, values[path]) for path, field in configs.table(config).items()]
    found = {
        (path, ""): field
        for path, field in fields.table(schema.DEFAULT_KIND).items()
        if path.partition(".")[0] not in schema.DEFAULT_KIND
    }
    for section in schema.DEFAULT_KIND:
        for kind in fields.kinds(section):
            for path, field in fields.of_kind(section, kind).items():
                found[path, field.kind] = field
    return [(field, field.default) for field in found.values()]


def print_fields(args: argparse.Namespace) -> int:
    """Prints path, type, default and meaning of every field."""
    environment.prepare()
    found = listed_fields(args)
    if args.json:
        keys = ("path", "type", "default", "doc", "kind")
        rows = [{key: getattr(field, key) for key in keys} | {"value": v} for field, v in found]
        output.print_json(rows)
        return 0
    if args.config:
        columns = ("field", "type", "value", "default", "meaning")
        rows = [(f.path, f.type, value, f.default, f.doc) for f, value in found]
    else:
        columns = ("field", "of kind", "type", "default", "meaning")
        rows = [(f.path, f.kind, f.type, f.default, f.doc) for f, _ in found]
    output.print_table(columns, rows)
    return 0


def env(args: argparse.Namespace) -> int:
    """Prints packages, machine, devices, caches and kernels."""
    environment.prepare()
    found = environment.describe()
    found["cache"] = str(environment.cache_directory())
    found["kernels"] = kernels()
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        output.print_pairs(found)
    return 0


def kernels() -> dict[str, str]:
    """Says what computes each operation here, and why the GPU kernels that do not would not."""
    from pallas_kernels import device
    from pallas_kernels.grouped_matmul import choice
    from pallas_kernels.grouped_matmul.kernels import HARDWARE, KERNELS

    here = device.current()
    found = choice.table(here)
    for kernel in KERNELS.values():
        reason = kernel.wrong_device(here) or "runs here"
        found[kernel.name] = f"{kernel.about}; {HARDWARE}; {reason}"
    return found
