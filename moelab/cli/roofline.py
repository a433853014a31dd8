"""`moelab kernels roofline`: what bounds a grouped matmul for published models' experts, by a model of the GPU."""

from __future__ import annotations

import argparse

from moelab import environment, spelling
from moelab.cli import output
from moelab.errors import UserError

COLUMNS = ("model", "layer", "tokens", "tiling before", "bound", "share")
COLUMNS += ("tiling chosen", "bound", "share", "at least")
_NAMES = ("model", "layer", "tokens", "before", "bound_before", "share_before")
_NAMES += ("chosen", "bound", "share", "microseconds")
_DTYPES = {"mosaic_sm100": "float4_e2m1fn", "mosaic_sm90": "bfloat16", "triton_w4a16": "bfloat16"}
_DEFAULT_TARGETS = {"mosaic_sm100": "b200", "mosaic_sm90": "h100", "triton_w4a16": "h100"}


def roofline(args: argparse.Namespace) -> int:
    """Prints bounds and reachable shares before and after the choice of a tiling."""
    environment.prepare()
    from pallas_kernels import aot, shapes
    from pallas_kernels import roofline as model

    reason = aot.missing()
    if reason:  # the limits are the plugin's descriptions
        output.note(f"skipped: {reason}")
        return 0
    target_name = args.target or _DEFAULT_TARGETS[args.kernel]
    for what, names, known in (
        ("GPU", (target_name,), aot.targets()),
        ("model", args.model, shapes.MODELS),
    ):
        for name in names:
            if name not in known:
                hint = spelling.hint(name, known) or f"; there are {', '.join(known)}"
                raise UserError(f"no {what} {name!r}{hint}")
    target = aot.targets()[target_name]
    if args.kernel == "mosaic_sm100" and not target.device.is_tcgen05:
        raise UserError(f"mosaic_sm100 is for compute capability 10.x, {target_name} is not")
    try:
        limits = model.limits_of(target, _DTYPES[args.kernel])
    except ValueError as error:
        raise UserError(str(error)) from error
    rows = [
        row(args.kernel, name, layer, tokens, args.format, limits)
        for name in args.model or shapes.MODELS
        for layer in shapes.MODELS[name].layers()
        for tokens in args.tokens
    ]
    if args.json:
        output.print_json([dict(zip(_NAMES, r, strict=True)) for r in rows])
        return 0
    shown = [(*r[:5], f"{r[5]:.2f}", *r[6:8], f"{r[8]:.2f}", f"{r[9]:.1f} us") for r in rows]
    output.print_table(COLUMNS, shown)
    print(
        f"{args.kernel}, {args.format}, {target.maker_name}; a model with an assumed L2 bandwidth and latency; "
        "not yet run on hardware"
    )
    return 0


def row(kernel: str, name: str, layer: str, tokens: int, format: str, limits) -> tuple:
    """One product: (model, layer, tokens, before, bound, share, chosen, bound, share, microseconds)."""
    from pallas_kernels import roofline as model
    from pallas_kernels import schedules, shapes

    experts = shapes.MODELS[name]
    outputs, inputs = experts.layers()[layer]
    sizes_E = model.random_sizes(tokens, experts.experts, experts.k)
    x = format if kernel == "mosaic_sm100" else "bfloat16"
    product = model.Product(sizes_E, outputs, inputs, x, format)
    before, chosen = schedules.before_and_after(kernel, product, limits)
    first, then = (model.roofline(product, schedule, limits) for _, schedule in (before, chosen))
    return (
        name,
        layer,
        tokens,
        before[0],
        first.bound,
        round(first.share, 4),
        chosen[0],
        then.bound,
        round(then.share, 4),
        round(then.time * 1e6, 3),
    )
