"""Times filters on the whole five-domain corpus with dirt in it, and prints how well they find it.

    python bench/filtering.py [--config=experiments/data/dirty.py] [--tool=KIND ...] [--alone] [--json]

By default MinHash, the four sets of rules and the classifier, one after the other, as `data.filter` applies them. Bar:
90 s on two cores, from the first word read to the last verdict; making the dirt is not filtering and is timed apart.
With --alone every filter judges all documents (moelab data score), so that their precision and recall compare.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

from moelab import config as configs  # noqa: E402
from moelab import data  # noqa: E402
from moelab.cli import quality_tables  # noqa: E402
from moelab.data import sources  # noqa: E402
from moelab.data.build import as_section, cache_directory  # noqa: E402
from moelab.data.quality import (  # noqa: E402
    chain,
    parse_filters,
    parse_injectors,
    spec,
    truth,
    workers,
)
from moelab.data.quality.pool import Pool  # noqa: E402

BAR_SECONDS = 90
TOOLS = (
    "minhash",
    "gopher_quality",
    "gopher_repetition",
    "c4",
    "fineweb",
    "classifier",
)
EVERY = (
    *TOOLS,
    "exact",
    "substring",
    "dsir",
    "perplexity_ngram",
    "perplexity_ngram against=unigram",
)


def timed(tool, seconds: dict[str, float]):
    """Makes a filter note how long it judges."""
    judge = tool.judge

    def judged(pool):
        started = time.perf_counter()
        verdicts = judge(pool)
        seconds[spec.written(tool)] = time.perf_counter() - started
        return verdicts

    object.__setattr__(tool, "judge", judged)  # frozen
    return tool


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="experiments/data/dirty.py")
    parser.add_argument("--tool", action="append", default=[])
    parser.add_argument("--alone", action="store_true", help="every filter on all documents")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    config = configs.load(args.config).config
    section = as_section("data", config.data)
    clean = {**config.data, "inject": (), "filter": ()}
    made = data.build(clean, config.tokenizer).tokenizer
    source = sources.open_source(section, cache_directory() / "data" / "files")
    started = time.perf_counter()
    pool = Pool(source, parse_injectors(section.inject), made)
    size = sum(len(one.document.text.encode()) for one in pool.training())
    injecting = time.perf_counter() - started
    tools = args.tool or (EVERY if args.alone else TOOLS)
    seconds_of: dict[str, float] = {}
    filters = [timed(tool, seconds_of) for tool in parse_filters(tools, "--tool")]
    started = time.perf_counter()
    table, outcomes = (chain.score if args.alone else chain.run)(pool, filters)
    seconds = time.perf_counter() - started
    workers.stop()
    every_N = np.ones(len(table), bool)
    counts = [truth.labels(table, chosen_N) for chosen_N in (every_N, table.kept_N)]
    together = None if args.alone else truth.of_all(*counts)
    found = {
        "machine": f"{platform.processor() or platform.machine()}, {workers.num_workers()} cores, "
        f"load {os.getloadavg()[0]:.1f}",
        "documents": len(table),
        "bytes": size,
        "injecting_seconds": injecting,
        "seconds": seconds,
        "seconds_of": seconds_of,
        "outcomes": outcomes,
        "all_filters": together,
    }
    if args.json:
        print(json.dumps(found, indent=1))
        return
    print(
        f"{found['machine']}; {len(table):,} documents, {size:,} bytes, dirt in {injecting:.1f} s"
    )
    for kind, taken in seconds_of.items():
        print(f"{kind:<35}{taken:6.1f} s")
    bar = "" if args.tool or args.alone else f" (bar {BAR_SECONDS})"
    print(f"{'all':<35}{seconds:6.1f} s{bar}")
    quality_tables.print_outcomes(outcomes, together)


if __name__ == "__main__":
    main()
