"""Training: the time of a step over tensor, expert, pipeline and data parallelism, MFU, memory, the bubble.

    t_step = (m + p - 1) / m (t_compute + t_moved + t_tensor + (1 - hidden) t_exchange + t_fixed) + t_data

m micro-batches, p stages. Compute is FLOPs over calibrated shares of the dense peak; attention's core runs in bfloat16.
Moved are activations that permutation, activation functions and norms read and write, of which small experts have many.
The exchange between experts' ranks happens four times a layer: dispatch and combine, forward and backward.
"""

from __future__ import annotations

import dataclasses
import math

from moelab.errors import UserError
from moelab.plan import calibration as calibrations
from moelab.plan import hardware, published
from moelab.plan.figures import Source, scaled
from moelab.plan.hardware import System
from moelab.plan.models import Model

PRECISIONS = {"bf16": "bf16", "fp8": "fp8", "mxfp8": "fp8", "nvfp4": "fp4"}
# Set by the 18 rows of `published_rows`: what training reaches of the kernels' efficiency by precision, and how often
# activations are moved. Nothing is held out, and the 80 % band (measured over predicted) is what is left: recipes of
# the same chip differ by two.
OVERHEAD = {"bf16": 0.95, "fp8": 0.80, "fp4": 0.80}
MOVED = 3.0
FIXED = (
    4.0  # launches of a layer in training over those of a decoding step: forward and twice backward
)
HIDDEN = 0.5  # share of the exchange under compute (an assumption; DualPipe claims nearly all)
BAND = (0.5, 1.35)


class DegreesError(UserError):
    """Degrees of parallelism that do not fit the GPUs, the batch or the model."""


@dataclasses.dataclass(frozen=True)
class Job:
    """How a model is trained.

    Attributes:
      precision: of the matrix products: bf16, fp8, mxfp8, nvfp4.
      length: tokens of a sequence.
      global_batch: sequences of a step.
      micro_batch: sequences of a micro-batch.
      tp, pp, ep: degrees; data parallelism is what is left. Experts are shared over ep of the data-parallel ranks.
      recompute: activations are recomputed in the backward pass.
    """

    precision: str = "bf16"
    length: int = 4096
    global_batch: int = 2048
    micro_batch: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    recompute: bool = False


@dataclasses.dataclass(frozen=True)
class Step:
    """What a training step takes.

    Attributes:
      seconds: of the step.
      parts: name -> seconds on one GPU, the bubble among them.
      tokens_per_gpu: tokens per second and GPU.
      flops_per_gpu: model FLOP/s of one GPU.
      mfu: of the peak of the job's precision.
      mfu_bf16: of the peak of bfloat16, as many papers state it.
      memory: bytes on one GPU: name -> bytes.
      fits: whether the memory holds it.
    """

    seconds: float
    parts: dict[str, float]
    tokens_per_gpu: float
    flops_per_gpu: float
    mfu: float
    mfu_bf16: float
    memory: dict[str, float]
    fits: bool


def step(model: Model, system: System, job: Job) -> Step:
    """Times one step.

    Raises:
      UserError: degrees that do not fit the GPUs, the batch or the model.
      HardwareError: the GPU lacks the precision.
    """
    gpu, values = system.gpu, calibrations.shipped().efficiency
    dp = _check(model, system, job)
    kind = PRECISIONS[job.precision]
    tokens = job.global_batch * job.length
    mine = tokens / system.count  # tokens whose whole computation one GPU does
    core = 3 * model.core_flops(job.length / 2) * mine
    total = model.training_flops(job.length) * mine
    again = 4 / 3 if job.recompute else 1.0
    order = ("bf16", "fp8", "fp4")
    share = values.compute[order.index(kind)] * OVERHEAD[kind]
    plain = values.compute[0] * OVERHEAD["bf16"]
    compute = again * ((total - core) / gpu.peak(kind) / share + core / gpu.peak("bf16") / plain)
    inside = gpu.nvlink.value * values.link[0]
    outside = gpu.nic.value * values.link[1]
    rows = (
        mine * job.tp
    )  # tokens that pass through a tensor-parallel group, each GPU holding a share
    link = inside if job.tp <= gpu.domain.value else outside
    tensor = 4 * model.layers * 2 * (1 - 1 / job.tp) * rows / job.tp * model.width * 2 / link
    exchange = _exchange(model, system, job, mine, inside, outside)
    micro = job.global_batch / (dp * job.micro_batch)
    bubble = (job.pp - 1) / micro
    moved = MOVED * again * 3 * mine * _moved(model) / (gpu.bandwidth.value * values.memory[0])
    fixed = micro * FIXED * math.ceil(model.layers / job.pp) * max(values.layer)
    busy = compute + moved + tensor + (1 - HIDDEN) * exchange + fixed
    memory = _memory(model, job, dp)
    gradient = 2 * (1 - 1 / dp) * memory["weights"] / 2 * 2 * 0.25 / (outside if dp > 1 else inside)
    seconds = busy * (1 + bubble) + gradient
    peak = gpu.peak(kind)
    rate = tokens / seconds / system.count
    flops = rate * model.training_flops(job.length)
    parts = {
        "compute": compute,
        "moving activations": moved,
        "fixed per layer": fixed,
        "tensor parallelism": tensor,
        "exchange between experts' ranks, not hidden": (1 - HIDDEN) * exchange,
        "bubble": busy * bubble,
        "gradients, not hidden": gradient,
    }
    fits = sum(memory.values()) <= gpu.memory.value
    rates = (rate, flops, flops / peak, flops / gpu.peak("bf16"))
    return Step(seconds, parts, *rates, memory, fits)


