"""Runs experiments/quant/study.py: does 4-bit keep the quality? And makes its tables in experiments/README.md.

    python bench/quant_study.py run [--seeds 0 1 2] [--jobs 1] [--workdir runs/quant]
    python bench/quant_study.py collect [--workdir runs/quant]
    python bench/quant_study.py show

A chain per model and seed: the high-precision run, post-training quantization of it by every method, then what goes on
from it and what trains from nothing. `run` skips what is finished. `collect` writes experiments/baselines/quant.json,
the tables and experiments/quant.png; `show` makes tables and picture anew of that file.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import batch  # noqa: E402

NUMBERS = ROOT / "experiments" / "baselines" / "quant.json"
CONFIG = "experiments/quant/study.py"
MODELS = ("moe", "dense")
FROM_NOTHING = ("nvfp4_training", "fp8_block")
CONTINUED = ("more", "nvfp4_qat", "mxfp4_qat", "nvfp4_qad", "mxfp4_qad")
# name -> (method, fields)
METHODS = {
    "rtn_search": ("rtn", ("search=mse",)),
    "gptq": ("gptq", ()),
    "awq": ("awq", ()),
    "smoothquant": ("smoothquant", ()),
    "hadamard_gptq": ("hadamard_gptq", ()),
}
FORMATS = ("nvfp4", "mxfp4")
SCHEMES = ("w4a16", "w4a4")


def directory(workdir: Path, model: str, method: str, seed: int) -> Path:
    """Where a run lies; an empty method is the high-precision run."""
    return workdir / f"{model}{'_' if method else ''}{method}-s{seed}"


def post_training(workdir: Path, model: str, method: str, format: str, seed: int) -> Path:
    """Where the result of a post-training method lies."""
    return workdir / f"{model}_ptq_{method}_{format}-s{seed}"


def chain(workdir: Path, model: str, seed: int) -> list:
    """The tasks of one model and seed, in order."""
    train = functools.partial(_train, workdir, model)
    quantize = functools.partial(_quantize, workdir, model)
    return [
        functools.partial(train, "", seed),
        *(functools.partial(quantize, m, f, seed) for m in METHODS for f in FORMATS),
        *(functools.partial(train, method, seed) for method in (*FROM_NOTHING, *CONTINUED)),
    ]


def _train(workdir: Path, model: str, method: str, seed: int, cores: list[int]) -> bool:
    target, base = (directory(workdir, model, m, seed) for m in (method, ""))
    if (target / "result.json").is_file():
        return True
    print(f"{model} {method}, seed {seed}", flush=True)
    preset = f":{model}_{method}" if method else {"moe": "", "dense": ":dense"}[model]
    words = [f"--config={CONFIG}{preset}", f"--workdir={target}", f"--config.seed={seed}"]
    if method in CONTINUED:
        words.append(f"--config.train.start_from={base}")
    if method.endswith("qad"):
        words.append(f"--config.quantization.teacher={base}")
    return batch.moelab("run", *words, cores=cores)


def _quantize(
    workdir: Path, model: str, method: str, format: str, seed: int, cores: list[int]
) -> bool:
    target = post_training(workdir, model, method, format, seed)
    if (target / "quality.json").is_file():
        return True
    print(f"{model} {method} {format}, seed {seed}", flush=True)
    shutil.rmtree(target, ignore_errors=True)
    kind, fields = METHODS[method]
    words = [f"--workdir={directory(workdir, model, '', seed)}", f"--out={target}"]
    words += [f"--recipe={','.join(SCHEMES)}", f"--format={format}", f"--method={kind}"]
    words += [f"--method_field={field}" for field in fields]
    good = batch.moelab("quantize", *words, cores=cores)
    for file in target.glob("*.safetensors"):
        file.unlink()
    return good


def run(options) -> int:
    """Trains whatever is not finished; returns the number of chains that failed."""
    chains = [chain(options.workdir, m, s) for s in options.seeds for m in MODELS]
    return batch.run_chains(chains, options.jobs)


def collect(options) -> int:
    """Writes the numbers, the tables and the picture."""
    import quant_tables

    found = quant_tables.gather(options.workdir)
    NUMBERS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return show(options)


def show(options) -> int:
    """Writes the tables and the picture of the numbers."""
    import quant_tables

    del options
    found = json.loads(NUMBERS.read_text(encoding="utf-8"))
    batch.replace_generated(
        ROOT / "experiments" / "README.md", "quant_study", quant_tables.tables(found)
    )
    quant_tables.picture(found, ROOT / "experiments" / "quant.png")
    return 0


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for name, function in (("run", run), ("collect", collect), ("show", show)):
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
