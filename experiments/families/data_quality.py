r"""Data quality x size x precision: does a smaller, well-fed MoE beat a larger, badly fed one, both in four bits.

    moelab run --config=experiments/families/data_quality.py --workdir=runs/families_data_quality
    moelab sweep --config=families/data_quality --sweep=learning_rates_large --seeds=100-101 --jobs=2
    moelab report runs/data_quality-learning_rates_large-seeds --split=validation
    moelab sweep --config=families/data_quality --sweep=sizes,texts,recipes --seeds=0-4 --jobs=2
    moelab sweep --config=families/data_quality --sweep=equal_flops,texts,recipes_long --seeds=0-4 --jobs=2
    moelab sweep --config=families/data_quality --sweep=dense,texts,recipes --seeds=0-4 --jobs=2
    moelab baselines add runs/data_quality-sizes-texts-recipes-seeds --family=data_quality
    moelab baselines add runs/data_quality-equal_flops-texts-recipes_long-seeds --family=data_quality
    moelab baselines add runs/data_quality-dense-texts-recipes-seeds --family=data_quality
    moelab baselines add runs/data_quality-controls-recipes-seeds --family=data_quality
    moelab baselines add runs/data_quality-learning_rates_large-seeds --family=data_quality_tuning
    moelab baselines add runs/data_quality-strengths-seeds --family=data_quality_tuning
    moelab baselines add runs/data_quality-tier-seeds --family=data_quality_tier

Without a sweep it is the small model on clean text. `dirty` has a fifth of the words replaced in half of the documents,
chapters of the Bible once more as HTML, and a tenth of the text made of copies, 16 of each document; `filtered` is what
MinHash and a bigram's perplexity against a unigram's leave of it. The shares of the domains are those of the clean text
in all three. Evaluation is always on clean text, the tokenizer of clean text. The filter learned from the validation
split, so that curves on it flatter `filtered`; the tables are of the test split.

`sizes` is at equal tokens; `equal_flops` trains the small model, for four bits, for as many FLOPs as the large one.
Text is scarce: a pool of 0.8 M tokens, and as much of the filtered text as the filters leave of such a pool
(FILTERED), so that filtering costs what it costs, repetition: 400 steps are 1.0 passes, or 2.2, and the 960 of
`small_long` 2.4, or 5.2. (Pools are of whole documents: that of the filtered text has 376,576 tokens, 7 % more than its
share.) Pool and dirt are one draw: seeds vary initialisation and order. The learning rate of the
small model is the one tuned for routing.py; the large one has a grid of its own. Arms called float32 are trained so,
since bfloat16 takes twice the time on these processors (0.39 s a step against 0.20 s, measured once), and run in
bfloat16. `dense` is the small model's dense control.

Before a sentence about data quality against size the long tier is wanted, 20 M tokens of whole texts, three seeds:
the small model on clean, filtered and dirty text against the large one on dirty text, for as many tokens and as many
FLOPs (`large_short`). Its filter is the one that `strengths` chose by the validation split of other seeds.

    moelab sweep --config=families/data_quality --sweep=strengths --seeds=100-101 --jobs=2
    moelab sweep --config=families/data_quality --sweep=tier --seeds=0-2 --jobs=2

`controls` are two small arms that take the filter apart: its text without repetition, and a perfect filter's amount of
clean text.

    moelab sweep --config=families/data_quality --sweep=controls,recipes --seeds=0-4 --jobs=2

Lab book
  machine    2 cores of an AMD EPYC (AVX-512), two runs at a time, jax 0.12.0.1
  wall time  small 85 s of training, large 190 to 210 s, small_long 200 to 230 s, controls and dense 75 to 110 s, and 20
             to 30 s of evaluation; the tier 33 to 42 min a small run, 77 to 93 a large one, 33 to 41 large_short, the
             longer ones beside other work
  result     this dirt costs the small model 0.051 bits per byte in four bits, and the filters do not give it back:
             against dirty text filtered text is worse by 0.0589 [0.0515, 0.0662], 0.0538 [0.0455, 0.0620] for the
             large model, 0.0521 [0.0468, 0.0574] for the dense control, and 0.2534 [0.2440, 0.2629] for small_long:
             its curves lead at first, and fall behind from the third pass of the text on. `controls` say why: with
             as much text as the others had, filtered is dirty's equal, +0.0024 [-0.0051, +0.0098]; a perfect filter's
             clean text, of which there is too little, is worse than either, +0.0823 [+0.0742, +0.0903]. By domain it
             is code that suffers, long files of which a pool holds a dozen; prose gains where text is not repeated.
             Training for four bits changes none of this. Of the filters in `strengths` MinHash alone is best, -0.0478
             [-0.0694, -0.0262] against none over two seeds of the validation split: what it takes away is copies; the
             more a classifier takes besides, the worse. About quality against size, by the tier, in four bits: the
             small model on clean text against the large one on dirty text is undecided for as many tokens, +0.0081
             [-0.0587, +0.0749]; on MinHash's text it is behind, +0.0630 [+0.0585, +0.0674], on dirty text behind,
             +0.1120 [+0.0341, +0.1898]. For as many FLOPs it is ahead on clean text, -0.1268 [-0.1893, -0.0642], ahead
             on MinHash's, -0.0719 [-0.0845, -0.0593], and undecided on dirty text, -0.0229 [-0.1102, +0.0644]. Seeds of
             an arm spread by 0.011 to 0.037 (standard deviation), and the better ones have the larger induction gain
             (correlation within arms -0.73, 15 runs)
  date       2026-11-30
"""

