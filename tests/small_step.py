"""Whole training steps of a model of one narrow layer, compiled without optimisation: seconds instead of minutes."""

import dataclasses
import functools

import jax
import numpy as np
import optax
from routing_cases import FIELDS
from tiny import VOCAB, make_config

from moelab import balance, data, model, parallel, step

NARROW = dict(num_layers=1, width=16, num_heads=1, num_kv_heads=1, head_dim=16, dense_width=16)
LENGTH = 8
UNOPTIMISED = {"xla_backend_optimization_level": 0}
# Mechanisms of all sorts whose step does not depend on how its batch is cut.
BALANCE = dict(
    switch_loss=dict(coefficient=0.1, scope="global_batch"),
    z_loss=dict(coefficient=0.01),
    loss_free_bias=dict(rate=0.01),
    quantile_bias=dict(rate=0.5, estimator="exact"),
)


def small_config(
    kind="top_k",
    batch_size=8,
    remat=False,
    balance=None,
    moe=None,
    implementation="reference",
    **fields,
):
    """The config of the small model: a router and its mechanisms."""
    return make_config(
        model=NARROW | dict(remat=remat),
        moe=dict(num_experts=4, expert_width=16, implementation=implementation) | (moe or {}),
        router=dict(kind=kind) | FIELDS.get(kind, {}) | fields,
        train=dict(batch_size=batch_size, length=LENGTH, head_chunk=0, clip_norm=0.0),
        balance=balance or {},
    )


def make_batch(batch_size=8, seed=0):
    """Random tokens, with padding that differs much between the sequences."""
    draw = np.random.default_rng(seed)
    token = draw.integers(0, VOCAB, (batch_size, LENGTH + 1)).astype(np.int32)
    # No sequence is empty; the first are short.
    size_B = 1 + np.arange(batch_size) * LENGTH // batch_size
    mask = np.arange(LENGTH)[None] < size_B[:, None]
    target = np.ascontiguousarray(token[:, 1:])
    domain_B = np.arange(batch_size, dtype=np.int32) % 5
    return data.Batch(np.ascontiguousarray(token[:, :-1]), target, mask, domain_B, target)


def with_every_mechanism(transformer):
    """The model with all mechanisms of `balance/` on, also those that its router's config would refuse."""

    def replace(block):
        fields = {"scope": "global_batch"}
        made = []
        for kind in balance.KINDS:
            known = balance.module(kind).Mechanism.__dataclass_fields__
            first = next(iter(known))
            scope = {name: value for name, value in fields.items() if name in known}
            made.append((kind, balance.make(kind, **{first: 0.01} | scope)))
        return dataclasses.replace(
            block, moe=dataclasses.replace(block.moe, mechanisms=tuple(made))
        )

    segments = tuple(
        dataclasses.replace(s, blocks=tuple(replace(b) for b in s.blocks))
        for s in transformer.segments
    )
    return transformer.clone(segments=segments)


@functools.cache
def initial_state(transformer):
    """The state before the first step; plain gradient descent with rate 1, so that parameters show gradients."""
    made = jax.jit(lambda: step.init_state(transformer, optax.sgd(1.0), 0)).lower()
    state = made.compile(compiler_options=UNOPTIMISED)()
    split = any(b.moe.parallel for s in transformer.segments for b in s.blocks if b.moe)
    return jax.device_put(state, parallel.placement(transformer.mesh, state, split))


def compiled_step(config, transformer, accumulation_steps=1):
    """(state, batch, poison) -> (state, report), compiled without optimisation."""
    function = jax.jit(train_step(config, transformer, accumulation_steps))
    sharding = parallel.batch_sharding(transformer.mesh)
    batch = jax.device_put(make_batch(config.train.batch_size), sharding)
    lowered = function.lower(initial_state(transformer), batch, np.float32(1))
    run = lowered.compile(compiler_options=UNOPTIMISED)
    return lambda state, batch, poison: run(state, jax.device_put(batch, sharding), poison)


def train_step(config, transformer, accumulation_steps=1):
    """The step, not compiled."""
    config = accumulating(config, accumulation_steps)
    return step.make_train_step(config, transformer, optax.sgd(1.0))


def accumulating(config, steps):
    """The config with that many micro-batches."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.train.accumulation_steps = steps
    return config


def two_steps(config, accumulation_steps=1, num_devices=1):
    """Two steps: the second starts from a bias that is not 0 and counts of a step before."""
    mesh, size = parallel.make_mesh(num_devices), config.train.batch_size
    # The model is told: where the batch is one micro-batch it need not count first.
    transformer = model.from_config(accumulating(config, accumulation_steps), VOCAB, mesh)
    run = compiled_step(config, transformer, accumulation_steps)
    first = run(initial_state(transformer), make_batch(size, seed=1), np.float32(1))
    return jax.device_get((first, run(first[0], make_batch(size, seed=2), np.float32(1))))


def assert_same_steps(one, other):
    for (state, report), (other_state, other_report) in zip(one, other, strict=True):
        np.testing.assert_array_equal(report.load_ME, other_report.load_ME)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)  # noqa: E731
        jax.tree.map(close, report._asdict(), other_report._asdict())
        jax.tree.map(close, state.params, other_state.params)  # moved by the gradient itself
        mine, others = states_of(state), states_of(other_state)
        for kind in mine.keys() & others.keys():  # those that count first may do without a state
            jax.tree.map(close, mine[kind], others[kind])


def states_of(state):
    """The states of the only layer, by mechanism."""
    if not state.router_state:
        return {}
    return jax.device_get(state.router_state["segment_0"]["block_0"]["moe"])
