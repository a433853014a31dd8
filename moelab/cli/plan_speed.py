"""`moelab plan --user=N`: systems at one speed, and the price ratio at which they break even."""

from __future__ import annotations

import argparse


def compared(results, costs, args: argparse.Namespace) -> list[dict]:
    """Compares the systems at one speed: throughput, cost, and the price ratio at which they break even."""
    from moelab.plan import prices

    made, first = [], None
    for found, price in zip(results, costs, strict=True) if args.user else ():
        index = found.at_speed(args.user)
        one = {
            "system": found.system.name,
            "precision": found.recipe.name,
            "user_tokens_per_s": args.user,
            "fastest_user_tokens_per_s": float(found.user.max()),
            "gpu_tokens_per_s": None,
        }
        made.append(one)
        if index is None:
            continue
        rate, ends = float(found.throughput[index]), found.band_at_speed(args.user)
        one |= dict(zip(("gpu_tokens_per_s_low", "gpu_tokens_per_s_high"), ends, strict=True))
        one["gpu_tokens_per_s"] = rate
        if price is not None:
            one["dollars_per_million"] = prices.per_million(price.value, rate, args.utilisation)
        if first is None:
            first = one
        else:
            one["break_even"] = prices.break_even(first["gpu_tokens_per_s"], rate)
            one["break_even_of"] = f"{first['system']} {first['precision']}"
    return made


def line(one: dict) -> str:
    """Says one of them in a line."""
    name, user = (
        f"{one['system']} {one['precision']}",
        f"{one['user_tokens_per_s']:g} tokens/s/user",
    )
    if one["gpu_tokens_per_s"] is None:
        return f"{name}: nowhere {user}; at most {one['fastest_user_tokens_per_s']:.1f}"
    ends = (one["gpu_tokens_per_s_low"], one["gpu_tokens_per_s_high"])
    words = f"{name} at {user}: {one['gpu_tokens_per_s']:.0f} [{ends[0]:.0f}, {ends[1]:.0f}] tokens/s/GPU"
    if "dollars_per_million" in one:
        words += f", {money(one['dollars_per_million'])} $ per million tokens"
    if "break_even" in one:
        words += (
            f"; {one['break_even_of']} pays up to {one['break_even']:.2f} times the GPU-hour of {name}"
            " (moelab plan compare has the interval)"
        )
    return words


def money(dollars: float) -> str:
    """Writes cents, and of less than ten of them two digits."""
    return f"{dollars:.2f}" if dollars >= 0.1 else f"{dollars:.2g}"
