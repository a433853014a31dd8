"""A run from its first step to its card: train, survive, evaluate, report.

Exit codes: 0 finished; 3 stopped after too many non-finite steps in a row; 75 pre-empted (SIGTERM or Ctrl-C), state
saved, resumable by the same command.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moelab import (
    checkpoint,
    data,
    evaluate,
    metrics,
    optimizer,
    parallel,
    preemption,
    record,
    restack,
    run_directory,
    upcycle,
)
from moelab import config as configs
from moelab import model as model_lib
from moelab import step as step_lib
from moelab import teacher as teachers
from moelab.errors import ConfigError
from moelab.progress import TrainProgress, data_progress, note

EXIT_FINISHED, EXIT_NONFINITE, EXIT_PREEMPTED = 0, 3, 75

# For the reliability tests: steps (1-based, comma-separated) whose loss is made NaN.
INJECT_NAN = "MOELAB_INJECT_NAN"


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run left behind.

    Attributes:
      directory: the run directory.
      exit_code: 0, 3 or 75.
      card: the result card of a finished run, else None.
    """

    directory: Path
    exit_code: int
    card: dict | None = None


def run(
    config,
    workdir: str | Path,
    *,
    resume: str = "auto",
    progress: bool = False,
    config_file: str = "",
    overrides: tuple[str, ...] | list[str] = (),
    command: str = "",
) -> Result:
    """Trains a validated config in `workdir`, evaluates it, writes card and report; continues what is there.

    Args:
      config: a full config (config.load).
      workdir: the run directory; never shared with another config, nor with another process at the same time.
      resume: auto, never or must (see launch.run).
      progress: draw a progress bar if standard error is a terminal.
      config_file, overrides, command: recorded, not interpreted.

    Raises:
      ConfigError: the directory holds another config's run, or another process works in it.
    """
    workdir = Path(workdir)
    configs.check_directory(config, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with run_directory.exclusive(workdir):
        run_directory.write_config(workdir, configs.record(config, config_file, overrides))
        finished = record.finished_card(workdir, config)
        if finished is not None:
            note(f"{workdir} is finished already; nothing to do (another --workdir starts anew)")
            return Result(workdir, EXIT_FINISHED, finished)
        dataset = data.build(config.data, config.tokenizer, progress=data_progress(progress))
        session = _Session(config, workdir, dataset, resume)
        with session:
            exit_code = session.train(progress)
            card = None
            if exit_code == EXIT_FINISHED:
                card = session.conclude(config_file, list(overrides), command)
        return Result(workdir, exit_code, card)


class _Session:
    """The open files, compiled step and state of one attempt at a run."""

    def __init__(self, config, workdir: Path, dataset, resume: str):
        self.config, self.workdir, self.dataset = config, workdir, dataset
        self.mesh = parallel.make_mesh()
        # The recipe's model, and the same in high precision for the steps before and after the recipe.
        self.plain_model = model_lib.from_dataset(config, dataset, self.mesh)
        self.recipe = model_lib.training_recipe(config)
        self.model = model_lib.from_dataset(config, dataset, self.mesh, recipe=self.recipe)
        self.teacher = teachers.load(config, dataset, self.mesh)
        abstract = jax.eval_shape(lambda: model_lib.init(self.model, jax.random.key(0)))
        self.optimizer = optimizer.make(config, abstract["params"])
        if self.model.leak:
            note(
                f"warning: not a causal language model: {self.model.leak}; its loss is not comparable"
            )
        self.schedule = optimizer.schedule(config, config.optimizer.learning_rate)
        self.checkpoints = checkpoint.Checkpoints(
            workdir / "checkpoints", keep=config.checkpoint.keep, on_event=self._event_later
        )
        self.events: list[tuple[str, int, dict]] = []
        if self.teacher is not None:
            self._event_later("teacher", 0, self.teacher.detail)
        # The longest compilation goes on beside the restore, the start of the loader and the smaller programs.
        self.compiler = futures.ThreadPoolExecutor(1)
        self.programs: dict[bool, futures.Future] = {}
        self._program((self.checkpoints.steps() or [0])[-1] + 1)
        self.state = self._restore(resume)
        self.first_step = int(self.state.step)
        self._open_journal()
        self.batches = data.train_batches(
            dataset,
            batch_size=config.train.batch_size,
            length=config.train.length,
            seed=config.seed,
            mixture=config.mixture,
            num_steps=config.train.num_steps,
        )
        self.saved_step = self.first_step if self.first_step else -1
        self.skipped_in_row = int(self.state.skipped_in_row)
        self.validators: dict[bool, evaluate.Validator] = {}
        self.reset_weights = 0  # since the last train record
        self.flip_rate = float("nan")  # the last one measured

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.compiler.shutdown(cancel_futures=True)
        self.checkpoints.close()
        self.journal.close()

    def _event_later(self, event: str, step: int, detail: dict) -> None:
        self.events.append((event, step, detail))

    def _quantized(self, step: int) -> bool:
        """Whether the recipe holds in a step (1-based)."""
        q = self.config.quantization
        return q.start_step < step and (not q.end_step or step <= q.end_step)

    def _program(self, step: int) -> futures.Future:
        """The compiled program of a step, compiled beside whatever else goes on."""
        quantized = self._quantized(step)
        if quantized not in self.programs:
            self.programs[quantized] = self.compiler.submit(self._compile, quantized)
        return self.programs[quantized]

    def _compile(self, quantized: bool) -> jax.stages.Compiled:
        model = self.model if quantized else self.plain_model
        teacher_model, teacher = self.teacher[:2] if self.teacher else (None, None)
        train_step = step_lib.make_train_step(
            self.config, model, self.optimizer, teacher_model, quantized=quantized
        )
        shape = (self.config.train.batch_size, self.config.train.length)
        sharding = parallel.batch_sharding(self.mesh)
        array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
        batch = data.Batch(
            token_BL=array(shape, np.int32),
            target_BL=array(shape, np.int32),
            mask_BL=array(shape, np.bool_),
            domain_B=array(shape[:1], np.int32),
            document_BL=array(shape, np.int32),
        )
        poison = jax.ShapeDtypeStruct((), np.float32)
        state = step_lib.abstract_state(self.config, self.model, self.optimizer)
        placed = jax.tree.map(lambda a: a.sharding, state)
        jitted = jax.jit(train_step, donate_argnums=0, out_shardings=(placed, None))
        return jitted.lower(
            state,
            batch,
            poison,
            jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), teacher
            ),
        ).compile()

    def _restore(self, resume: str) -> step_lib.TrainState:
        abstract = step_lib.abstract_state(self.config, self.model, self.optimizer)
        restored = self.checkpoints.restore_latest(abstract)
        if restored is not None:
            return restored[1]
        if resume == "must":
            raise ConfigError(f"{self.workdir} has no good checkpoint, and --resume=must")
        watch = step_lib.oscillation_reset(self.config)
        init = jax.jit(
            lambda: step_lib.init_state(self.model, self.optimizer, self.config.seed, watch),
            out_shardings=jax.tree.map(lambda a: a.sharding, abstract),
        )
        if self.config.train.start_from:
            return self._continued(init())
        return self._upcycled(init()) if self.config.upcycle.run else init()

    def _continued(self, state: step_lib.TrainState) -> step_lib.TrainState:
        """The first state, with the parameters and router state of another run of the same model."""
        run = self.config.train.start_from
        loaded = teachers.load_other(run, self.dataset)
        model = model_lib.from_dataset(loaded.config, loaded.dataset)
        trees, ours = (loaded.state.params, loaded.state.router_state), state[1:4:2]
        try:  # layers in high precision make another grouping of the same blocks
            theirs = tuple(restack.regrouped(model, self.model, tree) for tree in trees)
        except ValueError:
            theirs = trees
        if _shapes(theirs) != _shapes(ours):
            raise ConfigError(
                f"train.start_from={run!r} has a model of other shapes than this config"
            )
        params, router_state = self._on_mesh(theirs)
        return self._started_from("started_from", run, loaded, state, params, router_state)

    def _started_from(self, event, run, loaded, state, params, router_state):
        detail = {"run": run, "step": loaded.step, "digest": checkpoint.state_digest(loaded.state)}
        self._event_later(event, 0, detail)
        opt_state = self.optimizer.init(params)
        return state._replace(params=params, opt_state=opt_state, router_state=router_state)

    def _on_mesh(self, tree):
        to = parallel.placement(self.mesh, tree, self.config.moe.parallel)
        return jax.device_put(tree, to)

    def _upcycled(self, state: step_lib.TrainState) -> step_lib.TrainState:
        """The first state, with the parameters of a dense run."""
        loaded = teachers.load_other(self.config.upcycle.run, self.dataset)
        dense_model = model_lib.from_dataset(loaded.config, loaded.dataset)
        dense = jax.device_get(loaded.state.params)
        new = upcycle.params(self.config, self.model, state.params, dense_model, dense)
        new = self._on_mesh(new)
        run, kept = self.config.upcycle.run, state.router_state
        return self._started_from("upcycled", run, loaded, state, new, kept)

    def _open_journal(self) -> None:
        path = self.workdir / "metrics.jsonl"
        earlier = metrics.read(path) if path.exists() else []
        starts = [r for r in earlier if r.get("event") in ("started", "resumed")]
        self.attempts = len(starts) + 1
        if path.exists():
            metrics.truncate_after(path, self.first_step)
        kept = [r for r in earlier if r["step"] <= self.first_step and r["kind"] == "train"]
        self.seconds_before = kept[-1]["seconds"] if kept else 0.0
        board = self.workdir / "tensorboard" if self.config.logging.tensorboard else None
        self.journal = metrics.MetricsWriter(path, board)
        for event, step, detail in self.events:
            # At the step from which the run goes on, so that no later truncation loses it.
            self.event(event, min(step, self.first_step), detail | {"checkpoint": step})
        if self.first_step:
            note(f"resumed {self.workdir} from step {self.first_step}")
        detail = {"attempt": self.attempts}
        self.event("resumed" if self.first_step else "started", self.first_step, detail)

    def event(self, event: str, step: int, detail: dict) -> None:
        self.journal.write({"kind": "event", "step": step, "event": event, "detail": detail})

    def train(self, progress: bool) -> int:
        """Runs the remaining steps; returns the exit code."""
        config, num_steps = self.config, self.config.train.num_steps
        teacher = self.teacher.variables if self.teacher else None
        poisoned = _poisoned_steps()
        if self.first_step < num_steps:
            self._program(self.first_step + 1).result()  # outside of the measured time
        self.started = self.window_start = time.perf_counter()
        self.window_tokens = 0
        with TrainProgress(num_steps, progress) as bar, preemption.stop_signals() as stop:
            for step in range(self.first_step + 1, num_steps + 1):
                batch = self._place(self.batches[step - 1])
                poison = np.float32("nan" if step in poisoned else 1.0)
                program = self._program(step).result()
                self.state, report = program(self.state, batch, poison, teacher)
                self._after_step(step, report, batch, bar)
                if self.skipped_in_row >= config.train.max_nonfinite_steps:
                    return self._stop_nonfinite(step)
                if stop.is_set():
                    return self._stop_preempted(step)
        self._save(num_steps)
        return EXIT_FINISHED

    def _after_step(self, step: int, report, batch, bar: TrainProgress) -> None:
        config = self.config
        self.window_tokens += int(np.sum(batch.mask_BL))
        self.skipped_in_row = int(report.skipped_in_row)  # waits for the step
        self.reset_weights += int(report.reset)
        if np.isfinite(report.flip_rate):
            self.flip_rate = float(report.flip_rate)
        if not report.finite:
            note(f"step {step}: non-finite loss or gradient, skipped")
        if step % config.logging.every == 0 or step in (1, config.train.num_steps):
            entry = self._train_record(step, report)
            self.journal.write(entry)
            bar.update(entry)
        if step % config.checkpoint.every == 0:
            self._save(step)
        if config.evaluation.every and step % config.evaluation.every == 0:
            self._validate(step)

    def _train_record(self, step: int, report) -> dict[str, Any]:
        now = time.perf_counter()
        tokens, self.window_tokens = self.window_tokens, 0
        elapsed, self.window_start = now - self.window_start, now
        config = self.config
        return {
            "kind": "train",
            "step": step,
            "loss": float(report.loss),
            "balance": {name: float(value) for name, value in report.balance.items()},
            "coefficient": {name: float(value) for name, value in report.coefficient.items()},
            "total_loss": float(report.total_loss),
            **self._quantization_record(report),
            "learning_rate": float(self.schedule(step - 1 - int(report.skipped))),
            "gradient_norm": float(report.gradient_norm),
            "tokens": step * config.train.batch_size * config.train.length,
            "tokens_per_second": tokens / max(elapsed, 1e-9),
            "seconds": self.seconds_before + now - self.started,
            "skipped": not bool(report.finite),
            "nonfinite_steps": int(report.skipped),
            "router": metrics.router_record(
                model_lib.moe_layers(config),
                np.asarray(report.load_ME),
                np.asarray(report.dropped_M),
                np.asarray(report.logit_norm_M),
                np.asarray(report.idle_M),
                np.asarray(report.log_sum_exp_M),
            ),
        }

    def _quantization_record(self, report) -> dict[str, float]:
        """What a train record says of distillation, and of oscillation since the last record."""
        q, found = self.config.quantization, {}
        if q.teacher:
            found["divergence"] = float(report.divergence)
        if np.isfinite(self.flip_rate):
            found["flip_rate"] = self.flip_rate
        if q.reset_every:
            found["reset_weights"] = self.reset_weights
        self.flip_rate, self.reset_weights = float("nan"), 0
        return found

    def _validate(self, step: int) -> None:
        started = time.perf_counter()
        # As the next step would compute it.
        quantized = self._quantized(step + 1) and self.recipe.quantizes
        if quantized not in self.validators:
            model = self.model if quantized else self.plain_model
            self.validators[quantized] = evaluate.Validator(self.config, model, self.dataset)
        precision = self.recipe.name if quantized else self.config.model.dtype
        self.journal.write(self.validators[quantized].record(self.state, step, precision))
        # Looking is not training: its time is left out of tokens/s and of `seconds`.
        spent = time.perf_counter() - started
        self.window_start += spent
        self.started += spent

    def _place(self, batch):
        sharding = parallel.batch_sharding(self.mesh)
        return jax.tree.map(lambda a: jax.device_put(a, sharding), batch)

    def _save(self, step: int) -> None:
        if step != self.saved_step:
            self.checkpoints.save(step, self.state)
            self.saved_step = step

    def _stop_nonfinite(self, step: int) -> int:
        limit = self.config.train.max_nonfinite_steps
        self.event("stopped", step, {"reason": f"{limit} non-finite steps in a row"})
        note(
            f"stopped at step {step}: {limit} non-finite steps in a row; the last finite state is in "
            f"checkpoint {self.checkpoints.steps()[-1] if self.checkpoints.steps() else '(none yet)'}"
        )
        return EXIT_NONFINITE

    def _stop_preempted(self, step: int) -> int:
        self._save(step)
        self.checkpoints.wait()
        self.event("preempted", step, {})
        note(f"stopped by a signal; saved step {step}; the same command resumes it")
        return EXIT_PREEMPTED

    def digest(self) -> str:
        """The digest of the state, as the checkpoint's manifest has it."""
        return checkpoint.state_digest(self.state)

    def conclude(self, config_file: str, overrides: list[str], command: str) -> dict:
        """Evaluates the last state, writes card and report, and returns the card."""
        self.checkpoints.wait()
        return record.conclude(self, config_file, overrides, command)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda a: (a.shape, a.dtype), tree)


def _poisoned_steps() -> set[int]:
    text = os.environ.get(INJECT_NAN, "")
    return {int(step) for step in text.split(",") if step}
