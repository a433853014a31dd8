"""The dirty text after filters: rules, duplicates, a classifier and perplexity, none of which sees a label.

    moelab run --config=experiments/data/filtered.py --workdir=runs/filtered

Lab book
  machine    not measured
  wall time  not measured
  result     not measured
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
            "perplexity_ngram keep=0.85",
        ),
    )
    config.update(PRESETS[preset])
    return config
