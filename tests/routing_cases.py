"""Random routing problems, and routings as dense arrays: what the shared tests of routers and mechanisms stand on."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from moelab import balancing, capacity, routers, routing

CONFORMANCE = Path(__file__).parent / "conformance"
VOCAB = 64
# Fields without which a router would be something else, or too slow for a test.
FIELDS = {"group_limited": {"num_groups": 2}, "base": {"max_iterations": 500}}


def transcription(folder, kind):
    """The numpy transcription of a kind, loaded from its path (`hash` and others are names of modules)."""
    path = CONFORMANCE / folder / f"{kind}.py"
    assert path.is_file(), f"{kind} has no transcription: write {path.relative_to(path.parents[3])}"
    spec = importlib.util.spec_from_file_location(f"conformance_{folder}_{kind}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_router(kind, num_experts=8, **fields):
    """A router as the model would build it."""
    fields = FIELDS.get(kind, {}) | fields
    if "token_counts" in routers.module(kind).Router.__dataclass_fields__:
        fields["token_counts"] = tuple(int(c) for c in 1000 // np.arange(1, VOCAB + 1))
    return routers.make(kind, num_experts=num_experts, **fields)


def variants(kind):
    """(num_experts, fields) to test a router with: its defaults, then the distinct cases of its transcription."""
    found = [(8, {})]
    if (CONFORMANCE / "routers" / f"{kind}.py").is_file():
        cases = transcription("routers", kind).CASES
        found += [(case["num_experts"], case["fields"]) for case in cases]
    return [case for i, case in enumerate(found) if case not in found[:i]]


def is_valid(kind, num_experts, **fields):
    """Whether a config may have these fields."""
    written = {
        name: field.default
        for name, field in routers.module(kind).Router.__dataclass_fields__.items()
        if name not in ("num_experts", "token_counts", "parent", "name")
    }
    factor = float(routers.module(kind).Router.by_score)
    moe = SimpleNamespace(num_experts=num_experts, capacity_factor=factor)
    validate = getattr(routers.module(kind), "validate", lambda *_: [])
    return not validate(written | FIELDS.get(kind, {}) | fields, SimpleNamespace(moe=moe))


def make_inputs(num_tokens, *, length=8, mask=None, train=False, seed=0, num_columns=None):
    """RouterInput with distinct ids while they last, sequences of `length`, five domains."""
    draw = np.random.default_rng(seed + 100)
    index_T = np.arange(num_tokens, dtype=np.int32)
    mask_T = np.ones(num_tokens, bool) if mask is None else np.asarray(mask)
    previous = None
    if num_columns:
        previous = jnp.asarray(draw.normal(size=(num_tokens, num_columns)), jnp.float32)
    return routing.RouterInput(
        token_id_T=jnp.asarray(index_T % VOCAB),
        sequence_T=jnp.asarray(index_T // length),
        position_T=jnp.asarray(index_T),
        mask_T=jnp.asarray(mask_T),
        domain_T=jnp.asarray(index_T // length % 5),
        key=jnp.asarray([0, seed], jnp.uint32),
        previous_logit_TC=previous,
        train=train,
    )


def make_tokens(num_tokens, width=16, seed=0):
    """Random tokens."""
    return jax.random.normal(jax.random.key(seed), (num_tokens, width))


def make_params(router, width=16, seed=0):
    """Parameters with every leaf random, the residual that starts at zero too."""
    inputs = make_inputs(2, num_columns=router.num_columns)
    variables = router.init(jax.random.key(seed), jnp.zeros((2, width)), inputs, None)
    params = variables.get("params", {})
    draw = np.random.default_rng(seed)
    return {
        name: jnp.asarray(draw.normal(size=a.shape) * 0.5, jnp.float32) if not a.any() else a
        for name, a in params.items()
    }


def apply(router, params, x_TD, inputs, bias=None):
    """router.apply with its parameters."""
    return router.apply({"params": params}, x_TD, inputs, bias)


def apply_with_capacity(router, params, x_TD, inputs, bias=None, factor=1.0):
    """What a MoE block makes of a router under a capacity."""
    routed = apply(router, params, x_TD, inputs, bias)
    if not factor or not router.slots:
        return routed
    limit = capacity.limit_of_valid(inputs.mask_T, router.k, router.num_experts, factor)
    first_T = routed.weight_N.reshape(-1, router.slots)[:, 0] if router.by_score else None
    return capacity.drop(routed, router.num_experts, router.slots, limit, first_T)


def dense(router, routed):
    """(chosen bool, weight) by token and column, as numpy; every column at most once per token."""
    columns = router.num_columns
    count = np.asarray(balancing.column_counts(routed, columns))
    assert count.max(initial=0) <= 1, "a token has the same expert twice"
    weight = np.asarray(balancing.column_weights(routed, router.num_experts, columns))
    return count > 0, weight


def plain_aux(router, routed):
    """A routing's aux as the transcriptions of mechanisms want it: float64, dense."""
    aux, slots = routed.aux, routed.aux.choice_N.size // max(routed.aux.mask_T.size, 1)
    _, weight = dense(router, routed)
    choice = np.asarray(aux.choice_N)
    if router.slots:
        choice = choice.reshape(-1, slots)
    margin = None if aux.margin_TC is None else np.asarray(aux.margin_TC, np.float64)
    return SimpleNamespace(
        logit=np.asarray(aux.logit_TC, np.float64),
        prob=np.asarray(aux.prob_TC, np.float64),
        rank=np.asarray(aux.rank_TC, np.float64),
        choice=choice,
        weight=weight.astype(np.float64),
        mask=np.asarray(aux.mask_T),
        sequence=np.asarray(aux.sequence_T),
        chance=None if margin is None else scipy.stats.norm.cdf(margin),
        num_experts=router.num_experts,
        k=router.k,
    )
