"""Quantizes a trained run: calibrate, pack the experts, store and export them, and say what that did to the model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moelab import atomic, data, evaluate, manifest, metrics
from moelab import config as configs
from moelab import model as model_lib
from moelab.errors import ConfigError
from moelab.quant import calibration, comparison, export, export_tensors, ptq, storage
from moelab.quant.quantize_options import Options, check
from moelab.report import documents

REPORT = "quality.json"
DOCUMENTS = "documents.parquet"  # nats of every document in float32 and in each scheme, as report/documents.py has them


def quantize_run(workdir: str | Path, options: Options) -> dict[str, Any]:
    """Quantizes a checkpoint of a run, writes it to a folder and evaluates what was written.

    Args:
      workdir: the run directory.
      options: what to make of it.

    Returns:
      What quality.json holds: source, method, calibration, bytes, weights (noise.weights), rows (quality.compare) and
      export (export.validate_export) or None.

    Raises:
      ConfigError: options that do not fit the run, or an export that its layout cannot say.
      checkpoint.CheckpointError: no such checkpoint.
    """
    method = check(configs.load(workdir).config, options)
    loaded = evaluate.load_run(workdir, options.step)
    statistics = None
    if method.needs_statistics or options.static:
        statistics = _calibrate(loaded, options)
    packed, report = _pack(loaded, options, method, statistics)
    packed.facts["source"] = _source(workdir, loaded)
    input_amax = _input_amax(packed, statistics) if options.static else None
    exported = _write(packed, options, input_amax)
    stored = storage.load(options.out)
    found = comparison.describe(loaded, options, stored, input_amax, report)
    found |= {"method_report": report, "export": exported}
    documents.write(Path(options.out) / DOCUMENTS, _columns(found["rows"]))
    text = json.dumps(metrics.plain(found), indent=2, allow_nan=False)
    atomic.write_text(Path(options.out) / REPORT, text + "\n")
    return found


def _columns(rows: list[dict[str, Any]]) -> dict[str, list]:
    """Takes the documents' columns out of the rows and joins them; the reference, which each has, comes once."""
    joined: dict[str, list] = {}
    for i, row in enumerate(rows):
        columns = row.pop("columns")
        first = columns["precision"][0]
        keep = [n for n, name in enumerate(columns["precision"]) if i == 0 or name != first]
        for name, values in columns.items():
            joined.setdefault(name, []).extend(values[n] for n in keep)
    return joined


def _calibrate(loaded: evaluate.Loaded, options: Options):
    config, dataset, state = loaded.config, loaded.dataset, loaded.state
    batches = data.evaluation_batches(
        dataset,
        "train",
        batch_size=config.evaluation.batch_size,
        length=config.train.length,
        tokens_per_domain=-(-options.calibration_tokens // len(dataset.domains)),
    )
    return calibration.calibrate(
        config,
        dataset,
        state.params,
        state.router_state,
        batches,
        fallback=options.fallback,
        min_tokens=options.min_tokens,
        gate_weighted=options.gate_weighted,
    )


def _pack(loaded: evaluate.Loaded, options: Options, method, statistics):
    """Returns the packed run, without its source, and the method's report."""
    params = loaded.state.params
    try:
        rest, quantized, report = ptq.quantize_params(
            params, method, statistics, options.format, options.rule
        )
    except ValueError as error:
        raise ConfigError(f"method {options.method}: {error}") from None
    if options.static:
        _check_static(options, report, quantized)
    keep = model_lib.from_dataset(loaded.config, loaded.dataset).kept_blocks
    rest, quantized = restored(params, rest, quantized, keep)
    facts = {
        "format": options.format,
        "rule": report["rule"],
        "recipe": options.schemes[0],
        "activation_scale": options.scale,
        "method": {"kind": options.method, "fields": dataclasses.asdict(method)},
        "rotation": report["rotation"],
        "calibration": None if statistics is None else _coverage(options, statistics),
        "config": json.loads(configs.canonical(loaded.config)),
    }
    return storage.PackedRun(rest, quantized, loaded.state.router_state, facts), report


def _check_static(options: Options, report: Mapping, quantized: Mapping) -> None:
    """Refuses maxima of rows that the method changes before the experts see them."""
    scaled = any(path.endswith("/input_scale") for path in storage.paths(quantized))
    if report["rotation"] or scaled:
        raise ConfigError(
            f"method {options.method} transforms the rows that enter the experts, and a static scale is calibrated on "
            "rows as they come; use activation_scale=per_token, and no export"
        )


def restored(
    params: Mapping, rest: dict, quantized: dict, keep: frozenset[tuple[str, str]]
) -> tuple[dict, dict]:
    """Puts the experts of the blocks back that the run computes in high precision.

    Args:
      params: of the run.
      rest, quantized: what was made of them; not changed.
      keep: (segment, block) of those blocks.

    Returns:
      rest and quantized.
    """
    for segment, block in keep:
        if block in quantized.get(segment, {}):
            quantized = quantized | {segment: dict(quantized[segment])}
            del quantized[segment][block]
            quantized = {name: tree for name, tree in quantized.items() if tree}
            rest = rest | {segment: rest[segment] | {block: params[segment][block]}}
    return rest, quantized


def _coverage(options: Options, statistics) -> dict[str, Any]:
    names = ("calibration_tokens", "min_tokens", "fallback", "gate_weighted")
    asked = {name: getattr(options, name) for name in names}
    return asked | {"split": "train", "layers": calibration.coverage(statistics)}


def _source(workdir: str | Path, loaded: evaluate.Loaded) -> dict[str, Any]:
    checkpoint = manifest.read_manifest(Path(workdir) / "checkpoints", loaded.step)
    return {
        "workdir": str(workdir),
        "step": loaded.step,
        "checkpoint_digest": checkpoint["digest"],
        "config_sha256": configs.sha256(loaded.config),
        "dataset_sha256": loaded.dataset.sha256,
    }


def _input_amax(packed: storage.PackedRun, statistics) -> dict[int, dict[str, np.ndarray]]:
    """The calibrated maxima by layer, which the facts keep too."""
    config = configs.from_dict(packed.facts["config"])
    found = {
        layer: {"gate_up": s.gate_up.amax_E, "down": s.down.amax_E}
        for layer, s in zip(model_lib.moe_layers(config), statistics.values(), strict=True)
    }
    places = (
        (n, role, e)
        for n, roles in found.items()
        for role in roles
        for e in range(len(roles[role]))
    )
    for layer, role, expert in places:
        export_tensors.calibrated_amax(found, layer, expert, role)  # refuses what is not there
    packed.facts["input_amax"] = found
    return found


def _write(packed: storage.PackedRun, options: Options, input_amax) -> dict[str, Any] | None:
    """Stores and exports; an export that is refused leaves nothing behind."""
    if not options.layout:
        storage.save(options.out, packed, options.rest_dtype)
        return None
    arguments = dict(activations=options.schemes[0] == "w4a4", input_amax=input_amax)
    export.check(packed, options.layout)
    config = configs.from_dict(packed.facts["config"])
    static = arguments["activations"] and export.LAYOUTS[options.layout].static_input_scale
    export.tensors_of(config, packed, input_amax if static else None)
    storage.save(options.out, packed, options.rest_dtype)
    folder = Path(options.out) / options.layout
    return {"folder": str(folder)} | export.export(folder, packed, options.layout, **arguments)
