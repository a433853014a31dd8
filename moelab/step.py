"""One optimizer step as a pure function of the state and a batch.

B sequences, L tokens, A micro-batches, T tokens, E experts, M MoE layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moelab import balance, loss, moe
from moelab import model as model_lib


class TrainState(NamedTuple):
    """Everything that a resumed run needs; all leaves are arrays.

    Attributes:
      step: () int32, batches consumed: the position in the data.
      params: float32 parameters.
      opt_state: optax state; its counter is the number of updates made, which skipped steps do not raise.
      router_state: states of the balancing mechanisms, float32.
      key: PRNG key of the run; a step's noise is keyed by (key, step, token).
      skipped: () int32, steps skipped for a non-finite loss or gradient.
      skipped_in_row: () int32, of these the latest ones in a row.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    router_state: Any
    key: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array


class StepReport(NamedTuple):
    """What a step tells: float32 scalars, and per MoE layer in block order.

    Attributes:
      loss: language-model loss, nats per token, without balancing losses.
      balance: unweighted balancing losses by mechanism, averaged over layers.
      total_loss: what the gradient is of.
      gradient_norm: global norm before clipping.
      finite: bool; False means that the step was skipped.
      skipped, skipped_in_row: counters of the state after the step.
      load_ME, dropped_M, logit_norm_M: see moe.LayerReport.
    """

    loss: jax.Array
    balance: dict[str, jax.Array]
    total_loss: jax.Array
    gradient_norm: jax.Array
    finite: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array
    load_ME: jax.Array
    dropped_M: jax.Array
    logit_norm_M: jax.Array


def init_state(
    model: model_lib.Transformer, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """Draws the state before the first step; the same for a seed on any number of devices."""
    init_key, run_key = jax.random.split(jax.random.key(seed))
    variables = model_lib.init(model, init_key)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=variables["params"],
        opt_state=optimizer.init(variables["params"]),
        router_state=variables["router_state"],
        key=jax.random.key_data(run_key),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
    )


def in_block_order(reports: tuple[dict[str, Any], ...]) -> list[Any]:
    """Unstacks the reports of all segments into one per MoE layer, in the order of the blocks."""
    layers = []
    for segment in reports:
        stacked = [segment[name] for name in sorted(segment, key=lambda n: int(n.split("_")[1]))]
        if stacked:
            for i in range(jax.tree.leaves(stacked[0])[0].shape[0]):
                layers += [jax.tree.map(lambda a, i=i: a[i], report) for report in stacked]
    return layers


