"""One optimizer step as a pure function of the state and a batch.

B sequences, L tokens, A micro-batches, T tokens, E experts, M MoE layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moelab import loss, micro_batches, parallel
from moelab import model as model_lib
from moelab import router_state as router_state_lib
from moelab.quant import oscillation, packing


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
      oscillation: distances that the reset of oscillating weights keeps; {} without it.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    router_state: Any
    key: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array
    oscillation: Any


class StepReport(NamedTuple):
    """What a step tells: float32 scalars, and per MoE layer in block order.

    Attributes:
      loss: language-model loss, nats per token, without balancing losses.
      balance: unweighted balancing losses by mechanism, averaged over layers.
      coefficient: their coefficients in force, averaged over layers.
      total_loss: what the gradient is of.
      divergence: of the teacher from the student, nats per token; 0 without a teacher.
      flip_rate: share of the experts' weights whose code changed in this step; NaN where it was not measured.
      reset: int32, oscillating weights that were set to their rounded value.
      gradient_norm: global norm before clipping.
      finite: bool; False means that the step was skipped.
      skipped, skipped_in_row: counters of the state after the step.
      load_ME, idle_M, dropped_M, logit_norm_M, log_sum_exp_M: see moe.LayerReport.
    """

    loss: jax.Array
    balance: dict[str, jax.Array]
    coefficient: dict[str, jax.Array]
    total_loss: jax.Array
    divergence: jax.Array
    flip_rate: jax.Array
    reset: jax.Array
    gradient_norm: jax.Array
    finite: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array
    load_ME: jax.Array
    idle_M: jax.Array
    dropped_M: jax.Array
    logit_norm_M: jax.Array
    log_sum_exp_M: jax.Array


def init_state(
    model: model_lib.Transformer,
    optimizer: optax.GradientTransformation,
    seed: int,
    watch: oscillation.Reset | None = None,
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
        oscillation=watch.init(rounded_weights(model, variables["params"])) if watch else {},
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


def oscillation_reset(config) -> oscillation.Reset | None:
    """The reset of oscillating weights that a config asks for."""
    q = config.quantization
    if not q.reset_every:
        return None
    recipe = model_lib.training_recipe(config)
    return oscillation.Reset(
        every=q.reset_every,
        start=q.reset_start,
        window=q.reset_window,
        ratio=q.reset_ratio,
        format=recipe.expert_weight,
        rule=recipe.weight_rule,
    )


def make_train_step(
    config,
    model: model_lib.Transformer,
    optimizer: optax.GradientTransformation,
    teacher_model: model_lib.Transformer | None = None,
    *,
    quantized: bool = True,
):
    """Returns step(state, batch, poison, teacher) -> (state, StepReport), to be jitted with the state donated.

    `batch` has token_BL, target_BL, mask_BL and domain_B. `poison` is 1.0; the reliability tests pass NaN to make the
    loss of a step non-finite. `teacher` holds the variables of the teacher model; leave it out where there is none.
    `quantized` says whether config.quantization's recipe holds in this step: where not, oscillation is neither measured
    nor reset.
    """
    count, share_of_teacher = config.train.accumulation_steps, config.quantization.teacher_share
    watch = oscillation_reset(config) if quantized else None

    def forward(params, router_state, micro: micro_batches.MicroBatch):
        batch = micro.batch
        inputs = model_lib.Inputs(
            batch.token_BL, batch.mask_BL, batch.domain_B, micro.key, micro.row_B
        )
        return model.apply({"params": params, "router_state": router_state}, inputs, train=True)

    def language_loss(params, out, batch, weight_T, *, differentiate: bool):
        hidden_TD = out.hidden_BLD.reshape(weight_T.size, -1)
        head_VD = model_lib.head(model, params)
        if not differentiate:
            hidden_TD, head_VD = jax.lax.stop_gradient((hidden_TD, head_VD))
        value, _ = loss.sharded_cross_entropy(
            hidden_TD,
            head_VD,
            batch.target_BL.reshape(-1),
            weight_T,
            chunk=config.train.head_chunk,
            mesh=model.mesh,
        )
        return value

    def divergence(params, out, micro: micro_batches.MicroBatch, weight_T, teacher):
        batch = micro.batch
        inputs = model_lib.Inputs(batch.token_BL, batch.mask_BL, batch.domain_B)
        wanted = jax.lax.stop_gradient(teacher_model.apply(teacher, inputs, train=False))
        value, _ = loss.sharded_kl(
            out.hidden_BLD.reshape(weight_T.size, -1),
            model_lib.head(model, params),
            wanted.hidden_BLD.reshape(weight_T.size, -1),
            model_lib.head(teacher_model, teacher["params"]),
            weight_T,
            chunk=config.train.head_chunk,
            mesh=model.mesh,
            temperature=config.quantization.temperature,
        )
        return value

    def objective(params, router_state, micro: micro_batches.MicroBatch, total, poison, teacher):
        out, batch = forward(params, router_state, micro), micro.batch
        mask_T = batch.mask_BL.reshape(-1)
        weight_T = jnp.where(mask_T, 1.0 / total, 0.0)
        distills = teacher is not None and share_of_teacher > 0
        learns = not distills or share_of_teacher < 1
        lm_loss = language_loss(params, out, batch, weight_T, differentiate=learns) * poison
        wanted, divergent = lm_loss, jnp.zeros((), jnp.float32)
        if distills:
            divergent = divergence(params, out, micro, weight_T, teacher) * poison
            wanted = (1 - share_of_teacher) * lm_loss + share_of_teacher * divergent
        # The share of the step's tokens that this micro-batch has, so that its mean losses add up to the step's.
        share = jnp.sum(mask_T).astype(jnp.float32) / total
        layers = in_block_order(out.reports)
        part = share / max(len(layers), 1)
        penalty = sum(
            (
                layer.weight[name] * value * part
                for layer in layers
                for name, value in layer.loss.items()
            ),
            jnp.zeros((), jnp.float32),
        )
        reports, rows = micro_batches.split_rows(jax.tree.map(jax.lax.stop_gradient, out.reports))
        return wanted + penalty, (
            lm_loss,
            divergent,
            micro_batches.shared_out(reports, share),
            rows,
        )

    gradient = jax.value_and_grad(objective, has_aux=True)

    def summed_gradient(
        state, router_state, micros: micro_batches.MicroBatch, total, poison, teacher
    ):
        def call(micro):
            (value, (lm_loss, divergent, reports, rows)), grads = gradient(
                state.params, router_state, micro, total, poison, teacher
            )
            return (value, lm_loss, divergent, reports, grads), rows

        summed, rows = micro_batches.over_all(call, micros, count)
        return *summed, rows

    def counted(state, micros: micro_batches.MicroBatch):
        """The state as mechanisms that count first want it: with this step's statistics."""
        names = [n for n, m in router_state_lib.mechanisms(model) if m.counts_first]
        if not names:
            return state.router_state

        def call(micro):
            out = forward(state.params, state.router_state, micro)
            reports, rows = micro_batches.split_rows(out.reports)
            return reports, rows

        reports, rows = micro_batches.over_all(call, micros, count)
        return router_state_lib.update(model, state.router_state, reports, rows, only=names)

    def step(
        state: TrainState, batch, poison, teacher: dict | None = None
    ) -> tuple[TrainState, StepReport]:
        total = jnp.maximum(jnp.sum(batch.mask_BL), 1).astype(jnp.float32)
        micros = micro_batches.cut(state, batch, count, model.mesh.size)
        router_state = counted(state, micros)
        total_loss, lm_loss, divergent, reports, grads, rows = summed_gradient(
            state, router_state, micros, total, poison, teacher
        )
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(total_loss) & jnp.isfinite(norm)
        if config.train.clip_norm:
            scale = jnp.minimum(1.0, config.train.clip_norm / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * scale, grads)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        flips = _flip_rate(config if quantized else None, model, state, params)
        params, watched, reset = _reset(watch, model, state, params)
        router_state = router_state_lib.update(model, router_state, reports, rows)
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
            oscillation=keep(watched, state.oscillation),
        )
        scalars = dict(
            loss=lm_loss,
            total_loss=total_loss,
            divergence=divergent,
            flip_rate=jnp.where(finite, flips, jnp.nan),
            reset=jnp.where(finite, reset, 0),
            gradient_norm=norm,
            finite=finite,
        )
        return new_state, _step_report(scalars, new_state, reports)

    return step


