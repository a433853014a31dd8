"""Run by invariance_test in a process with 8 virtual devices: steps, then every router and mechanism, on 1, 2 and 8.

Whole steps compile for seconds, so that they show one router with four mechanisms. The others are shown in a block of
their own, whose experts are numbers; all blocks are one program per number of devices.
"""

import jax
import jax.numpy as jnp
import numpy as np
from invariance_test import mechanisms
from routing_cases import make_inputs, make_router, make_tokens
from small_step import BALANCE, UNOPTIMISED, assert_same_steps, small_config, two_steps

from moelab import balance, moe, parallel, routers

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

LENGTH, TOKENS, WIDTH = 4, 32, 16  # on 8 devices each has one sequence


def steps(num_devices, accumulation_steps=1, **fields):
    config = small_config(batch_size=16, balance=BALANCE, **fields)
    return two_steps(config, accumulation_steps, num_devices)


def check_steps():
    """On 8 devices each has one expert, rows travel, and what `auto` picks runs inside shard_map."""
    spread = dict(num_experts=8, parallel=True)
    whole = steps(1, moe=dict(num_experts=8))
    assert_same_steps(whole, steps(8, accumulation_steps=2, implementation="auto", moe=spread))


def numbers_for_experts(config, weights, x_TD, routing, key):
    """An expert of number e multiplies its tokens by e + 1."""
    del weights, key
    factor_N = routing.weight_N * (routing.expert_N + 1).astype(jnp.float32)
    factor_T = jnp.zeros(x_TD.shape[0]).at[routing.token_N].add(factor_N)
    return x_TD * factor_T[:, None], routing


def mechanisms_by_router():
    """Of every kind that does not depend on the cut, one mechanism in each scope or with each estimator."""
    found = {}
    for case in mechanisms():
        kind, fields, router = case.values
        mechanism = balance.make(kind, **fields)
        sort = "-".join([kind, *(str(v) for v in fields.values() if isinstance(v, str | bool))])
        if mechanism.invariant:
            found.setdefault(router["kind"], {})[sort] = mechanism
    return {kind: tuple(made.items()) for kind, made in found.items()}


def cases():
    """(kind, mechanisms, capacity factor) of blocks that see the whole batch, and of blocks that see their group."""
    given, biased = mechanisms_by_router(), balance.make("loss_free_bias", rate=0.1)
    alone = [k for k in routers.KINDS if not make_router(k).competes]
    groups = [(k, (), float(make_router(k).by_score)) for k in routers.KINDS if k not in alone]
    return [(k, given.get(k, (("bias", biased),)), 0.0) for k in alone], [
        *groups,
        ("top_k", (), 0.5),
    ]


def variables_of(block, x_BLD, inputs):
    """Random parameters; states as they start, with a bias that is not 0."""
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), x_BLD, inputs))
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: draw.normal(size=a.shape).astype(np.float32) * 0.5, shapes["params"]
    )
    states = {}
    for name, mechanism in block.config.mechanisms:
        state = mechanism.init(block.config.router)
        bias_C = {
            n: draw.normal(size=a.shape).astype(np.float32) * 0.1
            for n, a in state.items()
            if n == "bias_C"
        }
        states |= {name: state | bias_C} if state else {}
    return params, states


def run_block(block, params, states, x_BLD, inputs):
    """Output, gradients, counts, losses and new states of one block."""
    inputs = inputs._replace(train=True)

    def total(params, x_BLD):
        variables = {"params": params, "router_state": states}
        y_BLD, report, _ = block.apply(variables, x_BLD, inputs)
        ramp = jnp.cos(jnp.arange(WIDTH, dtype=jnp.float32))[None, None]
        return jnp.sum(y_BLD * ramp) + sum(report.loss.values()), (y_BLD, report)

    gradient = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    (_, (y_BLD, report)), (grad, grad_BLD) = gradient(params, x_BLD)
    new = {
        name: mechanism.update(
            states[name], report.observation[name] | report.rows[name], block.config.router
        )
        for name, mechanism in block.config.mechanisms
        if name in states
    }
    per_token = dict(y=y_BLD, grad=grad_BLD)
    summed = dict(grad=grad, load=report.load_E, dropped=report.dropped)
    return per_token, summed, dict(loss=report.loss, new=new, norm=report.logit_norm)


