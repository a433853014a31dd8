"""`moelab quantize`: packs the experts of a run, and prints what that did to the model."""

from __future__ import annotations

import argparse
from typing import Any

from moelab import spelling
from moelab.cli import output
from moelab.cli.running import run_directory, start_jax
from moelab.errors import UserError
from moelab.report import formatting as fmt


def quantize(args: argparse.Namespace) -> int:
    """Quantizes a run's checkpoint, writes it to --out and compares it with the run."""
    if not args.workdir or not args.out:
        option = "--out=DIR" if args.workdir else "--workdir=RUN"
        raise UserError(f"'{args.parser.prog}' wants {option}")
    directory = run_directory(args.workdir)
    _check_words(args)
    start_jax()
    from moelab.quant import quantize as quantizing

    _check_jax_words(args)
    found = quantizing.quantize_run(directory, _options(args, quantizing))
    if args.json:
        output.print_json(found)
    else:
        _print(found)
        output.note(_origin(found, args.out))
    return 0


def _options(args: argparse.Namespace, quantizing):
    names = ("out", "format", "method", "activation_scale", "step", "split", "calibration_tokens")
    names += ("min_tokens", "fallback", "gate_weighted")
    return quantizing.Options(
        **{name: getattr(args, name) for name in names},
        schemes=args.recipe,
        rule=args.rule or None,
        rest_dtype=args.rest,
        layout=args.export,
        method_fields=_fields(args),
    )


def _check_words(args: argparse.Namespace) -> None:
    """Refuses a recipe or a format that there is not."""
    from moelab.quant import recipes

    schemes = ("w4a16", "w4a8", "w4a4")
    for name in args.recipe or ("",):
        _known("recipe", name, schemes)
    _known("format", args.format, recipes.FOUR_BIT)


def _check_jax_words(args: argparse.Namespace) -> None:
    """Refuses a method, a rule or a layout that there is not; the registries import jax."""
    from moelab.quant import export, ptq
    from pallas_kernels import formats

    _known("method", args.method, ptq.KINDS)
    if args.rule:
        _known("rule", args.rule, formats.FORMATS[args.format].rules)
    if args.export:
        _known("export", args.export, tuple(export.LAYOUTS))


