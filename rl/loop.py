"""The loop of reinforcement learning, the same for PPO and GRPO: roll out, reward, weigh, update, look after health.

A stage brings three functions: what to measure on a rollout's tokens with the current parameters, how rewards become
advantages, and a loss. The loop owns the rest: prompts, sampling, minibatches, held-out prompts, checkpoints, and going
back when a health bound breaks. Every random number comes from the seed and the step, so a run that was killed goes on
with the very numbers that it would have had.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from minillm_jax.checkpoint import Checkpointer
from minillm_jax.config import OptimConfig, to_json
from minillm_jax.data import Batch as HostBatch
from minillm_jax.data import PromptRows, make_iterator
from minillm_jax.lm import LanguageModel
from minillm_jax.losses import Batch, LossFn
from minillm_jax.metrics import MetricsLogger, plot_curves
from minillm_jax.model import Params
from minillm_jax.optim import make_optimizer, make_schedule
from minillm_jax.run import Run, Trained
from minillm_jax.samples import answer_chats
from minillm_jax.sharding import data_parallelism, make_mesh
from minillm_jax.trainer import (
    StopRequest,
    TrainingError,
    TrainState,
    TrainStep,
    make_train_step,
    open_state,
    put_batch,
    stop_on_signal,
)
from rl.config import check_batch
from rl.experience import Experience, Round, best_groups, differing, reward_metrics, rollout_metrics, take_groups
from rl.health import broken_bound
from rl.layout import Layout, balanced_order, group_sizes, groups_per_row, grown, to_batch
from rl.rewards import Sample, Scored
from rl.rollout import Rollout, read_rollout, rollout_file, sample_rollout, write_rollout
from rl.task import RLConfig, Task

ROLLOUTS = "rollouts"
NOTHING_TO_LEARN = 10
"""Rollouts in a row without a difference in reward after which a warning is printed."""

Controls = dict[str, Any]
"""What a run carries from rollout to rollout beside its train state; small, and saved as JSON with each checkpoint."""
FIRST_CONTROLS: Controls = {"lr_scale": 1.0, "rollbacks": 0}
"""Factor on the learning rate, and how often the run has gone back; the `Layout` of its batches joins them."""


Weighed = tuple[dict[str, np.ndarray], dict[str, float], Controls]
"""Arrays `[B, C]` for the loss, metrics of the rollout, and the controls of the next one."""


@dataclass(frozen=True)
class RLJob:
    """One stage's training: what differs between PPO and GRPO.

    Attributes:
        config: everything that was set.
        run: the open run folder.
        trained: what the steps change, a critic included.
        policy: takes what is trained and what is frozen; returns parameters to sample from.
        measure: `(params, frozen, batch) -> {name: [b, C]}`, what the weighing needs to know of each token, among it
            `logprobs` of the targets at the rollout's temperature.
        weigh: turns rewards and measurements into what the loss reads; `(experience, measured, controls)`.
        loss_fn: the loss, see `losses.LossFn`, on what `weigh` returns; its metrics hold `approx_kl`.
        make_frozen: makes what is not trained, on the mesh; or None.
        task: prompts and rewards.
        group_size: completions G per prompt.
        dynamic_sampling: replace groups whose rewards are all equal by others.
        controls: of the first rollout.
        moved: called after an update with the experience, what was measured before and after it, and the controls;
            returns the next controls. None for none.
    """

    config: RLConfig
    run: Run
    trained: Trained
    policy: Callable[[Params, Any], Params]
    measure: Callable[[Params, Any, Batch], dict[str, jax.Array]]
    weigh: Callable[[Experience, dict[str, np.ndarray], Controls], Weighed]
    loss_fn: LossFn
    make_frozen: Callable[[Mesh], Any] | None
    task: Task
    group_size: int = 1
    dynamic_sampling: bool = False
    controls: Controls = field(default_factory=dict)
    moved: Callable[[Experience, dict[str, np.ndarray], dict[str, np.ndarray], Controls], Controls] | None = None

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        run, rollout = self.config.run, self.config.rollout
        if run.steps is not None:
            return run.steps
        rollouts = math.ceil(run.epochs * len(self.task.prompts) / self.config.data.batch_size)
        return max(1, rollouts) * rollout.update_epochs * rollout.minibatches


def run_rl(job: RLJob) -> int:
    """Run a job to its end, or to a signal.

    Returns:
        0 when all steps are done, 128 plus the signal's number when a signal ended it (everything saved).

    Raises:
        TrainingError: a health bound broke again after the run had gone back once, or too many steps in a row had a
            non-finite gradient.
        ConfigError: the rows of a rollout cannot be split as asked.
        RewardError: a reward function failed.
    """
    run = job.config.run
    mesh = make_mesh(run.mesh)
    checkpointer = Checkpointer(
        run.out_dir,
        keep=run.keep,
        model_config=job.run.model,
        tokenizer_files=job.run.tokenizer.files(),
        files=job.trained.files,
    )
    with jax.set_mesh(mesh), stop_on_signal() as stop, checkpointer:
        status = _Loop(job, mesh, checkpointer).run(stop)
    plot_curves(job.run.folder)
    return status


class _Loop:
    """The loop's moving parts; lives for one call of `run_rl`."""

    def __init__(self, job: RLJob, mesh: Mesh, checkpointer: Checkpointer) -> None:
        self.job, self.mesh, self.checkpointer = job, mesh, checkpointer
        self.config, self.tokenizer, self.folder = job.config, job.run.tokenizer, job.run.folder
        self.total = job.total_steps
        run, self.prompts_per_rollout = self.config.run, self.config.data.batch_size
        self.parts = check_batch(
            self.prompts_per_rollout, self.config.rollout, run.accumulation_steps, data_parallelism(mesh)
        )
        self.iterator = make_iterator(job.task.prompts, self.prompts_per_rollout, run.seed)
        layout = dataclasses.astuple(Layout(length=self.config.rollout.max_new_tokens))
        self.controls: Controls = {**FIRST_CONTROLS, "layout": layout, **job.controls}
        self.state, self.shardings, saved = self._open_state()
        if saved is not None:
            self.iterator.set_state(saved["iterator"])
            self.controls |= saved["controls"]
        self.start = self.step = int(self.state["step"])
        self.frozen = None if job.make_frozen is None else job.make_frozen(mesh)
        self.measure = jax.jit(job.measure)
        self.train_step = self._make_step()
        self.strikes = self.idle = self.skipped_in_a_row = 0
        self.valid_reward: tuple[int, float] | None = None
        if saved is None:
            self._save()  # somewhere to go back to

    def _optim(self) -> OptimConfig:
        scale = self.controls["lr_scale"]
        return dataclasses.replace(self.config.optim, learning_rate=self.config.optim.learning_rate * scale)

    def _open_state(self) -> tuple[TrainState, Any, dict[str, Any] | None]:
        trained = self.job.trained
        optimizer = make_optimizer(self._optim(), self.total, trained.param_shapes)
        return open_state(
            self.mesh,
            self.checkpointer,
            optimizer,
            trained.param_shapes,
            trained.param_axes,
            trained.init_params,
            self.config.run.seed,
        )

    def _make_step(self) -> TrainStep:
        optim = self._optim()
        optimizer = make_optimizer(optim, self.total, self.job.trained.param_shapes)
        schedule = make_schedule(optim, self.total)
        step = make_train_step(self.job.loss_fn, optimizer, schedule, self.config.run.accumulation_steps)
        return jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, None))

    def run(self, stop: StopRequest) -> int:
        """Roll out and update until the end or a signal."""
        run, settings = self.config.run, json.loads(to_json(self.config))
        with MetricsLogger(
            run.out_dir, self.total, start_step=self.start, wandb_project=run.wandb_project, config=settings
        ) as self.logger:
            if self.start:
                what = "resuming" if self.start < self.total else "nothing left to do in"
                self.logger.print(f"{what} {run.out_dir} after step {self.start} of {self.total}")
            elif run.eval_interval:
                self._evaluate()
            while self.step < self.total:
                before = self.step
                metrics = self._iterate()
                self.step = int(self.state["step"])
                if not self._healthy(metrics):
                    continue
                signum, last = stop.signum, self.step >= self.total
                if last or self._due(before, run.log_interval):
                    self.logger.log(self.step, metrics)
                due_save = last or signum is not None or self._due(before, run.save_interval)
                if self._due(before, run.eval_interval) or (last and run.eval_interval):
                    self._evaluate()
                if self._due(before, run.sample_interval):
                    self._show()
                if due_save:
                    self._save()
                if signum is not None:
                    self.logger.print(f"stopped by signal after step {self.step}; start again to go on from here")
                    return 128 + signum
        return 0

    def _due(self, before: int, interval: int) -> bool:
        return interval > 0 and self.step // interval > before // interval

    # --- one rollout and its update -----------------------------------------------------------------------------------

    def _iterate(self) -> dict[str, float]:
        """Roll out, weigh, update; returns what was measured."""
        job, clock = self.job, time.perf_counter()
        experience, metrics, drawn = self._collect()
        rolled_out = time.perf_counter()
        measured = self._measured(experience.batch)
        gap = np.abs(measured["logprobs"] - experience.sampler_logprobs) * experience.mask
        arrays, weighed, self.controls = job.weigh(experience, measured, self.controls)
        shape = experience.batch["weights"].shape
        updates = self._update(experience.batch | {name: array.reshape(shape) for name, array in arrays.items()})
        if job.moved is not None:
            self.controls = job.moved(experience, measured, self._measured(experience.batch), self.controls)
        done = time.perf_counter()
        read = np.count_nonzero(experience.batch["segment_ids"])
        return {
            **metrics,
            "logprob_gap": float(gap.max()),
            **weighed,
            **updates,
            "rollout_tokens_per_second": drawn / (rolled_out - clock),
            "tokens_per_second": updates["updates"] / self.config.rollout.minibatches * read / (done - rolled_out),
            "rollout_seconds": rolled_out - clock,
            "update_seconds": done - rolled_out,
        }

    def _collect(self) -> tuple[Experience, dict[str, float], int]:
        """Draw prompts and completions and score them, again and again if sampling is dynamic.

        Returns:
            What to learn from, metrics of all that was drawn, and the number of tokens drawn.
        """
        job, rollout_config, step = self.job, self.config.rollout, self.step
        rounds: list[Round] = []
        useful = 0
        while useful < self.prompts_per_rollout and len(rounds) < rollout_config.sampling_rounds:
            indices = np.repeat(np.asarray(next(self.iterator)["index"]), job.group_size)
            if rollout_config.replay is not None:
                rollout, answered = read_rollout(rollout_file(Path(rollout_config.replay), step))
                indices = np.asarray(answered)
            else:
                seed = (self.config.run.seed, step, len(rounds))
                rollout = self._sample(indices, job.task.prompts, rollout_config.temperature, seed)
            scored = self._score(rollout, indices, job.task.prompts)
            rounds.append((rollout, indices, scored))
            if not job.dynamic_sampling or rollout_config.replay is not None:
                break
            useful += int(differing(scored, job.group_size).sum())
        rollouts, scores = [rollout for rollout, _, _ in rounds], [scored for _, _, scored in rounds]
        metrics = rollout_metrics(rollouts, scores, job.group_size)
        rollout, indices, scored = best_groups(rounds, job.group_size, self.prompts_per_rollout)
        if rollout_config.save_rollouts and rollout_config.replay is None:
            self._write(rollout, indices, scored)
        return self._experience((rollout, indices, scored)), metrics, sum(rollout.tokens for rollout in rollouts)

    def _experience(self, drawn: Round) -> Experience:
        size = self.job.group_size
        sizes, _ = group_sizes(drawn[0], size)
        layout = Layout(*self.controls["layout"])
        # Which groups share an update must not depend on the mesh, so units are chosen without it, and rows are parts
        # of units where there are more devices than units.
        unit = layout.groups or groups_per_row(sizes, self.parts // data_parallelism(self.mesh))
        groups = math.gcd(unit, len(sizes) // self.parts)
        units = balanced_order(sizes, unit).reshape(-1, unit)
        order = np.concatenate([groups_of[balanced_order(sizes[groups_of], groups)] for groups_of in units])
        rollout, indices, scored = take_groups(drawn, order, size)
        layout = grown(dataclasses.replace(layout, groups=groups), rollout, size)
        self.controls = self.controls | {"layout": dataclasses.astuple(dataclasses.replace(layout, groups=unit))}
        batch, logprobs = to_batch(rollout, size, layout)
        keep = scored.ok & (rollout.finished | (not self.config.rollout.mask_truncated_completions))
        if self.job.dynamic_sampling:
            keep &= np.repeat(differing(scored, size), size)
        batch["weights"] *= keep.reshape(*batch["weights"].shape[:2], 1)
        return Experience(rollout, batch, logprobs, scored, indices, size)

    def _write(self, rollout: Rollout, indices: np.ndarray, scored: Scored) -> None:
        decode = self.tokenizer.decode
        columns: dict[str, Sequence[Any]] = {
            "prompt": [decode(ids) for ids in rollout.prompts],
            "completion": [decode(ids) for ids in rollout.completions],
            "reward": scored.total.tolist(),
            **{f"reward/{name}": values.tolist() for name, values in scored.components.items()},
        }
        write_rollout(rollout_file(self.folder / ROLLOUTS, self.step), rollout, indices.tolist(), columns)

    def _sample(
        self, indices: Sequence[int] | np.ndarray, prompts: PromptRows, temperature: float, seed: tuple[int, ...]
    ) -> Rollout:
        job = self.job
        return sample_rollout(
            job.policy(self.state["params"], self.frozen),
            job.run.model,
            [prompts.prompts[i] for i in indices],
            self.tokenizer.eos_token_ids,
            temperature=temperature,
            max_new_tokens=self.config.rollout.max_new_tokens,
            rows_at_once=self.config.rollout.rollout_batch_size,
            seed=seed,
            compute=self.config.compute,
        )

    def _score(self, rollout: Rollout, indices: Sequence[int] | np.ndarray, prompts: PromptRows) -> Scored:
        decode = self.tokenizer.decode
        samples = [
            Sample(
                prompt_ids=prompt,
                completion_ids=completion,
                prompt=decode(prompt),
                completion=decode(completion, skip_special_tokens=True),
                finished=bool(finished),
                record=prompts.records[index],
            )
            for prompt, completion, finished, index in zip(
                rollout.prompts, rollout.completions, rollout.finished, indices, strict=True
            )
        ]
        return self.job.task.reward(samples)

    def _measured(self, batch: HostBatch) -> dict[str, np.ndarray]:
        """Measure a rollout in pieces of a micro-batch."""
        params, pieces = self.state["params"], []
        count = self.config.rollout.minibatches * self.config.run.accumulation_steps
        for rows in np.split(np.arange(len(batch["tokens"])), count):
            piece = {name: array[rows] for name, array in batch.items()}
            pieces.append(jax.device_get(self.measure(params, self.frozen, put_batch(piece, self.mesh))))
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def _update(self, batch: HostBatch) -> dict[str, float]:
        """Learn from a rollout in minibatches; returns the means of what the steps measured."""
        rollout, units = self.config.rollout, self.prompts_per_rollout // Layout(*self.controls["layout"]).groups
        rows = np.arange(len(batch["tokens"])).reshape(units, -1)
        random = np.random.default_rng((self.config.run.seed, self.step))
        found: list[dict[str, float]] = []
        for _ in range(rollout.update_epochs):
            order = random.permutation(units) if rollout.minibatches > 1 else np.arange(units)
            for part in np.split(rows[order].reshape(-1), rollout.minibatches):
                minibatch = put_batch({name: array[part] for name, array in batch.items()}, self.mesh)
                self.state, metrics = self.train_step(self.state, self.frozen, minibatch)
                found.append({name: float(value) for name, value in jax.device_get(metrics).items()})
                self._watch(found[-1].pop("skipped") > 0)
                if rollout.max_update_kl is not None and found[-1]["approx_kl"] > rollout.max_update_kl:
                    return _means(found) | {"updates": float(len(found))}
        return _means(found) | {"updates": float(len(found))}

    def _watch(self, skipped: bool) -> None:
        """Say that a step was skipped, and stop when no gradient is finite any more."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if skipped:
            self.logger.print(f"a step's gradient is not finite; step skipped ({self.skipped_in_a_row} in a row)")
        if self.skipped_in_a_row >= self.config.run.max_skipped_steps:
            raise TrainingError(
                f"{self.skipped_in_a_row} steps in a row had a non-finite gradient; lower --learning_rate, and look at "
                "the completions with --save_rollouts"
            )

    # --- between rollouts ---------------------------------------------------------------------------------------------

    def _healthy(self, metrics: Mapping[str, float]) -> bool:
        """Look at the bounds; go back to the last healthy checkpoint when one is broken, and stop the second time."""
        self.idle = self.idle + 1 if metrics.get("reward_std") == 0.0 else 0
        if self.idle == NOTHING_TO_LEARN:
            self.logger.print(
                f"step {self.step}: all rewards of the last {self.idle} rollouts were the same "
                f"({metrics['reward']:g}), so there was nothing to learn; look at the completions with --save_rollouts"
            )
        problem = broken_bound(self.config.health, metrics)
        self.strikes = 0 if problem is None else self.strikes + 1
        if self.strikes < self.config.health.health_patience:
            return True
        self.logger.log(self.step, metrics)
        if self.controls["rollbacks"]:
            raise TrainingError(
                f"step {self.step}: {problem}, although the run had gone back once; the last healthy checkpoint is "
                f"kept in {self.folder}. Lower --learning_rate, raise the KL coefficient, or move the bound"
            )
        state, _, saved = self._open_state()
        healthy = int(state["step"])
        state["step"] = self.state["step"]  # the schedule and the names of checkpoints go on
        self.state = state
        self.controls |= FIRST_CONTROLS | self.job.controls | (saved or {}).get("controls", {})
        self.controls["rollbacks"] += 1
        self.controls["lr_scale"] *= self.config.health.rollback_lr_factor
        self.train_step = self._make_step()
        self.strikes = 0
        self.logger.print(
            f"step {self.step}: {problem}; going back to the parameters of step {healthy}, and on with the next "
            f"prompts at {self.controls['lr_scale']:g} times the learning rate"
        )
        self._save()
        return False

    def _evaluate(self) -> None:
        """Answer held-out prompts greedily."""
        prompts = self.job.task.valid_prompts
        if prompts is None:
            return
        indices = range(min(len(prompts), self.config.rollout.eval_prompts))
        rollout = self._sample(indices, prompts, 0.0, (self.config.run.seed,))
        scored = self._score(rollout, indices, prompts)
        values = {f"valid_{name}": value for name, value in reward_metrics(scored, rollout).items()}
        self.valid_reward = (self.step, values["valid_reward"])
        self.logger.log(self.step, values)

    def _show(self) -> None:
        """Answer a few messages greedily, on the screen."""
        policy = self.job.policy(self.state["params"], self.frozen)
        lm = LanguageModel(self.job.run.model, policy, self.tokenizer)
        for text in answer_chats(lm, self.config.run.sample_prompts):
            self.logger.print(f"step {self.step} sample: {text}")

    def _save(self) -> None:
        metrics = {}
        if self.valid_reward is not None and self.valid_reward[0] == self.step:
            metrics = {"valid_loss": -self.valid_reward[1]}  # the best checkpoint is the one with the lowest
        data_state = {"iterator": self.iterator.get_state(), "controls": self.controls}
        self.checkpointer.save(self.state, data_state, metrics)


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