def search(model: Model, system: System, job: Job) -> tuple[Job, Step]:
    """Tries degrees of tensor, pipeline and expert parallelism and returns the fastest that fits.

    Raises:
      UserError: none fits; the message says by how many bytes the nearest does not.
    """
    powers = [2**i for i in range(11)]
    found: list[tuple[Job, Step]] = []
    for tp in (p for p in powers if p <= min(16, system.gpu.domain.value)):
        for pp in (p for p in powers if p <= min(64, model.layers)):
            for ep in (p for p in powers if p <= max(model.experts, 1)):
                own = dataclasses.replace(job, tp=tp, pp=pp, ep=ep)
                try:
                    found.append((own, step(model, system, own)))
                except DegreesError:
                    continue
    if not found:
        step(model, system, job)  # says what is wrong with the batch
        raise UserError(f"no degrees fit {system.name} and a batch of {job.global_batch}")
    fitting = [pair for pair in found if pair[1].fits]
    if not fitting:
        nearest = min((s for _, s in found), key=lambda s: sum(s.memory.values()))
        raise UserError(does_not_fit(model, system, nearest))
    return max(fitting, key=lambda pair: pair[1].tokens_per_gpu)


def _check(model: Model, system: System, job: Job) -> int:
    if job.precision not in PRECISIONS:
        raise UserError(f"training computes in {', '.join(PRECISIONS)}, not in {job.precision!r}")
    group = job.tp * job.pp
    if system.count % group:
        raise DegreesError(
            f"{system.count} GPUs cannot be dealt into tp {job.tp} x pp {job.pp} = {group}"
        )
    dp = system.count // group
    if job.ep > 1 and (dp * job.tp) % job.ep:
        raise DegreesError(f"ep {job.ep} wants a divisor of the {dp * job.tp} GPUs of a stage")
    if job.ep > max(model.experts, 1):
        raise DegreesError(f"ep {job.ep} is more than the {model.experts} experts of {model.name}")
    if job.pp > model.layers:
        raise DegreesError(f"pp {job.pp} is more than the {model.layers} layers of {model.name}")
    if job.global_batch % (dp * job.micro_batch):
        raise DegreesError(
            f"a batch of {job.global_batch} sequences cannot be dealt to {dp} data-parallel ranks in micro-batches of "
            f"{job.micro_batch}"
        )
    return dp


def _exchange(model: Model, system: System, job: Job, tokens, inside, outside) -> float:
    """Times four passes a layer, each token once to every rank, or every node, that has one of its experts."""
    if job.ep <= 1 or not model.experts:
        return 0.0
    size = 1.5 if PRECISIONS[job.precision] != "bf16" else 2.0  # FP8 dispatch, bfloat16 combine
    ranks = job.ep * (1 - (1 - 1 / job.ep) ** model.k) * (1 - 1 / job.ep)
    nodes = max(math.ceil(job.ep / system.gpu.domain.value), 1)
    limit = model.group_limit if model.groups > 1 else math.inf
    away = min(nodes * (1 - (1 - 1 / nodes) ** model.k), limit) * (1 - 1 / nodes)
    row = 4 * model.sparse_layers * tokens * model.width * size
    return row * ranks / inside + row * away / outside


def _moved(model: Model) -> float:
    """Counts bytes that one token's activations read and write in a forward pass, all layers."""
    d, a = model.width, model.attention
    sparse = 2 * model.k * d + 3 * model.k * model.expert_width + 3 * model.shared_width
    heads = a.heads * (a.v_dim if a.kv_lora else a.head_dim)
    every = model.layers * (8 * d + 4 * heads)
    return (
        2.0
        * 2
        * (model.sparse_layers * sparse + every + model.dense_layers * 3 * model.dense_width)
    )


def _memory(model: Model, job: Job, dp: int) -> dict[str, float]:
    """Counts bytes on one GPU: weights and gradients in bfloat16 and float32, the optimizer's states shared over dp."""
    counts = model.parameters()
    experts = counts["experts"] / (job.pp * max(job.ep, 1))
    others = (model.total() - counts["experts"]) / (job.pp * job.tp)
    held = experts + others
    shared = experts / max(dp * job.tp / max(job.ep, 1), 1) + others / dp
    tokens = job.micro_batch * job.length / job.tp
    layers = math.ceil(model.layers / job.pp)
    hidden = (
        model.k * model.expert_width
        + model.shared_width
        + model.dense_width * (model.dense_layers / model.layers)
    )
    a = model.attention
    row = (
        model.width * 2
        if job.recompute
        else 2
        * (8 * model.width + 3 * hidden + 4 * a.heads * (a.head_dim if not a.kv_lora else a.nope))
    )
    return {
        "weights": 2.0 * held,
        "gradients": 4.0 * held,
        "optimizer": 12.0 * shared,
        "activations": row * tokens * layers * job.pp,  # the first stage holds pp micro-batches
    }


