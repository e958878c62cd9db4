"""GRPO and its relatives: several completions per prompt, each judged against the others.

    python -m rl.grpo --data_path prompts.jsonl --model_path out/sft --out_dir out/grpo --reward exact
    python -m rl.grpo --data_path prompts.jsonl --model_path out/sft --out_dir out/dapo --algorithm dapo --lora_rank 8

Rows are `{"prompt"}` or `{"conversations"}`, with an `"answer"` for rewards that verify. A completion's advantage is how
much better its reward is than those of the same prompt; `--algorithm` names a published set of choices (baseline, ratio,
clipping, aggregation, KL), and each choice has a flag of its own.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import ComputeConfig, ConfigError, LoraConfig, ModelConfig, OptimConfig, parse_cli, to_json
from minillm_jax.losses import Batch, LossFn, Metrics
from minillm_jax.model import Params, param_axes
from minillm_jax.pretrained import load_params, read_model_config
from minillm_jax.run import open_run, what_to_train
from minillm_jax.sharding import tree_shardings
from rl.advantages import BASELINES, BetaTracker, kl_shaped_rewards, returns_to_go, whiten
from rl.algorithms import AlgorithmConfig
from rl.config import PromptConfig, RLRunConfig, RolloutConfig, load_stage_prompts
from rl.health import HealthConfig
from rl.loop import Controls, Experience, RLJob, Weighed, run_rl
from rl.losses import Objective, kl_estimate
from rl.policy import policy_terms, read_tokens, require_model, with_loss
from rl.rewards import RewardConfig, make_rewards


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
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = RolloutConfig()
    health: HealthConfig = HealthConfig()
    optim: OptimConfig = OptimConfig(learning_rate=1e-5, schedule="constant", weight_decay=0.0)
    compute: ComputeConfig = ComputeConfig()
    lora: LoraConfig = LoraConfig()


def weigh(objective: Objective, experience: Experience, measured: dict[str, np.ndarray], controls: Controls) -> Weighed:
    """Turn the rewards of groups into advantages `[B, T]`.

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
            kl = kl_estimate(measured["logprobs"], measured["ref_logprobs"], objective.kl_estimator)
            penalty = objective.kl_coef * np.asarray(kl) * mask
    if objective.baseline == "batch":
        per_token = kl_shaped_rewards(experience.scored.total, penalty, mask, 1.0)
        advantages = whiten(returns_to_go(per_token, mask), mask)
    else:
        totals = jnp.asarray(rewards - penalty.sum(-1).reshape(rewards.shape))
        if objective.baseline == "spo":
            expected = BetaTracker.from_lists(controls["tracker"]).value(experience.indices)
            metrics["expected_reward"] = float(expected.mean())
            per_row = BASELINES["batch"](totals - expected.reshape(rewards.shape))
        else:
            per_row = BASELINES[objective.baseline](totals)
        advantages = per_row.reshape(-1, 1) * mask
    arrays["advantages"] = np.asarray(advantages, np.float32)
    return arrays, metrics, controls


def track(
    experience: Experience, before: dict[str, np.ndarray], after: dict[str, np.ndarray], controls: Controls
) -> Controls:
    """Remember how the prompts of a rollout went (SPO), forgetting more of the past the more the policy has moved.

    How far it moved since a prompt was last seen is the sum of what the updates since then moved it on average.
    """
    mask = experience.mask
    moved = float((kl_estimate(after["logprobs"], before["logprobs"], "k3") * mask).sum() / mask.sum())
    total = controls["moved"] + moved
    seen = np.asarray(controls["seen"])
    tracker = BetaTracker.from_lists(controls["tracker"])
    indices = experience.indices
    tracker = tracker.update(indices, experience.scored.total.clip(0.0, 1.0), total - seen[indices])
    seen[indices] = total
    return controls | {"tracker": tracker.to_lists(), "seen": seen.tolist(), "moved": total}


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
        prompts, valid_prompts = load_stage_prompts(config.data, config.rollout, run.tokenizer, config.run.seed)
        reward = make_rewards(config.reward, run.tokenizer)
        reward.check([prompts, valid_prompts])
        trained = what_to_train(config, run)

        def reference(mesh: Mesh, base: Params | None) -> Params | None:
            if not objective.kl_coef:
                return None
            if base is not None:
                return base  # an adapter's base is held once
            return load_params(model_path, dtype=jnp.float32, shardings=tree_shardings(mesh, param_axes(run.model)))[1]

        def measure(params: Params, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
            read = partial(read_tokens, config=run.model, compute=config.compute, batch=batch, temperature=temperature)
            found = {"logprobs": read(trained.params(params, frozen))[0]}
            if (rest := trained.rest(frozen)) is not None:
                found["ref_logprobs"] = read(rest)[0]
            return found

        spo = objective.baseline == "spo"
        tracker = {"tracker": BetaTracker.create(len(prompts)).to_lists(), "seen": [0.0] * len(prompts), "moved": 0.0}
        return run_rl(
            RLJob(
                run=config.run,
                data=config.data,
                rollout=config.rollout,
                health=config.health,
                optim=config.optim,
                compute=config.compute,
                model=run.model,
                tokenizer=run.tokenizer,
                group_size=config.group.num_generations,
                policy=trained.params,
                measure=measure,
                weigh=partial(weigh, objective),
                loss_fn=trained.loss(grpo_loss(config, run.model)),
                init_params=trained.init_params,
                param_shapes=trained.param_shapes,
                param_axes=trained.param_axes,
                make_frozen=trained.make_frozen(reference),
                reward=reward,
                prompts=prompts,
                valid_prompts=valid_prompts,
                settings=json.loads(to_json(config)),
                controls=tracker if spo else {},
                moved=track if spo else None,
                dynamic_sampling=objective.dynamic_sampling,
                files=trained.files,
            )
        )


if __name__ == "__main__":
    sys.exit(main())
