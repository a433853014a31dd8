"""Clean text: the control of `dirty.py` and `filtered.py`.

    moelab run --config=experiments/data/clean.py --workdir=runs/clean

The model of ../ablation.py with the Switch loss. The shares of the domains are fixed at those of the clean corpus, in
all three files: dirt adds text to some domains more than to others, and the question is not which domain is larger.

Lab book
  machine    2 cores of an AMD EPYC (AVX-512), shared (load 10 to 16), jax 0.12.0.1
  wall time  142 s of training, on that load; the preset `epochs` is not measured
  result     2.3682 bits per byte over all domains (seed 0, 39,365 test tokens); Kneser-Ney bigram 2.4200. One seed.
  date       2026-11-29, schema 2
"""

import ml_collections

BASE = "../ablation.py"
PRESETS = {
    "": {},
    "epochs": {"mixture": {"epochs": 4.0}},  # a pool of a quarter of the run's tokens
}


def get_config(preset: str = "") -> ml_collections.ConfigDict:
    """Returns what differs from the base."""
    config = ml_collections.ConfigDict()
    config.balance = dict(switch_loss=dict(coefficient=0.01))
    config.mixture = dict(
        domain_weights=("wiki_en=1416", "wiki_fr=1176", "wiki_es=892", "code=1424", "verse=1092"),
        epochs=0.0,
    )
    config.update(PRESETS[preset])
    return config