def does_not_fit(model: Model, system: System, found: Step) -> str:
    """Says by how many bytes."""
    need, room = sum(found.memory.values()), system.gpu.memory.value
    parts = ", ".join(f"{name} {scaled(size, 'B')}" for name, size in found.memory.items())
    return (
        f"{model.name} does not fit {system.name} so: {parts} need {scaled(need, 'B')} of {scaled(room, 'B')}: "
        f"{math.ceil(need - room)} bytes too many per GPU"
    )


@dataclasses.dataclass(frozen=True)
class Published:
    """A published training rate.

    Attributes:
      model, system, job: what was trained, on what, how; degrees that the source does not state are guesses.
      tokens_per_gpu: measured.
      source: of the row.
    """

    model: str
    system: str
    job: Job
    tokens_per_gpu: float
    source: Source


_BRIDGE = Source("Megatron-Bridge 25.11 performance table", "2025-11", "measured")
_V3 = Source("arXiv:2412.19437: 2.788 M H800 hours, 14.8 T tokens", "2024-12", "measured")


def published_rows() -> tuple[Published, ...]:
    """Returns rates to compare with; nothing but OVERHEAD was set by them."""

    def row(model, system, precision, rate, source=_BRIDGE, **degrees):
        return Published(model, system, Job(precision=precision, **degrees), rate, source)

    v3 = {"global_batch": 4096}
    return (
        row("deepseek_v3", "gb300x256", "bf16", 3848, pp=2, ep=32, **v3),
        row("deepseek_v3", "gb300x256", "mxfp8", 4357, pp=2, ep=32, **v3),
        row("deepseek_v3", "gb200x256", "bf16", 3139, pp=4, ep=64, **v3),
        row("deepseek_v3", "gb200x256", "mxfp8", 4018, pp=8, ep=32, **v3),
        row("deepseek_v3", "b200x256", "mxfp8", 2139, pp=16, ep=8, **v3),
        row("qwen3_235b", "gb300x256", "bf16", 6131, pp=4, ep=32, global_batch=4096),
        row("qwen3_235b", "gb200x256", "bf16", 4916, pp=8, ep=32, global_batch=4096),
        row("qwen3_235b", "b200x64", "mxfp8", 3269, pp=8, ep=8, global_batch=1024),
        row("qwen3_235b", "h100x256", "fp8", 1575, tp=2, pp=8, ep=16, global_batch=2048),
        row("qwen3_30b", "gb300x8", "mxfp8", 28934, ep=8, global_batch=512),
        row("qwen3_30b", "gb200x8", "mxfp8", 23766, ep=8, global_batch=512),
        row("qwen3_30b", "b200x8", "mxfp8", 9299, ep=8, global_batch=512),
        row("qwen3_30b", "h100x16", "fp8", 5275, pp=2, ep=8, global_batch=512),
        row("gpt_oss_120b", "gb300x64", "bf16", 18347, ep=64, global_batch=1280),
        row("gpt_oss_120b", "gb200x64", "bf16", 15876, ep=64, global_batch=1280),
        row("gpt_oss_120b", "b200x64", "bf16", 8213, ep=8, global_batch=1280),
        row("gpt_oss_120b", "h100x64", "bf16", 5630, pp=4, ep=8, global_batch=1280),
        row("deepseek_v3", "h800x2048", "fp8", 1543, _V3, pp=16, ep=64, global_batch=15360),
    )


def outside(model: Model, system: System, job: Job) -> tuple[str, ...]:
    """Names what is beyond the published rows that set OVERHEAD and BAND."""
    rows = published_rows()
    systems = [hardware.system(row.system) for row in rows]
    sizes = [published.find(row.model).total() for row in rows]
    found = []
    if system.gpu.name not in {s.gpu.name for s in systems}:
        found.append(f"gpu {system.gpu.name}")
    if job.precision not in {row.job.precision for row in rows}:
        found.append(f"precision {job.precision}")
    for name, value, known in (
        ("gpus", system.count, [s.count for s in systems]),
        ("parameters", model.total(), sizes),
        ("length", job.length, [row.job.length for row in rows]),
    ):
        if not min(known) <= value <= max(known):
            side = "below" if value < min(known) else "above"
            found.append(
                f"{name} {value:.6g} is {side} {min(known) if side == 'below' else max(known):.6g}"
            )
    return tuple(found)


def band(beyond: tuple[str, ...]) -> tuple[float, float]:
    """Returns the factors of the 80 % band of the rate: beyond the published rows at least 1/2 and 2 (assumed)."""
    return (min(BAND[0], 0.5), max(BAND[1], 2.0)) if beyond else BAND
