"""What varies with the cut of a batch by definition is the same whatever else the step computes, given its group.

The group of a router that competes is the tokens of one micro-batch on one device; that of a mechanism in micro-batch
scope is one micro-batch. Groups on 2 and 8 devices: `devices_check.py`.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from invariance_test import cut, whole_batch
from routing_cases import apply, apply_with_capacity, dense, make_params, make_router, variants
from small_step import UNOPTIMISED, initial_state, make_batch, small_config, train_step
from tiny import VOCAB

from moelab import balance, blocks, model, moe, parallel, routers

COMPETING = [
    pytest.param(kind, *variant, id=f"{kind}-{i}")
    for kind in routers.KINDS
    for i, variant in enumerate(variants(kind))
    if make_router(kind, variant[0], **variant[1]).competes
]


def route_of(router):
    """The router as its block applies it: where places are given by score, a capacity makes them scarce."""
    return apply_with_capacity if router.by_score else apply


@pytest.mark.parametrize("kind, num_experts, fields", COMPETING)
def test_invariance_of_a_router_given_its_group(kind, num_experts, fields):
    router = make_router(kind, num_experts, **fields)
    params, route = make_params(router), route_of(router)
    groups = cut(*whole_batch(router), 2)
    for x_TD, inputs in groups:
        alone = dense(router, route(router, params, x_TD, inputs))
        # Another place in the step's batch, and other sequences before it.
        moved = inputs._replace(
            position_T=inputs.position_T + 64,
            sequence_T=inputs.sequence_T + 3,
            domain_T=-inputs.domain_T,
        )
        for got, wanted in zip(
            dense(router, route(router, params, x_TD, moved)), alone, strict=True
        ):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("kind", [k for k in routers.KINDS if make_router(k).competes])
def test_invariance_is_declared_missing_where_it_is_missing(kind):
    """A router that competes chooses otherwise in halves of a batch; invariance_test has those that do not."""
    router = make_router(kind)
    assert any(cut_matters(router, route_of(router), seed) for seed in range(20))


@pytest.mark.parametrize("kind", [k for k in routers.KINDS if make_router(k).slots])
def test_invariance_to_the_cut_is_lost_under_a_capacity(kind):
    """Whoever is first come, first served: places are per group, whatever the router declares."""
    router = make_router(kind)
    assert any(cut_matters(router, apply_with_capacity, seed) for seed in range(20))


@pytest.mark.parametrize("kind", routers.KINDS)
def test_invariance_given_the_group_that_a_block_declares(kind):
    """The two tests above say what a choice depends on; a block and its model say the same in words."""
    router = make_router(kind)

    def group(**fields):
        return moe.MoeConfig(router=router, mechanisms=(), expert_width=8, **fields).group

    device = "micro-batch of a device"
    assert group() == (device if router.competes else "")
    limited = router.competes or router.slots is not None
    assert group(capacity_factor=1.0) == (device if limited else "")
    assert group(parallel=True, receive_factor=1.5) == device
    assert group(slots_per_expert=1) == "sequence"


def cut_matters(router, route, seed):
    """Whether a choice differs between the batch and its halves."""
    params = make_params(router, seed=seed)
    x_TD, inputs = whole_batch(router, seed, mask=np.ones(32, bool))
    chosen, weight = dense(router, route(router, params, x_TD, inputs))
    halves = [dense(router, route(router, params, *half)) for half in cut(x_TD, inputs, 2)]
    other, other_weight = (np.concatenate(a) for a in zip(*halves, strict=True))
    # What a capacity dropped keeps its place among the choices and loses its weight.
    return not np.array_equal(chosen & (weight > 0), other & (other_weight > 0))


def group_mechanisms():
    """A loss of the micro-batch, a coefficient that follows it, and a bias from each group's own quantiles."""
    made = (
        ("switch_loss", dict(coefficient=0.1, scope="micro_batch")),
        ("adaptive_loss", dict(coefficient=0.1)),
        ("quantile_bias", dict(rate=0.5, estimator="local_mean")),
    )
    found = tuple((kind, balance.make(kind, **fields)) for kind, fields in made)
    assert not any(mechanism.invariant for _, mechanism in found)
    return found


def competing_model(remat):
    """Every router that competes in a layer of its own, with mechanisms that vary with the cut."""
    plain = model.from_config(small_config(remat=remat), VOCAB, parallel.make_mesh(1))
    block = plain.segments[0].blocks[0]
    segments = []
    for kind in (k for k in routers.KINDS if make_router(k).competes):
        router = make_router(kind, 4)
        factor = 1.0 if router.by_score else 0.0
        sparse = dataclasses.replace(
            block.moe, router=router, mechanisms=group_mechanisms(), capacity_factor=factor
        )
        segments.append(blocks.Segment(count=1, blocks=(dataclasses.replace(block, moe=sparse),)))
    return plain.clone(segments=tuple(segments))


@functools.cache
def steps():
    """A step of two micro-batches, in both orders, and a step of each alone, recomputed in the backward pass."""
    halves = [jax.tree.map(lambda a, s=s: a[s], make_batch()) for s in (slice(4), slice(4, 8))]
    start = initial_state(competing_model(remat=False))
    swapped = jax.tree.map(lambda *a: np.concatenate(a), *halves[::-1])
    found = []
    for batches, remat, count in (((make_batch(), swapped), False, 2), (halves, True, 1)):
        function = jax.jit(train_step(small_config(), competing_model(remat), count))
        lowered = function.lower(start, batches[0], np.float32(1))
        run = lowered.compile(compiler_options=UNOPTIMISED)
        found += [run(start, batch, np.float32(1)) for batch in batches]
    tokens = np.array([half.mask_BL.sum() for half in halves], np.float64)
    return jax.device_get(found), tokens / tokens.sum()


def near(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), one, other)


def test_invariance_of_a_step_given_its_groups():
    """Loss and gradient are those of the groups alone, by their shares of the tokens; counts add up."""
    ((state, report), _, *alone), share = steps()
    mean = lambda *a: sum(s * b for s, b in zip(share, a, strict=True))  # noqa: E731
    added = lambda *a: sum(a)  # noqa: E731
    for name in ("loss", "total_loss", "balance", "coefficient", "logit_norm_M", "log_sum_exp_M"):
        wanted = jax.tree.map(mean, *(getattr(r, name) for _, r in alone))
        near(getattr(report, name), wanted)
    for name in ("load_ME", "dropped_M"):
        np.testing.assert_array_equal(
            getattr(report, name), added(*(getattr(r, name) for _, r in alone))
        )
    # Plain gradient descent with rate 1: parameters show gradients.
    near(state.params, jax.tree.map(mean, *(s.params for s, _ in alone)))
    assert report.load_ME.sum() > 0 and report.dropped_M.sum() > 0
    # Mean of the groups' own quantiles, by their tokens.
    for segment in state.router_state:
        biases = (s.router_state[segment]["block_0"]["moe"]["quantile_bias"] for s, _ in alone)
        near(
            state.router_state[segment]["block_0"]["moe"]["quantile_bias"],
            jax.tree.map(mean, *biases),
        )


def test_invariance_of_a_step_to_the_order_of_its_groups():
    ((state, report), (other, other_report), *_), _ = steps()
    near(report._asdict(), other_report._asdict())
    near(state.params, other.params)
    near(state.router_state, other.router_state)