import ml_collections

BASE = "../ablation.py"

DIRT = (
    "token_noise share=0.5 rate=0.2",
    "wheel source=html_bible share=0.3",
    "duplicate share=0.1 copies=16",
)
FILTERS = ("minhash threshold=0.7", "perplexity_ngram against=unigram keep=0.5")
POOL = 800_000  # tokens
FILTERED = 352_000  # FILTERS leave 44.0 % of the tokens of the dirty text
TIER_FILTERS = FILTERS[:1]  # of sweep_strengths: MinHash alone
SCARCE = 306_000  # 38.3 % of the tokens of the dirty text are of documents left as they were
SHARES = (
    "wiki_en=1416",
    "wiki_fr=1176",
    "wiki_es=892",
    "code=1424",
    "verse=1092",
)  # of the clean text
LARGE = {
    "model.num_layers": 6,
    "model.width": 192,
    "model.num_heads": 6,
    "moe.expert_width": 192,
    "optimizer.learning_rate": 5e-3,  # of sweep_learning_rates_large
}


def get_config() -> ml_collections.ConfigDict:
    """Returns what differs from the base."""
    config = ml_collections.ConfigDict()
    config.router = dict(kind="top_k", k=2)
    config.balance = dict(switch_loss=dict(coefficient=0.01))
    config.mixture = dict(unique_tokens=POOL, domain_weights=SHARES)
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


def sweep_dense():
    """The small model's dense control, of equal active parameters."""
    yield {
        "name": "small_dense",
        "moe.num_experts": 1,
        "moe.expert_width": 256,
        "router.k": 1,
        "balance.switch_loss.coefficient": 0.0,
    }


def sweep_texts():
    """What they are trained on."""
    yield {"name": "clean", "data.inject": (), "data.filter": ()}
    yield {"name": "dirty", "data.inject": DIRT, "data.filter": ()}
    yield {
        "name": "filtered",
        "data.inject": DIRT,
        "data.filter": FILTERS,
        "mixture.unique_tokens": FILTERED,
    }


def sweep_controls():
    """What filtering costs and buys: with as much text as without, and what a perfect filter would leave."""
    yield {"name": "small-filtered_fresh", "data.inject": DIRT, "data.filter": FILTERS}
    yield {"name": "small-clean_scarce", "mixture.unique_tokens": SCARCE}


def sweep_recipes():
    """Trained as it is; or for four bits from step 250 on."""
    yield {"name": "float32", "quantization.recipe": "none"}
    yield {"name": "nvfp4_qat", "quantization.recipe": "nvfp4_qat", "quantization.start_step": 250}


def sweep_recipes_long():
    """For four bits, the question's; the same share of the longer run."""
    yield {"name": "nvfp4_qat", "quantization.recipe": "nvfp4_qat", "quantization.start_step": 600}


def sweep_strengths():
    """What to filter, tuned at the length of `small_long`; the pool is what the filter leaves of POOL."""
    minhash, text = FILTERS[0], "domains=wiki_en+wiki_fr+wiki_es+verse"
    for name, tools, left in (
        ("none", (), POOL),
        ("minhash", (minhash,), 720_000),
        ("keep=0.8", (minhash, "classifier keep=0.8"), 572_000),
        ("text_keep=0.8", (minhash, f"classifier keep=0.8 {text}"), 603_000),
        ("text_keep=0.65", (minhash, f"classifier keep=0.65 {text}"), 518_000),
        ("text_keep=0.5", (minhash, f"classifier keep=0.5 {text}"), 435_000),
    ):
        yield {
            "name": name,
            "train.num_steps": 960,
            "quantization.recipe": "nvfp4_qat",
            "quantization.start_step": 600,
            "data.inject": DIRT,
            "data.filter": tools,
            "mixture.unique_tokens": left,
        }


def sweep_tier():
    """The question at 20 M tokens, the recipe's share of the steps as above; `large_short` has the FLOPs of `small`."""
    tier = {
        "train.num_steps": 10_000,
        "checkpoint.every": 1000,
        "evaluation.every": 1000,
        "mixture.unique_tokens": 0,
        "evaluation.tasks": ("facts", "minimal_pairs", "induction", "recall", "memorisation"),
        "quantization.recipe": "nvfp4_qat",
        "quantization.start_step": 6250,
    }
    short = {"train.num_steps": 4160, "evaluation.every": 416, "quantization.start_step": 2600}
    dirty = {**tier, "data.inject": DIRT}
    yield {"name": "large-dirty-nvfp4_qat", **dirty, **LARGE}
    yield {"name": "small-clean-nvfp4_qat", **tier}
    yield {"name": "small-filtered-nvfp4_qat", **dirty, "data.filter": TIER_FILTERS}
    yield {"name": "large_short-dirty-nvfp4_qat", **dirty, **LARGE, **short}
    yield {"name": "small-dirty-nvfp4_qat", **dirty}


def sweep_learning_rates_large():
    """The published grid without its lower end, on the large model and clean text."""
    for rate in (2.5e-3, 5e-3, 1e-2, 2e-2):
        yield {**LARGE, "name": f"large,learning_rate={rate}", "optimizer.learning_rate": rate}
