"""Times quantizing and dequantizing 10 million float32 weights on CPU, against a pass that only doubles them.

    python bench/quantize.py [--json] [--repeats 15] [--format nvfp4 ...]

Each format is compiled for 10 matrices of 1024 x 1024, with rounding to nearest and stochastically. Rounds are
interleaved, and the minimum counts: the machine may be shared. `x * 2` reads and writes 42 MB each; quantizing to 4
bits reads as much twice (maxima, then codes) and writes an eighth. Bar: nvfp4 within 0.1 s.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moelab import environment  # noqa: E402

environment.prepare()

import jax  # noqa: E402

from pallas_kernels import formats  # noqa: E402

SHAPE = (10, 1024, 1024)
BAR = 0.1  # seconds, nvfp4


def programs(names):
    """name -> (compiled, arguments); a name is "x * 2", or a format, its rule and what is done."""
    x = 0.02 * jax.random.normal(jax.random.key(0), SHAPE)
    key = jax.random.key(1)
    found = {"x * 2": (lambda x: x * 2, (x,))}
    for name in names:
        for rule in formats.FORMATS[name].rules:
            label = name if len(formats.FORMATS[name].rules) == 1 else f"{name} {rule}"

            def quantize(x, key=None, name=name, rule=rule):
                return formats.quantize(x, name, rule=rule, key=key)

            found[f"{label}: nearest"] = (quantize, (x,))
            if rule == formats.FORMATS[name].rules[0]:
                found[f"{label}: stochastic"] = (quantize, (x, key))
                found[f"{label}: dequantize"] = (formats.dequantize, (quantize(x),))
    return {name: (jax.jit(f).lower(*a).compile(), a) for name, (f, a) in found.items()}


def measure(names, repeats):
    """Minimal seconds by name."""
    compiled = programs(names)
    seconds = dict.fromkeys(compiled, float("inf"))
    for repeat in range(repeats + 1):
        for name, (program, arguments) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            if repeat:  # the first is a warm-up
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def main():
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--format", action="append", choices=formats.FORMATS, help="default: all")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    seconds = measure(options.format or formats.FORMATS, options.repeats)
    whole = seconds["x * 2"]
    if options.json:
        ratios = {name: value / whole for name, value in seconds.items()}
        print(json.dumps({"shape": SHAPE, "seconds": seconds, "ratios": ratios}, indent=1))
        return
    for name, value in seconds.items():
        print(f"{name:26s} {value * 1e3:8.2f} ms  {value / whole:6.2f} of x * 2")
    found = seconds.get("nvfp4: nearest")
    if found is not None:
        print(
            f"10 M weights to nvfp4: {found:.3f} s, {'within' if found <= BAR else 'ABOVE'} {BAR} s"
        )


if __name__ == "__main__":
    main()
