"""The training step and the training loop, the same for every stage.

A stage brings a loss function and rows; `train` owns the rest: the sharded state, resuming, logging, validation,
checkpoints and a clean exit on Ctrl-C. The step is one pure, donated, jitted function; what it measured is read one
step late, so that the device never waits for the host.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from minillm_jax.checkpoint import Checkpointer
from minillm_jax.config import ModelConfig, OptimConfig, RunConfig
from minillm_jax.data import Rows, eval_batches, make_iterator
from minillm_jax.errors import UserError
from minillm_jax.losses import Batch, LossFn
from minillm_jax.metrics import MetricsLogger, flops_per_token, peak_flops
from minillm_jax.model import Params
from minillm_jax.optim import global_norm, make_optimizer, make_schedule
from minillm_jax.sharding import (
    batch_sharding,
    check_mesh,
    check_rows,
    make_mesh,
    optimizer_shardings,
    tree_shardings,
)

TrainState = dict[str, Any]
"""`{"params", "opt_state", "step", "key"}`: everything that a step changes, and a checkpoint keeps."""
TrainStep = Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, jax.Array]]]
TransformBatch = Callable[[TrainState, dict[str, np.ndarray], int], dict[str, np.ndarray]]


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; the message says since when and what to try."""


def init_state(params: Params, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Make the state before the first step."""
    return {
        "params": params,
        "opt_state": optimizer.init(params),
        "step": jnp.zeros((), jnp.int32),
        "key": jax.random.key(seed),
    }


def accumulate_gradients(
    loss_fn: LossFn, params: Params, frozen: Any, batch: Batch, key: jax.Array, micro_batches: int
) -> tuple[Params, jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """Sum loss gradients over micro-batches.

    Sums and weights are added separately, so the result does not depend on how rows were split, whatever their masks.

    Args:
        loss_fn: see `losses.LossFn`.
        params: what is differentiated.
        frozen: what is not.
        batch: arrays `[A * B, T]`, A being `micro_batches`.
        key: randomness for dropout.
        micro_batches: how many parts to take the rows in.

    Returns:
        Gradient of the loss sum, the weight sum, and metrics as (sum, weight) pairs.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def part(rows: Batch, part_key: jax.Array) -> Any:
        (_, (weight, metrics)), grads = grad_fn(params, frozen, rows, part_key)
        return grads, weight, metrics

    if micro_batches == 1:
        return part(batch, key)
    parts = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)
    keys = jax.random.split(key, micro_batches)
    first = jax.eval_shape(part, jax.tree.map(lambda x: x[0], parts), key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)

    def body(total: Any, inputs: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, part(*inputs)), None

    total, _ = jax.lax.scan(body, zeros, (parts, keys))
    return total


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, schedule: optax.Schedule, micro_batches: int = 1
) -> TrainStep:
    """Make the pure step `(state, frozen, batch) -> (state, metrics)`.

    A step whose gradient is not finite changes nothing but the step count and the key; its metric `skipped` is 1.
    Metrics are
    scalars: the loss function's means, `grad_norm` before clipping, `learning_rate`, `trained_tokens` (the weight),
        `skipped`.
    """

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        params, opt_state = state["params"], state["opt_state"]
        key = jax.random.fold_in(state["key"], state["step"])
        grads, weight, sums = accumulate_gradients(loss_fn, params, frozen, batch, key, micro_batches)
        scale = 1.0 / jnp.maximum(weight, 1e-8)
        grads = jax.tree.map(lambda g: g * scale, grads)
        grad_norm = global_norm(grads)
        finite = jnp.isfinite(grad_norm)
        metrics = {name: total / jnp.maximum(count, 1e-8) for name, (total, count) in sums.items()}
        metrics |= {
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(schedule(state["step"]), jnp.float32),
            "trained_tokens": weight,
            "skipped": 1.0 - finite,
        }

        def update() -> tuple[Params, optax.OptState]:
            updates, new_opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), new_opt_state

        # A branch, not a selection: the update then works in place.
        new_params, new_opt_state = jax.lax.cond(finite, update, lambda: (params, opt_state))
        new_state = {"params": new_params, "opt_state": new_opt_state, "step": state["step"] + 1, "key": state["key"]}
        return new_state, metrics

    return step


