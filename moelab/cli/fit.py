"""`moelab kernels fit`: compiles a config's whole model for GPUs that are not here, and says what memory it takes."""

from __future__ import annotations

import argparse
import dataclasses

from moelab import environment, spelling
from moelab.cli import output
from moelab.errors import UserError

_GIB = 2**30


def fit(args: argparse.Namespace) -> int:
    """Prints what one device needs; exit code 1 if it does not fit or is not packed as it should be."""
    if not args.config:
        raise UserError("'moelab kernels fit' needs --config=FILE, such as serving/packed")
    environment.prepare()
    from moelab import config as config_lib
    from moelab import fit as fit_lib
    from pallas_kernels import aot

    reason = aot.missing()
    if reason:
        output.note(f"skipped: {reason}")
        if args.json:
            output.print_json({"skipped": reason})
        return 0
    if args.target not in aot.targets():
        known = tuple(aot.targets())
        hint = spelling.hint(args.target, known) or f"; there are {', '.join(known)}"
        raise UserError(f"no GPU {args.target!r}{hint}")
    config = config_lib.load(args.config, args.overrides).config  # says what is wrong with it here
    moe = config.moe
    if not moe.num_experts or moe.slots_per_expert:
        raise UserError(f"{args.config} has no routed experts")
    if moe.parallel and moe.num_experts % args.devices:
        raise UserError(
            f"moe.num_experts={moe.num_experts} cannot be split over --devices={args.devices}"
        )
    try:
        fit_lib.topology_of(args.devices)
    except ValueError as error:
        raise UserError(str(error)) from error
    arguments = dict(config=args.config, overrides=list(args.overrides))
    arguments |= dict(devices=args.devices, tokens=args.tokens, format=args.format)
    found = fit_lib.in_process(args.target, arguments)
    if args.json:
        output.print_json(dataclasses.asdict(found) | {"problems": found.problems()})
    else:
        _print(found, args)
    return 1 if found.problems() else 0


def _print(found, args: argparse.Namespace) -> None:
    pairs = {
        "gpu": f"{found.devices} x {found.target}",
        "tokens": f"{args.tokens} on each device",
        "expert parameters": f"{found.expert_parameters:.4g} in all, {found.bits:.3f} bits each",
        "experts of a device": f"{found.expert_bytes / _GIB:.2f} GiB",
        "its other weights": f"{found.rest_bytes / _GIB:.2f} GiB (bfloat16)",
        "arguments": f"{found.argument_bytes / _GIB:.2f} GiB",
        "temporary": f"{found.temp_bytes / _GIB:.2f} GiB",
        "memory": f"{found.memory_bytes / _GIB:.1f} GiB",
        "kernels": ", ".join(f"{n} {name}" for name, n in found.kernels.items()),
        "collectives": ", ".join(found.collectives) or "none",
        "compiled in": f"{found.seconds:.0f} s; not yet run on hardware",
    }
    output.print_pairs(pairs)
    for problem in found.problems():
        print(problem)
