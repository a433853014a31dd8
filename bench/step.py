"""Times whole training steps against the same model with dense feed-forwards of equal active width.

    python bench/step.py [--json] [--repeats 7]       steps: bar 1.25 for (E=16, k=2), 1.4 for (E=64, k=8)
    python bench/step.py --start                      seconds from the command to the first step, cold and warm

The steps are those of `moelab bench step`: moelab/bench/step.py. A ratio is the median over rounds of the ratios within
a round, since these machines' speed drifts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = ROOT / "experiments" / "olmoe_shaped.py"


def measure_start() -> list[dict]:
    """Times the command to its first line of metrics, with an empty and a full compilation cache, data built."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        env = os.environ | {"MOELAB_CACHE": str(cache)}
        command = [sys.executable, "-m", "moelab", "run", f"--config={EXPERIMENT}"]
        build = [sys.executable, "-m", "moelab", "data", "build", f"--config={EXPERIMENT}"]
        subprocess.run(build, check=True, cwd=ROOT, env=env, capture_output=True)
        shutil.rmtree(cache / "jax", ignore_errors=True)
        for name in ("cold", "warm"):
            workdir = Path(folder) / name
            start = time.perf_counter()
            log = (Path(folder) / f"{name}.log").open("w")
            process = subprocess.Popen(
                [*command, f"--workdir={workdir}"], cwd=ROOT, env=env, stdout=log, stderr=log
            )
            while process.poll() is None and not has_first_step(workdir / "metrics.jsonl"):
                time.sleep(0.02)
            rows.append({"cache": name, "seconds_to_first_step": time.perf_counter() - start})
            if process.poll() is not None:
                raise SystemExit(Path(log.name).read_text())
            process.kill()
            process.wait()
    return rows


def has_first_step(path: Path) -> bool:
    """Whether the journal has its first train record."""
    return path.exists() and '"kind":"train"' in path.read_text(encoding="utf-8")


def main() -> None:
    """Prints a table or JSON rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--start", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(ROOT))
    from moelab import environment

    environment.prepare()
    rows = measure_start() if args.start else measure_steps(args.repeats)
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        values = row.get("shape", {}) | {k: v for k, v in row.items() if k != "shape"}
        print(
            "  ".join(f"{k} {f'{v:.3f}' if isinstance(v, float) else v}" for k, v in values.items())
        )


def measure_steps(repeats: int) -> list[dict]:
    """Returns the rows of `moelab bench step`."""
    from moelab.bench import step

    return step.measure(None, repeats)


if __name__ == "__main__":
    main()
