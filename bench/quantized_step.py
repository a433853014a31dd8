"""Times whole training steps under a recipe against the unquantized step.

    python bench/quantized_step.py [--json] [--repeats 7] [--recipe nvfp4_qat ...]

OLMoE-shaped at (E, k) = (16, 2), as bench/step.py. Every repeat runs one step of each recipe in turn; a ratio is the
median over repeats of the ratios within a repeat. Bars: 1.8 for quantization-aware training of weights and
activations, 3 for training with quantized gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BARS = {
    "nvfp4_qat": 1.8,
    "mxfp4_qat": 1.8,
    "nvfp4_qat_w": 1.8,
    "nvfp4_training": 3.0,
    "fp8_block": 3.0,
}


def measure(names: list[str], repeats: int) -> list[dict]:
    """Returns a row per recipe: seconds, and the ratio to the unquantized step."""
    from moelab.bench import step
    from pallas_kernels import timing

    config = step.PAIRS["E=16 k=2"].sparse
    calls = {name: step.make_run(config, name)[0] for name in ("none", *names)}
    times = timing.interleaved(calls, repeats, warm_ups=2)
    rows = []
    for name in names:
        ratios = [a / b for a, b in zip(times[name], times["none"], strict=True)]
        rows.append(
            {
                "recipe": name,
                "seconds": statistics.median(times[name]),
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "bar": BARS[name],
            }
        )
    return rows


def main() -> None:
    """Prints a table or JSON rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--recipe", action="append", choices=BARS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from moelab import environment

    environment.prepare()
    rows = measure(args.recipe or list(BARS), args.repeats)
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'recipe':<16}{'s/step':>8}{'ratio':>8}{'range':>14}{'bar':>6}")
    for row in rows:
        low, high = row["ratio_range"]
        print(
            f"{row['recipe']:<16}{row['seconds']:>8.2f}{row['ratio']:>8.2f}{low:>8.2f}-{high:.2f}{row['bar']:>7.1f}"
        )


if __name__ == "__main__":
    main()
