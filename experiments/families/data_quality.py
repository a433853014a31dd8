r"""Data quality x size x precision: does a smaller, well-fed MoE beat a larger, badly fed one, both in four bits.

    moelab run --config=experiments/families/data_quality.py --workdir=runs/families_data_quality
    moelab sweep --config=families/data_quality --sweep=learning_rates_large --seeds=100-101 --jobs=2
    moelab report runs/data_quality-learning_rates_large-seeds --split=validation
    moelab sweep --config=families/data_quality --sweep=sizes,texts,recipes --seeds=0-4 --jobs=2
    moelab sweep --config=families/data_quality --sweep=equal_flops,texts,recipes_long --seeds=0-4 --jobs=2
    moelab baselines add runs/data_quality-sizes-texts-recipes-seeds --family=data_quality
    moelab baselines add runs/data_quality-equal_flops-texts-recipes_long-seeds --family=data_quality

Without a sweep it is the small model on clean text. `dirty` has words replaced in half of the documents, the verses
once more as HTML, and a tenth of the text copied 16 times; `filtered` is what MinHash and a bigram's perplexity against
a unigram's leave of it (half). Evaluation is always on clean text, the tokenizer of clean text. `sizes` is at equal
tokens; `equal_flops` trains the small model for as many FLOPs as the large one. The pool is 0.4 M tokens, 0.2 M after
the filters, so that 400 steps are two passes, or four, and filtering costs what it costs where text is scarce:
repetition. The learning rate of the small model is the one tuned for routing.py; the large one has a grid of its own.
`bf16` is trained in float32, in half the time that bfloat16 takes on these processors.

Before a sentence about data quality against size the long tier is wanted, 20 M tokens of the whole texts, three seeds.
All eighteen arms would be some 40 hours on one core; the two of the question are 6:

    moelab sweep --config=families/data_quality --sweep=tier --seeds=0-2 --jobs=2

Lab book
  machine    not measured
  wall time  2 to 4 minutes a run on one core, from 38 s for 150 steps of the small model; filtering once, not measured
  result     not measured
  date       not measured
"""

import ml_collections

BASE = "../ablation.py"

DIRT = (
    "token_noise share=0.5 rate=0.2",
    "wheel source=html_bible share=0.3",
    "duplicate share=0.1 copies=16",
)
FILTERS = ("minhash threshold=0.7", "perplexity_ngram against=unigram keep=0.5")
POOL = 400_000  # tokens
LARGE = {"model.num_layers": 6, "model.width": 192, "model.num_heads": 6, "moe.expert_width": 192}


def get_config() -> ml_collections.ConfigDict:
    """Returns what differs from the base."""
    config = ml_collections.ConfigDict()
    config.router = dict(kind="top_k", k=2)
    config.balance = dict(switch_loss=dict(coefficient=0.01))
    config.mixture = dict(unique_tokens=POOL)
    config.optimizer = dict(learning_rate=1e-2)
    config.train = dict(num_steps=400)
    config.checkpoint = dict(every=400)
    config.evaluation = dict(every=80, precisions=("float32", "bf16", "nvfp4_w", "nvfp4_wa"))
    return config


def sweep_sizes():
    """Equal tokens."""
    yield {"name": "small", "model.num_layers": 4}
    yield {"name": "large", **LARGE}


def sweep_equal_flops():
    """The small model, for the large one's FLOPs."""
    yield {"name": "small_long", "train.num_steps": 960}


def sweep_texts():
    """What they are trained on: a pool of text, and what the filters leave of one as large."""
    half = {"mixture.unique_tokens": POOL // 2}
    yield {"name": "clean", "data.inject": (), "data.filter": ()}
    yield {"name": "dirty", "data.inject": DIRT, "data.filter": ()}
    yield {"name": "filtered", "data.inject": DIRT, "data.filter": FILTERS, **half}


def sweep_recipes():
    """Run in bfloat16, or rounded to four bits; or trained for four bits from step 250 on."""
    yield {"name": "bf16", "quantization.recipe": "none"}
    yield {"name": "nvfp4_qat", "quantization.recipe": "nvfp4_qat", "quantization.start_step": 250}


def sweep_recipes_long():
    """The same shares of the longer run."""
    yield {"name": "bf16", "quantization.recipe": "none"}
    yield {"name": "nvfp4_qat", "quantization.recipe": "nvfp4_qat", "quantization.start_step": 600}


def sweep_tier():
    """The question at 20 M tokens, the recipe's share of the steps as above."""
    tier = {
        "train.num_steps": 10_000,
        "checkpoint.every": 1000,
        "evaluation.every": 1000,
        "mixture.unique_tokens": 0,
        "data.inject": DIRT,
        "quantization.recipe": "nvfp4_qat",
        "quantization.start_step": 6250,
    }
    yield {"name": "large-dirty-nvfp4_qat", **tier, **LARGE}
    yield {"name": "small-filtered-nvfp4_qat", **tier, "data.filter": FILTERS}


def sweep_learning_rates_large():
    """The published grid without its ends, on the large model and clean text."""
    for rate in (2.5e-3, 5e-3, 1e-2):
        yield {"optimizer.learning_rate": rate, **LARGE, "name": f"large,learning_rate={rate}"}
