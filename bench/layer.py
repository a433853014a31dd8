"""Times the MoE layer on CPU against the fast dense feed-forward of equal active FLOPs.

    python bench/layer.py [--json] [--repeats 21] [--shape 16,2 ...]

`moelab bench layer` with a narrow table: what is timed is in moelab/bench/layer.py. Both layers run in one process with
one XLA flag, interleaved. A ratio is the median over rounds of layer / dense within one round (the machine's speed
drifts); beside it the ratio of the fastest times. T=4096, D=F=256, float32.
Bars: forward <= 1.3, forward + backward <= 1.6, temporary memory <= 1.8.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moelab import environment  # noqa: E402

environment.prepare()

from moelab.bench import layer  # noqa: E402


def table(rows):
    """The rows as text."""
    lines = [
        "                    dense           layer        skewed   with router   memory",
        "  E  k  part      ms  GFLOP/s   med   min     med   min     med   min    ratio",
    ]
    named = {}
    for row in rows:
        key = row["shape"]["experts"], row["shape"]["k"], row["part"]
        named.setdefault(key, {})[row["case"]] = row
    for (experts, k, part), found in named.items():
        dense = found.pop(layer.DENSE)
        ratios = "   ".join(f"{r['ratio']:5.2f} {r['ratio_of_best']:5.2f}" for r in found.values())
        lines.append(
            f"{experts:3d} {k:2d}  {'fwd' if part == 'forward' else 'f+b'}  "
            f"{dense['median_s'] * 1e3:7.1f}  {dense['gflops']:7.0f} {ratios}   "
            f"{found['layer']['memory']:6.2f}"
        )
    return "\n".join(lines)


def main():
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--shape", action="append", metavar="E,K", help="default: all four")
    options = parser.parse_args()
    shapes = layer.SHAPES
    if options.shape:
        shapes = [tuple(map(int, shape.split(","))) for shape in options.shape]
    rows = layer.measure(shapes, options.repeats)
    print(json.dumps(rows, indent=1) if options.json else table(rows))


if __name__ == "__main__":
    main()