def _known(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        guess = spelling.hint(value, known, f"--{option}=")
        raise UserError(f"--{option} has no {value!r}{guess or f'; there are {", ".join(known)}'}")


def _fields(args: argparse.Namespace) -> dict[str, Any]:
    """Reads --method_field NAME=VALUE by the type of the field's default."""
    import dataclasses

    from moelab.quant import ptq

    known = {f.name: f.default for f in dataclasses.fields(ptq.module(args.method).Method)}
    result = {}
    for text in args.method_field:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--method_field wants NAME=VALUE, got {text!r}")
        _known("method_field", name, tuple(known))
        result[name] = _value(name, value, known[name])
    return result


def _value(name: str, text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise UserError(f"--method_field {name} wants true or false, got {text!r}")
        return text == "true"
    kind = type(default)
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"--method_field {name} wants {kind.__name__}, got {text!r}") from None


def _print(found: dict[str, Any]) -> None:
    rows = found["rows"]
    _print_outputs(rows)
    for row in rows:
        print()
        _print_layers(found, row)
    print()
    _print_weights(found)
    print()
    _print_bytes(found["bytes"])


def _print_outputs(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    lines = [("float32", _bits(first, 0), "", f"{first['loss'][0]:.4f}", "", "")]
    for row in rows:
        difference = row["bits_per_byte_difference"] or row["loss_difference"]
        interval = fmt.bounds(difference["low"], difference["high"])
        kl = row["kl"]
        lines.append(
            (
                row["name"],
                _bits(row, 1),
                f"{fmt.fixed(difference['estimate'], 4, sign=True)} {interval}",
                f"{row['loss'][1]:.4f}",
                f"{kl['mean']:.5f}",
                f"{kl['p99']:.4f}",
            )
        )
    unit = "bits/byte" if first["bits_per_byte_difference"] else "loss"
    columns = ("precision", "bits/byte", f"difference in {unit} (95 %)", "loss")
    output.print_table((*columns, "KL, nats/token", "KL, 99th percentile"), lines)


def _bits(row: dict[str, Any], side: int) -> str:
    return fmt.fixed(row["bits_per_byte"][side]["all"], 4)


def _print_layers(found: dict[str, Any], row: dict[str, Any]) -> None:
    router = row["router"]
    lines = []
    for m, layer in enumerate(found["layers"]):
        same, rank, experts = router["same_order"], row["load_error_rank"][m], row["experts"][m]
        lines.append(
            (
                f"block {layer}",
                fmt.percent(router["overlap"][m], 2),
                "-" if same is None else fmt.percent(same[m], 2),
                f"{router['gate_kl'][m]:.5f}",
                f"{router['max_violation_before'][m]:.3f}",
                f"{router['max_violation_after'][m]:.3f}",
                fmt.fixed(row["output_sqnr_db"][m], 2),
                _worst(experts),
                "-" if rank is None else fmt.fixed(rank["rho"], 2, sign=True),
            )
        )
    columns = (row["name"], "top-k overlap", "same order", "gate KL", "MaxVio before", "after")
    columns += ("output SQNR, dB", "noisiest expert: dB (load)", "rank of load and error")
    output.print_table(columns, lines)


def _worst(experts: dict[str, Any]) -> str:
    """The expert with the lowest SQNR among those that had tokens."""
    used = [e for e, tokens in enumerate(experts["tokens"]) if tokens]
    if not used:
        return "-"
    worst = min(used, key=lambda e: experts["sqnr_db"][e])
    return f"{worst}: {experts['sqnr_db'][worst]:.2f} ({fmt.percent(experts['load'][worst])})"


def _print_weights(found: dict[str, Any]) -> None:
    weights = found["weights"]
    lines = [
        (f"block {layer}", *(_db(weights[name]["layers"][m]) for name in weights))
        for m, layer in enumerate(found["layers"])
    ]
    lines.append(("all", *(_db(weights[name]["all"]) for name in weights)))
    output.print_table(("SQNR of weights, dB", *weights), lines)


def _db(value: float | None) -> str:
    return "-" if value is None else fmt.fixed(value, 2)


def _print_bytes(sizes: dict[str, Any]) -> None:
    lines = [(role, f"{count:,}") for role, count in sizes["roles"].items()]
    lines.append(("all tensors", f"{sizes['total']:,}"))
    lines.append(("the file", f"{sizes['file']:,}"))
    for name, count in sizes["unquantized_experts"].items():
        lines.append((f"experts in {name}", f"{count:,}"))
    output.print_table(("bytes", ""), lines)


def _origin(found: dict[str, Any], out: str) -> str:
    source, sizes, first = found["source"], found["bytes"], found["rows"][0]
    lines = [
        f"{source['workdir']}, step {source['step']}: experts in {found['format']} ({found['rule']}) by "
        f"{found['method']['kind']}, {sizes['bits_per_weight']:g} bits a weight",
        f"{found['split']} split: {first['tokens']:,} tokens of {first['documents']:,} documents",
    ]
    if found["calibration"]:
        layers = found["calibration"]["layers"]
        fallbacks = sum(len(experts) for row in layers for experts in row["fallbacks"].values())
        experts = sum(len(row["tokens"]) for row in layers)
        least = min(min(row["tokens"]) for row in layers)
        lines.append(
            f"calibration: the least used expert saw {least} tokens; {fallbacks} of {experts} experts took the "
            f"statistics of {found['calibration']['fallback']}"
        )
    if found["export"]:
        export = found["export"]
        lines.append(f"{export['folder']}: {export['experts']} experts exported and read back")
    return "\n".join([*lines, f"written to {out}"])
