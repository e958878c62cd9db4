"""GRPO and its relatives: several completions per prompt, each judged against the others.

    python -m rl.grpo --data_path prompts.jsonl --model_path out/sft --out_dir out/grpo --reward exact
    python -m rl.grpo --data_path prompts.jsonl --model_path out/sft --out_dir out/dapo --algorithm dapo --lora_rank 8

Rows are `{"prompt"}` or `{"conversations"}`, with an `"answer"` for rewards that verify. A completion's advantage is
how much better its reward is than those of the same prompt; `--algorithm` names a published set of choices (baseline,
ratio, clipping, aggregation, KL), and each choice has a flag of its own.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import ComputeConfig, ConfigError, LoraConfig, ModelConfig, OptimConfig, parse_cli
from minillm_jax.losses import Batch, LossFn, Metrics
from minillm_jax.model import Params
from minillm_jax.pretrained import read_model_config
from minillm_jax.run import open_run, what_to_train
from rl.advantages import BASELINES, BetaTracker, kl_shaped_rewards, returns_to_go, single_stream, whiten
from rl.algorithms import AlgorithmConfig
from rl.config import PromptConfig, RLRunConfig, RolloutConfig
from rl.experience import Experience
from rl.health import HealthConfig
from rl.loop import Controls, RLJob, Weighed, run_rl
from rl.losses import Objective, kl_estimate
from rl.policy import policy_terms, read_tokens, reference_policy, require_model, with_loss
from rl.rewards import RewardConfig
from rl.task import load_task


@dataclass(frozen=True)
class GroupConfig:
    """Completions of one prompt."""

    num_generations: int = 8
    """Completions per prompt; the rewards of the others are what one is compared with."""

    def __post_init__(self) -> None:
        """Refuse what is no number of completions."""
        if self.num_generations < 1:
            raise ConfigError(f"--num_generations must be at least 1, not {self.num_generations}")


@dataclass(frozen=True)
class GrpoConfig:
    """Settings of a GRPO run."""

    run: RLRunConfig
    data: PromptConfig
    model: ModelConfig
    group: GroupConfig = GroupConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    health: HealthConfig = HealthConfig()
    optim: OptimConfig = OptimConfig(learning_rate=1e-4, schedule="constant", weight_decay=0.0)
    compute: ComputeConfig = ComputeConfig()
    lora: LoraConfig = LoraConfig()


def weigh(objective: Objective, experience: Experience, measured: dict[str, np.ndarray], controls: Controls) -> Weighed:
    """Turn the rewards of groups into advantages `[B, C]`.

    A KL penalty in the reward is taken off a completion's total, or with the baseline `batch` (REINFORCE++) token by
    token, where each counts what it and all later ones cost.
    """
    mask, rewards = experience.mask, experience.rewards
    arrays, metrics = {"old_logprobs": measured["logprobs"]}, dict[str, float]()
    penalty = np.zeros_like(mask)
    if "ref_logprobs" in measured:
        arrays["ref_logprobs"] = measured["ref_logprobs"]
        log_ratio = (measured["logprobs"] - measured["ref_logprobs"]) * mask
        metrics["completion_kl"] = float(log_ratio.sum(-1).mean())
        if objective.kl_in == "reward":
            policy, reference = jnp.asarray(measured["logprobs"]), jnp.asarray(measured["ref_logprobs"])
            kl = kl_estimate(policy, reference, objective.kl_estimator)
            penalty = objective.kl_coef * np.asarray(kl) * mask
    if objective.baseline == "batch":
        inside = jnp.asarray(mask)
        per_token = kl_shaped_rewards(jnp.asarray(rewards.reshape(-1)), jnp.asarray(penalty), inside, 1.0)
        advantages = whiten(returns_to_go(per_token, inside), jnp.asarray(experience.learnt))
    else:
        totals = jnp.asarray(rewards - penalty.sum(-1).reshape(rewards.shape))
        if objective.baseline == "spo":
            expected = BetaTracker.from_json(controls["tracker"]).value(experience.indices)
            metrics["expected_reward"] = float(expected.mean())
            per_row = single_stream(totals, jnp.asarray(expected.reshape(rewards.shape)))
        else:
            per_row = BASELINES[objective.baseline](totals)
        advantages = per_row.reshape(-1, 1) * mask
    arrays["advantages"] = np.asarray(advantages, np.float32)
    return arrays, metrics, controls


def new_tracker(prompts: int) -> Controls:
    """What SPO remembers of each prompt: its tracker, and how far the policy had moved when it was last seen."""
    return {"tracker": BetaTracker.create(prompts).to_json(), "seen": [0.0] * prompts, "moved": 0.0}


def track(
    experience: Experience, before: dict[str, np.ndarray], after: dict[str, np.ndarray], controls: Controls
) -> Controls:
    """Remember how the prompts of a rollout went (SPO), forgetting more of the past the more the policy has moved.

    How far it moved since a prompt was last seen is the sum of what the updates since then moved it on average.
    """
    mask = experience.mask
    moved = float((np.abs(after["logprobs"] - before["logprobs"]) * mask).sum() / mask.sum())
    total = controls["moved"] + moved
    seen = np.asarray(controls["seen"])
    tracker = BetaTracker.from_json(controls["tracker"])
    indices = experience.indices
    tracker = tracker.update(indices, experience.scored.total.clip(0.0, 1.0), total - seen[indices])
    seen[indices] = total
    return controls | {"tracker": tracker.to_json(), "seen": seen.tolist(), "moved": total}


def grpo_loss(config: GrpoConfig, model: ModelConfig) -> LossFn:
    """Make the loss: `losses.policy_loss` on a batch with `old_logprobs`, `advantages` and perhaps `ref_logprobs`."""
    objective, rollout = config.algorithm.objective(), config.rollout

    def loss_fn(
        params: Params, frozen: Any, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        read = read_tokens(params, model, config.compute, batch, rollout.temperature, key)
        return with_loss(policy_terms(objective, *read, batch, rollout.max_new_tokens))

    return loss_fn


def main() -> int:
    """Run the stage; returns the exit status."""
    with user_errors():
        config = parse_cli(GrpoConfig, str(__doc__), read_model=read_model_config)
        model_path = require_model(config.run)
        setup_jax()
        run = open_run(config)
        objective, temperature = config.algorithm.objective(), config.rollout.temperature
        task = load_task(config, run)
        trained = what_to_train(config, run)

        def measure(params: Params, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
            def logprobs(policy: Params) -> jax.Array:
                return read_tokens(policy, run.model, config.compute, batch, temperature)[0]

            reference = trained.rest(frozen)
            found = {"logprobs": logprobs(trained.params(params, frozen))}
            return found if reference is None else found | {"ref_logprobs": logprobs(reference)}

        spo = objective.baseline == "spo"
        return run_rl(
            RLJob(
                config=config,
                run=run,
                trained=trained,
                policy=trained.params,
                measure=measure,
                weigh=partial(weigh, objective),
                loss_fn=trained.loss(grpo_loss(config, run.model)),
                make_frozen=trained.make_frozen(reference_policy(model_path, run.model, objective.kl_coef)),
                task=task,
                group_size=config.group.num_generations,
                dynamic_sampling=objective.dynamic_sampling,
                controls=new_tracker(len(task.prompts)) if spo else {},
                moved=track if spo else None,
            )
        )


if __name__ == "__main__":
    sys.exit(main())
