"""The dirty text after filters: rules, duplicates, a classifier and perplexity, none of which sees a label.

    moelab run --config=experiments/data/filtered.py --workdir=runs/filtered

Lab book
  machine    2 cores of an AMD EPYC (AVX-512), shared (load 10 to 16), jax 0.12.0.1
  wall time  59 s of training, on a lower load (5); the preset `epochs` is not measured
  result     2.3818 bits per byte on the same documents (seed 0); Kneser-Ney bigram 2.4383. One seed: clean 2.3682 and
             dirty 2.4304 stand beside it, and what each filter did is in `moelab data show`.
  date       2026-11-29, schema 2
"""

import ml_collections

BASE = "dirty.py"
PRESETS = {
    "": {},
    "epochs": {"mixture": {"epochs": 4.0}},
}


def get_config(preset: str = "") -> ml_collections.ConfigDict:
    """Returns what differs from the base."""
    config = ml_collections.ConfigDict()
    config.data = dict(
        filter=(
            "exact",
            "minhash",
            "c4",
            "fineweb",
            "classifier keep=0.75",
            "perplexity_ngram against=unigram keep=0.85",
        ),
    )
    config.update(PRESETS[preset])
    return config
