"""Clean text: the control of `dirty.py` and `filtered.py`.

    moelab run --config=experiments/data/clean.py --workdir=runs/clean
    moelab sweep --config=data/clean --sweep=noise --seeds=0-2        # also: texts, copies, epochs, keep

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


def sweep_texts():
    """This file and its neighbours."""
    for name in ("clean", "dirty", "filtered"):
        yield {"name": name, "config": f"data/{name}"}


def sweep_noise():
    """Token noise in every document: how much of it does a model bear?"""
    for rate in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4):
        yield {"name": f"noise {rate}", "data.inject": (f"token_noise share=1 rate={rate}",)}


def sweep_copies():
    """A tenth and a half of the text made of few documents (arXiv:2205.10487): is some number of copies the worst?"""
    for share in (0.1, 0.5):
        for copies in (1, 4, 16, 64, 256):
            text = f"duplicate share={share} copies={copies}"
            yield {"name": f"{share} x{copies}", "data.inject": (text,)}


def sweep_epochs():
    """The same tokens from smaller and smaller pools."""
    for epochs in (1.0, 2.0, 4.0, 8.0, 16.0):
        yield {"name": f"{epochs:g} epochs", "mixture.epochs": epochs}


def sweep_keep():
    """How much a filter leaves of the dirty text, at equal tokens."""
    for keep in (1.0, 0.5, 0.25, 0.1):
        tool = f"perplexity_ngram against=unigram keep={keep}"
        yield {"name": f"keep {keep}", "config": "data/dirty", "data.filter": (tool,)}
