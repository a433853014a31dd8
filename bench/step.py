"""Times whole training steps against the same model with dense feed-forwards of equal active width.

    python bench/step.py [--json] [--repeats 7]       steps: bar 1.25 for (E=16, k=2), 1.4 for (E=64, k=8)
    python bench/step.py --start                      seconds from the command to the first step, cold and warm

OLMoE-shaped (experiments/olmoe_shaped.py): 4 layers, D=256, F=256, vocabulary 4096, 16 sequences of 256 tokens,
float32, AdamW. Every repeat runs the best float32 matmul (2048 cubed) and one step of each model in turn, since these
machines' speed drifts; a ratio is the median over repeats of the ratios within a repeat. Model FLOPs are
moelab.model.summary's: three times the forward matmuls with full attention.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = ROOT / "experiments" / "olmoe_shaped.py"
PRESETS = {"E=16 k=2": ("", "dense_e16"), "E=64 k=8": ("e64", "dense_e64")}
BARS = {"E=16 k=2": 1.25, "E=64 k=8": 1.4}
VOCAB = 4096


def make_run(preset: str, recipe: str = "none"):
    """Returns a function that runs one step under a recipe and waits for it, and the model FLOPs of a step."""
    import jax
    import numpy as np

    from moelab import config as configs
    from moelab import data, model, optimizer, step
    from moelab.quant import recipes

    config = configs.load(f"{EXPERIMENT}:{preset}" if preset else str(EXPERIMENT)).config
    batch, length = config.train.batch_size, config.train.length
    transformer = model.from_config(config, VOCAB, recipe=recipes.named(recipe))
    shapes = jax.eval_shape(lambda: model.init(transformer, jax.random.key(0)))["params"]
    tx = optimizer.make(config, shapes)
    train_step = jax.jit(step.make_train_step(config, transformer, tx), donate_argnums=0)
    state = [jax.jit(lambda: step.init_state(transformer, tx, 0))()]
    token = np.random.default_rng(0).integers(0, VOCAB, (batch, length + 1)).astype(np.int32)
    zeros = np.zeros((batch, length), np.int32)
    tokens = data.Batch(token[:, :-1], token[:, 1:], zeros == 0, zeros[:, 0], zeros)
    one = np.float32(1)

    def run():
        state[0], report = train_step(state[0], tokens, one)
        jax.block_until_ready((state[0], report))

    flops = model.summary(config, VOCAB)["flops_per_token"]["train"] * batch * length
    return run, flops


def make_matmul():
    """Returns a float32 matmul of 2048 cubed that waits for its result, and its FLOPs."""
    import jax

    a = jax.random.normal(jax.random.key(0), (2048, 2048))
    run = jax.jit(lambda a: a @ a)
    return (lambda: run(a).block_until_ready()), 2 * 2048**3


def seconds(run) -> float:
    """Times one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure_steps(repeats: int) -> list[dict]:
    """Returns a row per model pair: ratio, and share of the matmul's rate for sparse and dense."""
    return [measure_pair(name, presets, repeats) for name, presets in PRESETS.items()]


def measure_pair(name: str, presets: tuple[str, str], repeats: int) -> dict:
    """Times matmul, sparse step and dense step in turn; only this pair's models are in memory."""
    runs = {
        "matmul": make_matmul(),
        "sparse": make_run(presets[0]),
        "dense": make_run(presets[1]),
    }
    times = {key: [] for key in runs}
    for run, _ in 2 * list(runs.values()):
        run()  # compiles, then touches its memory
    for _ in range(repeats):
        for key, (run, _) in runs.items():
            times[key].append(seconds(run))
    peak = runs["matmul"][1] / min(times["matmul"])
    ratios = [a / b for a, b in zip(times["sparse"], times["dense"], strict=True)]
    used = {k: runs[k][1] / statistics.median(times[k]) / peak for k in ("sparse", "dense")}
    return {
        "model": name,
        "seconds": statistics.median(times["sparse"]),
        "dense_seconds": statistics.median(times["dense"]),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "bar": BARS[name],
        "utilisation": used["sparse"],
        "dense_utilisation": used["dense"],
        "matmul_gflops": peak / 1e9,
    }


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
    from moelab import environment

    environment.prepare()
    rows = measure_start() if args.start else measure_steps(args.repeats)
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(
            "  ".join(
                f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
            )
        )


if __name__ == "__main__":
    main()