def make_train_step(config, model: model_lib.Transformer, optimizer: optax.GradientTransformation):
    """Returns step(state, batch, poison) -> (state, StepReport), to be jitted with the state donated.

    `batch` has token_BL, target_BL, mask_BL and domain_B. `poison` is 1.0; the reliability tests pass NaN to make the
    loss of a step non-finite.
    """
    coefficients = {
        kind: mechanism.strength
        for kind in balance.KINDS
        if (mechanism := balance.make(kind, **config.balance[kind])).has_loss
    }

    def objective(params, router_state, batch, step, total, poison):
        inputs = model_lib.Inputs(batch.token_BL, batch.mask_BL, batch.domain_B, step)
        out = model.apply({"params": params, "router_state": router_state}, inputs, train=True)
        mask_T = batch.mask_BL.reshape(-1)
        weight_T = jnp.where(mask_T, 1.0 / total, 0.0)
        lm_loss, _ = loss.sharded_cross_entropy(
            out.hidden_BLD.reshape(mask_T.size, -1),
            model_lib.head(params),
            batch.target_BL.reshape(-1),
            weight_T,
            chunk=config.train.head_chunk,
            mesh=model.mesh,
        )
        lm_loss = lm_loss * poison
        # The share of the step's tokens that this micro-batch has, so that its mean losses add up to the step's.
        share = jnp.sum(mask_T).astype(jnp.float32) / total
        layers = in_block_order(out.reports)
        losses = {
            name: sum(layer.loss[name] for layer in layers) * (share / len(layers))
            for name in (layers[0].loss if layers else {})
        }
        objective = lm_loss + sum(coefficients[name] * value for name, value in losses.items())
        reports = jax.tree.map(jax.lax.stop_gradient, out.reports)
        return objective, (lm_loss, losses, _scaled_norms(reports, share))

    gradient = jax.value_and_grad(objective, has_aux=True)

    def summed_gradient(state, batch, poison):
        total = jnp.maximum(jnp.sum(batch.mask_BL), 1).astype(jnp.float32)
        arguments = (state.step, total, poison)
        count = config.train.accumulation_steps
        if count == 1:
            return gradient(state.params, state.router_state, batch, *arguments)

        def body(carry, micro):
            part = gradient(state.params, state.router_state, micro, *arguments)
            return jax.tree.map(jnp.add, carry, part), None

        micro = jax.tree.map(lambda a: split_batch(a, count, model.mesh.size), batch)
        first = jax.tree.map(lambda a: a[0], micro)
        shapes = jax.eval_shape(gradient, state.params, state.router_state, first, *arguments)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(body, zeros, micro)[0]

    def step(state: TrainState, batch, poison) -> tuple[TrainState, StepReport]:
        (total_loss, (lm_loss, losses, reports)), grads = summed_gradient(state, batch, poison)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(total_loss) & jnp.isfinite(norm)
        if config.train.clip_norm:
            scale = jnp.minimum(1.0, config.train.clip_norm / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * scale, grads)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        router_state = update_router_state(model, state.router_state, reports)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)  # noqa: E731
        skipped = jnp.logical_not(finite).astype(jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            opt_state=keep(opt_state, state.opt_state),
            router_state=keep(router_state, state.router_state),
            key=state.key,
            skipped=state.skipped + skipped,
            skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
        )
        return new_state, _step_report(
            lm_loss, losses, total_loss, norm, finite, new_state, in_block_order(reports)
        )

    return step


def split_batch(array: jax.Array, count: int, num_devices: int) -> jax.Array:
    """Splits the batch axis into (count, batch / count), each micro-batch spread over all devices."""
    per_device = array.reshape(num_devices, count, -1, *array.shape[1:])
    return jnp.swapaxes(per_device, 0, 1).reshape(count, -1, *array.shape[1:])


def update_router_state(model: model_lib.Transformer, state: Any, reports: Any) -> Any:
    """Applies each mechanism's update to its state in every layer, with the step's summed statistics."""
    new = {}
    for i, (segment, report) in enumerate(zip(model.segments, reports, strict=True)):
        blocks = {}
        for j, block in enumerate(segment.blocks):
            if block.moe is not None and f"segment_{i}" in state:
                old = state[f"segment_{i}"][f"block_{j}"]["moe"]
                observed = report[f"block_{j}"].observation
                blocks[f"block_{j}"] = {"moe": _updated(block.moe, old, observed)}
        if blocks:
            new[f"segment_{i}"] = blocks
    return new


def _updated(config: moe.MoeConfig, state: dict, observation: dict) -> dict:
    """Updates the mechanisms that have a state; the leading axis is the segment's layers."""
    return {
        name: jax.vmap(mechanism.update)(state[name], observation[name])
        for name, mechanism in config.mechanisms
        if name in state
    }


def _scaled_norms(reports: Any, share: jax.Array) -> Any:
    """Weights the mean logit norms of a micro-batch by its share of tokens, so that they can be summed."""
    return tuple(
        {k: r._replace(logit_norm=r.logit_norm * share) for k, r in segment.items()}
        for segment in reports
    )


def _step_report(lm_loss, losses, total_loss, norm, finite, state, layers) -> StepReport:
    def stack(name):
        arrays = [getattr(layer, name) for layer in layers]
        return jnp.stack(arrays) if arrays else jnp.zeros((0,), jnp.float32)

    return StepReport(
        loss=lm_loss,
        balance=losses,
        total_loss=total_loss,
        gradient_norm=norm,
        finite=finite,
        skipped=state.skipped,
        skipped_in_row=state.skipped_in_row,
        load_ME=stack("load_E"),
        dropped_M=stack("dropped"),
        logit_norm_M=stack("logit_norm"),
    )