def problem(case):
    """A block's config, its variables and its tokens, with padding."""
    kind, made, factor = case
    router = make_router(kind)
    config = moe.MoeConfig(router=router, mechanisms=made, expert_width=2, capacity_factor=factor)
    mask = np.random.default_rng(1).random(TOKENS) < np.linspace(0.4, 1, TOKENS)
    columns = router.num_columns if router.uses_previous_logits else None
    inputs = make_inputs(TOKENS, length=LENGTH, mask=mask, num_columns=columns)._replace(train=None)
    x_BLD = make_tokens(TOKENS, WIDTH).reshape(-1, LENGTH, WIDTH)
    block = moe.MoeBlock(config, parallel.make_mesh(1))
    return config, variables_of(block, x_BLD, inputs._replace(train=True)), (x_BLD, inputs)


def in_eight(x_BLD, inputs):
    """The whole batch as 8 groups; the key is no token's."""
    groups = jax.tree.map(lambda a: a.reshape(8, -1, *a.shape[1:]), inputs._replace(key=None))
    key = jnp.broadcast_to(inputs.key[None], (8, 2))
    return x_BLD.reshape(8, -1, LENGTH, WIDTH), groups._replace(key=key)


def on_devices(count, whole, groups):
    """Results of all blocks on so many devices; on one, those that see their group see 8 of them in turn."""
    mesh = parallel.make_mesh(count)

    def all_blocks(whole, groups):
        found = [], []
        for config, (params, states), tokens in whole:
            block = moe.MoeBlock(config, mesh)
            found[0].append(run_block(block, params, states, *tokens))
        for config, (params, states), tokens in groups:
            block = moe.MoeBlock(config, mesh)
            one = lambda part, b=block, p=params, s=states: run_block(b, p, s, *part)  # noqa: E731
            if count == 1:
                found[1].append(jax.lax.map(one, in_eight(*tokens)))
            else:
                found[1].append(one(tokens))
        return found

    configs = [c for c, *_ in whole], [c for c, *_ in groups]
    tokens, place = parallel.batch_sharding(mesh), parallel.replicated(mesh)

    def put(config, variables, given):
        x_BLD, inputs = given
        inputs = jax.device_put(inputs._replace(key=None), tokens)._replace(
            key=jax.device_put(inputs.key, place)
        )
        return jax.device_put(variables, place), (jax.device_put(x_BLD, tokens), inputs)

    def rejoined(*arrays):
        return all_blocks(
            *(
                [(c, *a) for c, a in zip(cs, given, strict=True)]
                for cs, given in zip(configs, arrays, strict=True)
            )
        )

    arrays = [put(*p) for p in whole], [put(*p) for p in groups]
    compiled = jax.jit(rejoined).lower(*arrays).compile(compiler_options=UNOPTIMISED)
    return jax.device_get(compiled(*arrays))


def near(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), one, other)


def check_blocks():
    """On 2 devices only the block with most mechanisms: all of them would take a third longer."""
    moe._experts = numbers_for_experts  # how experts compute on devices is in the steps
    whole, groups = ([problem(case) for case in some] for some in cases())
    most = max(range(len(whole)), key=lambda i: len(whole[i][0].mechanisms))
    alone, in_turn = on_devices(1, whole, groups)
    near(alone[most], on_devices(2, [whole[most]], [])[0][0])
    found, in_groups = on_devices(8, whole, groups)
    near(alone, found)
    for (per_token, summed, _), other in zip(in_turn, in_groups, strict=True):
        near(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), per_token), other[0])
        near(jax.tree.map(lambda a: a.sum(0), summed), other[1])


check_steps()
check_blocks()
print("equal on 1, 2 and 8 devices")