def rounded_weights(model: model_lib.Transformer, params: Any) -> dict[str, jax.Array]:
    """The experts' matrices that a recipe rounds, by path: not those of blocks in high precision."""
    kept = {"/".join(names) for names in model.kept_blocks}
    found = packing.expert_weights(params)
    return {path: w for path, w in found.items() if "/".join(path.split("/")[:2]) not in kept}


def _flip_rate(config, model, state: TrainState, params: Any) -> jax.Array:
    """Share of the rounded weights whose code this step changes, every so many steps; NaN in between."""
    nothing = jnp.full((), jnp.nan, jnp.float32)
    every = config.quantization.flip_every if config is not None else 0
    if not every:
        return nothing
    recipe = model_lib.training_recipe(config)
    trees = [rounded_weights(model, p) for p in (state.params, params)]
    return jax.lax.cond(
        (state.step + 1) % every == 0,
        lambda old, new: oscillation.flip_rate(old, new, recipe.expert_weight, recipe.weight_rule),
        lambda old, new: nothing,
        *trees,
    )


def _reset(watch: oscillation.Reset | None, model, state: TrainState, params: Any):
    """Sets oscillating weights to their rounded value: (params, distances, how many)."""
    if watch is None:
        return params, state.oscillation, jnp.zeros((), jnp.int32)
    old, new = rounded_weights(model, state.params), rounded_weights(model, params)
    watched, new, count = watch.update(state.oscillation, old, new, state.step + 1)
    return packing.with_expert_weights(params, new), watched, count


def _step_report(scalars: dict[str, jax.Array], state: TrainState, reports) -> StepReport:
    layers = in_block_order(reports)

    def stack(name):
        arrays = [getattr(layer, name) for layer in layers]
        return jnp.stack(arrays) if arrays else jnp.zeros((0,), jnp.float32)

    def mean(name):
        values = [getattr(layer, name) for layer in layers]
        return {n: sum(v[n] for v in values) / len(values) for n in (values[0] if values else ())}

    return StepReport(
        **scalars,
        balance=mean("loss"),
        coefficient=mean("weight"),
        skipped=state.skipped,
        skipped_in_row=state.skipped_in_row,
        load_ME=stack("load_E"),
        idle_M=stack("idle"),
        dropped_M=stack("dropped"),
        logit_norm_M=stack("logit_norm"),
        log_sum_exp_M=stack("log_sum_exp"),
    )


def abstract_state(
    config, model: model_lib.Transformer, optimizer: optax.GradientTransformation
) -> TrainState:
    """Shapes, dtypes and placement of a run's state."""
    watch = oscillation_reset(config)
    shapes = jax.eval_shape(lambda: init_state(model, optimizer, config.seed, watch))
    placed = parallel.placement(model.mesh, shapes, config.moe.parallel)
    return jax.tree.map(
        lambda a, to: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=to), shapes, placed
    )
