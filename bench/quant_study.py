"""Runs experiments/quant/study.py: does 4-bit keep the quality? And makes its tables in experiments/README.md.

    python bench/quant_study.py run [--seeds 0 1 2] [--jobs 1] [--workdir runs/quant]
    python bench/quant_study.py collect [--workdir runs/quant]

A chain per model and seed: the high-precision run, the post-training methods on it, then what goes on from it. Skips
what is finished.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import batch  # noqa: E402

CONFIG = "experiments/quant/study.py"
MODELS = ("moe", "dense")
FROM_NOTHING = ("nvfp4_training", "fp8_block")
CONTINUED = ("more", "nvfp4_qat", "mxfp4_qat", "nvfp4_qad", "mxfp4_qad")


def directory(workdir: Path, model: str, method: str, seed: int) -> Path:
    """Where a run lies; an empty method is the high-precision run."""
    return workdir / f"{model}{'_' if method else ''}{method}-s{seed}"


def chain(workdir: Path, model: str, seed: int) -> list:
    """The tasks of one model and seed, in order."""
    return [
        functools.partial(_train, workdir, model, method, seed)
        for method in ("", *FROM_NOTHING, *CONTINUED)
    ]


def _train(workdir: Path, model: str, method: str, seed: int, cores: list[int]) -> bool:
    target, base = (directory(workdir, model, m, seed) for m in (method, ""))
    if (target / "result.json").is_file():
        return True
    print(f"{model} {method}, seed {seed}", flush=True)
    preset = f"{model}_{method}" if method else model
    words = [f"--config={CONFIG}:{preset}", f"--workdir={target}", f"--config.seed={seed}"]
    if method in CONTINUED:
        words.append(f"--config.train.start_from={base}")
    if method.endswith("qad"):
        words.append(f"--config.quantization.teacher={base}")
    return batch.moelab("run", *words, cores=cores)


def run(options) -> int:
    """Trains whatever is not finished; returns the number of chains that failed."""
    chains = [chain(options.workdir, m, s) for s in options.seeds for m in MODELS]
    return batch.run_chains(chains, options.jobs)


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for name, function in (("run", run),):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("--workdir", type=Path, default=ROOT / "runs" / "quant")
        if name == "run":
            command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
            command.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    options.workdir = options.workdir.absolute()
    return options.function(options)


if __name__ == "__main__":
    sys.exit(main())