def make_eval_step(loss_fn: LossFn) -> Callable[[Params, Any, Batch], dict[str, tuple[jax.Array, jax.Array]]]:
    """Make `(params, frozen, batch) -> metrics` as (sum, weight) pairs, without dropout."""

    def step(params: Params, frozen: Any, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
        return loss_fn(params, frozen, batch, None)[1][1]

    return step


def open_state(
    mesh: Mesh,
    checkpointer: Checkpointer,
    optimizer: optax.GradientTransformation,
    param_shapes: Params,
    param_axes: Any,
    init_params: Callable[[Any], Params],
    seed: int,
) -> tuple[TrainState, Any, dict[str, Any] | None]:
    """Restore a run's newest state onto the mesh, or make its first.

    Args:
        mesh: the device mesh.
        checkpointer: of the run.
        optimizer: of the run.
        param_shapes: tree of the parameters' abstract shapes.
        param_axes: tree of their logical axis names.
        init_params: makes (or loads) the first parameters, given their shardings.
        seed: of the run.

    Returns:
        The state, its shardings, and the data state saved with it: None for a new run.
    """
    param_shardings = tree_shardings(mesh, param_axes)
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = {
        "params": param_shardings,
        "opt_state": optimizer_shardings(mesh, optimizer, param_shapes, param_shardings),
        "step": replicated,
        "key": replicated,
    }
    shapes = jax.eval_shape(lambda p: init_state(p, optimizer, seed), param_shapes)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    if (restored := checkpointer.restore(abstract, report=print)) is not None:
        return restored.state, shardings, restored.data_state
    make = jax.jit(lambda p: init_state(p, optimizer, seed), out_shardings=shardings, donate_argnums=0)
    return make(init_params(param_shardings)), shardings, None


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """Place a host batch `[B, ...]` on the mesh, rows over the data-parallel axes."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


@dataclass
class StopRequest:
    """Set by the first Ctrl-C or SIGTERM; the second Ctrl-C interrupts at once."""

    signum: int | None = None
    previous: dict[int, Any] = field(default_factory=dict)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request that the loop sees between two steps."""
    request = StopRequest()

    def handle(signum: int, frame: Any) -> None:
        if request.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        request.signum = signum

    signums: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
    for signum in signums:
        request.previous[signum] = signal.signal(signum, handle)
    try:
        yield request
    finally:
        for signum, previous in request.previous.items():
            signal.signal(signum, previous)


@dataclass(frozen=True)
class Job:
    """One stage's training: what differs between stages.

    Attributes:
        run: the shared settings of the run.
        optim: optimizer settings.
        model: shape of the trained model.
        loss_fn: the loss, see `losses.LossFn`.
        init_params: makes (or loads) the parameters to start from, given their shardings.
        param_shapes: tree of their abstract shapes.
        param_axes: tree of logical axis names like the parameters.
        train_rows: random-access rows.
        valid_rows: held-out rows, or None.
        batch_size: rows per micro-batch.
        max_seq_len: tokens per row.
        tokenizer_files: saved inside every checkpoint.
        settings: everything that was set, for the loggers.
        make_frozen: makes (or loads) the argument of the loss that is not trained, on the mesh; None for none.
        sample: returns sample texts, given the trained parameters and what is not trained; or None.
        transform_batch: changes a host batch of this process with the state at hand, `(state, batch, step) -> batch`;
            a function of the seed and the step, never of what came before, or resuming would not be exact.
        files: further texts by file name, saved inside every checkpoint.
        frozen_weights: the model's own weights are not trained (an adapter is), which costs fewer FLOPs.
    """

    run: RunConfig
    optim: OptimConfig
    model: ModelConfig
    loss_fn: LossFn
    init_params: Callable[[Any], Params]
    param_shapes: Params
    param_axes: Any
    train_rows: Rows
    valid_rows: Rows | None
    batch_size: int
    max_seq_len: int
    tokenizer_files: dict[str, str]
    settings: dict[str, Any]
    make_frozen: Callable[[Mesh], Any] | None = None
    sample: Callable[[Params, Any], list[str]] | None = None
    transform_batch: TransformBatch | None = None
    files: dict[str, str] = field(default_factory=dict)
    frozen_weights: bool = False

    @property
    def rows_per_step(self) -> int:
        """Rows that one optimizer step reads."""
        return self.batch_size * self.run.accumulation_steps

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.run.steps is not None:
            return self.run.steps
        return max(1, math.ceil(self.run.epochs * len(self.train_rows) / self.rows_per_step))


def train(job: Job) -> int:
    """Run a job to its end, or to a signal.

    Returns:
        0 when all steps are done, 128 plus the signal's number when a signal ended it (everything saved).

    Raises:
        TrainingError: too many steps in a row had a non-finite gradient.
        ConfigError: the model or the batch does not fit the mesh.
    """
    mesh = make_mesh(job.run.mesh)
    check_mesh(mesh, job.model)
    check_rows(mesh, job.batch_size)
    checkpointer = Checkpointer(
        job.run.out_dir,
        keep=job.run.keep,
        model_config=job.model,
        tokenizer_files=job.tokenizer_files,
        files=job.files,
    )
    peak = peak_flops(jax.devices()[0])  # may run a product on that device alone, so outside the mesh
    with jax.set_mesh(mesh), stop_on_signal() as stop, checkpointer:
        return _Loop(job, mesh, checkpointer, peak).run(stop)


class _Loop:
    """The loop's moving parts; lives for one call of `train`."""

    def __init__(self, job: Job, mesh: Mesh, checkpointer: Checkpointer, peak: float | None) -> None:
        self.job, self.mesh, self.checkpointer, self.peak = job, mesh, checkpointer, peak
        self.total = job.total_steps
        schedule = make_schedule(job.optim, self.total)
        optimizer = make_optimizer(job.optim, self.total, job.param_shapes)
        self.iterator = make_iterator(
            job.train_rows, job.rows_per_step, job.run.seed, jax.process_index(), jax.process_count()
        )
        self.state, shardings, data_state = open_state(
            mesh, checkpointer, optimizer, job.param_shapes, job.param_axes, job.init_params, job.run.seed
        )
        if data_state is not None:
            self.iterator.set_state(data_state)
        self.start = int(self.state["step"])
        self.frozen = None if job.make_frozen is None else job.make_frozen(mesh)
        step = make_train_step(job.loss_fn, optimizer, schedule, job.run.accumulation_steps)
        self.train_step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        self.eval_step = jax.jit(make_eval_step(job.loss_fn))
        self.skipped_total = self.skipped_in_a_row = 0
        self.valid_loss: tuple[int, float] | None = None

    def run(self, stop: StopRequest) -> int:
        """Step until the end or a signal; what step n measured is read while step n + 1 runs."""
        job = self.job
        with MetricsLogger(
            job.run.out_dir,
            self.total,
            start_step=self.start,
            wandb_project=job.run.wandb_project,
            config=job.settings,
        ) as self.logger:
            if self.start:
                what = "resuming" if self.start < self.total else "nothing left to do in"
                self.logger.print(f"{what} {job.run.out_dir} after step {self.start} of {self.total}")
            self.flops = flops_per_token(job.model, job.max_seq_len, frozen=job.frozen_weights)
            self.clock, self.clock_tokens = time.perf_counter(), 0
            pending: tuple[int, dict[str, jax.Array]] | None = None
            for step in range(self.start + 1, self.total + 1):
                host_batch = next(self.iterator)
                if job.transform_batch is not None:
                    host_batch = job.transform_batch(self.state, host_batch, step)
                self.state, metrics = self.train_step(self.state, self.frozen, put_batch(host_batch, self.mesh))
                if pending is not None:
                    self._read(*pending)
                pending = (step, metrics)
                self.clock_tokens += int((host_batch["segment_ids"] > 0).sum())
                due_eval = job.run.eval_interval and step % job.run.eval_interval == 0
                signum = stop.signum  # read once: a signal that comes later is seen after the next step
                due_save = step % job.run.save_interval == 0 or step == self.total or signum is not None
                due_sample = job.sample and job.run.sample_interval and step % job.run.sample_interval == 0
                if due_eval or due_save or due_sample:
                    self._read(*pending)
                    pending = None
                    evaluate = bool(due_eval or (due_save and job.run.eval_interval)) and signum is None
                    self._between_steps(step, evaluate, due_save, bool(due_sample))
                if signum is not None:
                    self.logger.print(f"stopped by signal after step {step}; start again to go on from here")
                    return 128 + signum
            if self.skipped_total:
                self.logger.print(f"{self.skipped_total} steps were skipped for non-finite gradients")
        return 0

    def _read(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Fetch one step's metrics, log them when due, and watch for divergence."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        skipped = values.pop("skipped") > 0
        self.skipped_total += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if skipped:
            self.logger.print(
                f"step {step}: the gradient is not finite; step skipped ({self.skipped_in_a_row} in a row)"
            )
        if self.skipped_in_a_row >= self.job.run.max_skipped_steps:
            raise TrainingError(
                f"{self.skipped_in_a_row} steps in a row up to step {step} had a non-finite gradient; "
                "lower --learning_rate or raise --warmup_ratio, and look at the rows with train.inspect_data"
            )
        now = time.perf_counter()
        compiling = step == self.start + 1
        due_log = step % self.job.run.log_interval == 0 or step in (1, self.total)
        if due_log and not compiling:
            rate = self.clock_tokens / (now - self.clock)
            values["tokens_per_second"] = rate
            if self.peak:
                values["mfu"] = rate * self.flops / (self.peak * jax.device_count())
        if due_log or compiling:
            self.clock, self.clock_tokens = now, 0
        if due_log:
            self.logger.log(step, values)

    def _between_steps(self, step: int, evaluate: bool, save: bool, sample: bool) -> None:
        """Validate, sample and save: all that needs the device to itself, off the throughput clock."""
        paused = time.perf_counter()
        if evaluate:
            self._validate(step)
        if sample and self.job.sample is not None:
            for text in self.job.sample(self.state["params"], self.frozen):
                self.logger.print(f"step {step} sample: {text}")
        if save:
            loss = self.valid_loss[1] if self.valid_loss is not None and self.valid_loss[0] == step else None
            metrics = None if loss is None else {"valid_loss": loss}
            self.checkpointer.save(self.state, self.iterator.get_state(), metrics)
        self.clock += time.perf_counter() - paused

    def _validate(self, step: int) -> None:
        rows = self.job.valid_rows
        if rows is None or (self.valid_loss is not None and self.valid_loss[0] == step):
            return
        totals: dict[str, tuple[float, float]] = {}
        for batch in eval_batches(rows, self.job.batch_size):
            sums = jax.device_get(self.eval_step(self.state["params"], self.frozen, put_batch(batch, self.mesh)))
            for name, (value, weight) in sums.items():
                old = totals.get(name, (0.0, 0.0))
                totals[name] = (old[0] + float(value), old[1] + float(weight))
        values = {f"valid_{name}": value / max(weight, 1e-8) for name, (value, weight) in totals.items()}
        self.valid_loss = (step, values["valid_loss"])
        self.logger.log(step, values)
