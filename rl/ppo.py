"""PPO: a policy and a critic learn from completions that a reward judges, without leaving the reference too far.

    python -m rl.ppo --data_path prompts.jsonl --model_path out/sft --reward_model_path out/rm --out_dir out/ppo

Rows are `{"prompt"}` or `{"conversations"}`. A completion's reward comes with its last token and every token pays for
its divergence from the reference (arXiv:2203.02155); the critic values every token's state in one forward pass, and
advantages are GAE's (arXiv:1506.02438). The critic is a model of its own, or with --shared_trunk a head on the policy.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minillm_jax.checkpoint import CRITIC
from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import (
    ComputeConfig,
    ConfigError,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    parse_cli,
    shape_difference,
)
from minillm_jax.losses import Batch, LossFn, Metrics
from minillm_jax.matmul import matmul
from minillm_jax.model import ModelOutput, Params
from minillm_jax.pretrained import load_reward_params, read_model_config
from minillm_jax.reward import reward_axes, reward_shapes
from minillm_jax.run import Trained, open_run, what_to_train
from rl.advantages import explained_variance, gae, kl_shaped_rewards, whiten
from rl.config import PromptConfig, RLRunConfig, RolloutConfig
from rl.experience import Experience
from rl.health import HealthConfig
from rl.layout import by_completion, on_grid
from rl.loop import Controls, RLJob, Weighed, run_rl
from rl.losses import KlEstimator, Objective, kl_estimate, value_loss
from rl.policy import policy_terms, read_states, read_tokens, reference_policy, require_model, with_loss
from rl.rewards import RewardConfig
from rl.task import load_task


@dataclass(frozen=True)
class PpoConfig:
    """What is particular about PPO (arXiv:1707.06347)."""

    num_generations: int = 1
    """Completions per prompt; several share one reading of it, which makes updates cheaper."""
    clip_range: float = 0.2
    """The policy's probability ratio is clipped to 1 ± clip_range."""
    value_clip: float | None = 0.2
    """A value is clipped to what it was ± value_clip; None does not clip."""
    value_coef: float = 0.5
    """Weight of the critic's loss."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy, which is encouraged."""
    gamma: float = 1.0
    """Discount per token."""
    gae_lambda: float = 0.95
    """Decay of generalised advantage estimation: 0 trusts the critic, 1 the rewards."""
    kl_coef: float = 0.05
    """Price of a nat of divergence from the reference, taken off each token's reward; 0 needs no reference."""
    kl_estimator: KlEstimator = "k1"
    """Estimator of that divergence."""
    target_kl: float | None = None
    """Adapt kl_coef so that completions diverge by this many nats (arXiv:1909.08593); None keeps it fixed."""
    kl_horizon: float = 1000.0
    """Completions over which an adaptive kl_coef changes by a tenth of its relative error."""
    whiten_rewards: bool = False
    """Divide rewards, the KL penalty included, by their standard deviation over the rollout."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and variance 1 over the rollout."""
    shared_trunk: bool = False
    """Put the critic's head on the policy itself instead of a model of its own."""
    critic_path: str | None = None
    """Reward model or model that the critic starts from; None takes --reward_model_path, or else --model_path."""

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        checks = {
            "num_generations": self.num_generations >= 1,
            "clip_range": 0 < self.clip_range < 1,
            "value_clip": self.value_clip is None or self.value_clip > 0,
            "gamma": 0 <= self.gamma <= 1,
            "gae_lambda": 0 <= self.gae_lambda <= 1,
            "kl_coef": self.kl_coef >= 0,
            "value_coef": self.value_coef >= 0,
            "target_kl": self.target_kl is None or self.target_kl > 0,
            "kl_horizon": self.kl_horizon > 0,
        }
        for name, holds in checks.items():
            if not holds:
                raise ConfigError(f"--{name} {getattr(self, name)} is out of range")
        if self.target_kl is not None and not self.kl_coef:
            raise ConfigError("--target_kl adapts --kl_coef, which must not be 0 to begin with")
        if self.shared_trunk and self.critic_path is not None:
            raise ConfigError("--critic_path and --shared_trunk exclude each other")

    @property
    def objective(self) -> Objective:
        """The policy's loss: the KL penalty is in the rewards."""
        return Objective(
            baseline="none", ratio="token", clip="ppo", clip_low=self.clip_range, clip_high=self.clip_range,
            aggregation="token", kl_coef=self.kl_coef, kl_estimator=self.kl_estimator, kl_in="reward",
            entropy_coef=self.entropy_coef, dynamic_sampling=False,
        )  # fmt: skip


@dataclass(frozen=True)
class PpoStageConfig:
    """Settings of a PPO run."""

    run: RLRunConfig
    data: PromptConfig
    model: ModelConfig
    ppo: PpoConfig = PpoConfig()
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig(update_epochs=2, minibatches=2)
    health: HealthConfig = HealthConfig()
    optim: OptimConfig = OptimConfig(learning_rate=1e-4, schedule="constant", weight_decay=0.0)
    compute: ComputeConfig = ComputeConfig()
    lora: LoraConfig = LoraConfig()


# --- The critic -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ActorCritic:
    """Splits what PPO trains, `{…policy or adapter…, "critic": …}`, and reads tokens with both parts."""

    model: ModelConfig
    compute: ComputeConfig
    trained: Trained
    shared_trunk: bool
    temperature: float

    def policy(self, params: Params, frozen: Any) -> Params:
        """Parameters of the policy."""
        return self.trained.params({name: part for name, part in params.items() if name != CRITIC}, frozen)

    def read(
        self, params: Params, frozen: Any, batch: Batch, key: jax.Array | None = None
    ) -> tuple[tuple[jax.Array, jax.Array, ModelOutput], jax.Array]:
        """Return what `read_tokens` says of the policy, and the critic's values `[B, C]` of the states before them."""
        read = read_tokens(self.policy(params, frozen), self.model, self.compute, batch, self.temperature, key)
        critic = params[CRITIC]
        output = read[2] if self.shared_trunk else read_states(critic, self.model, self.compute, batch)
        return read, on_grid(_values(critic, output.hidden), batch["grid"])


def _values(critic: Params, hidden: jax.Array) -> jax.Array:
    """Apply the head to hidden states `[R, S, D]`; float32 `[R, S]`."""
    return matmul(hidden, critic["score"]["kernel"].astype(hidden.dtype))[..., 0].astype(jnp.float32)


def with_critic(config: PpoStageConfig, model: ModelConfig, trained: Trained) -> Trained:
    """Put a critic beside what is trained, under the name of `checkpoint.CRITIC`.

    It is a reward model's tree, or on a shared trunk its head alone. A new head is zero: it expects nothing yet.

    Raises:
        ConfigError: the model that the critic shall start from has another shape.
    """
    shared = config.ppo.shared_trunk
    shapes, axes = reward_shapes(model), reward_axes(model)
    path = config.ppo.critic_path or config.reward.reward_model_path or str(config.run.model_path)
    if not shared and (difference := shape_difference(model, read_model_config(path).resolved())):
        name, ours, theirs = difference
        raise ConfigError(f"the critic cannot start from {path}: its {name} is {theirs}, the policy's is {ours}")

    def start(shardings: Any) -> Params:
        if shared:
            head = jnp.zeros((model.hidden_size, 1), device=shardings["score"]["kernel"])
            return {"score": {"kernel": head}}
        return load_reward_params(path, dtype=jnp.float32, shardings=shardings)[1]

    def init_params(shardings: Any) -> Params:
        policy = {name: part for name, part in shardings.items() if name != CRITIC}
        return {**trained.init_params(policy), CRITIC: start(shardings[CRITIC])}

    only = (lambda tree: {"score": tree["score"]}) if shared else (lambda tree: tree)
    return dataclasses.replace(
        trained,
        init_params=init_params,
        param_shapes={**trained.param_shapes, CRITIC: only(shapes)},
        param_axes={**trained.param_axes, CRITIC: only(axes)},
    )


# --- Rewards to advantages --------------------------------------------------------------------------------------------


def weigh(ppo: PpoConfig, experience: Experience, measured: dict[str, np.ndarray], controls: Controls) -> Weighed:
    """Turn rewards into advantages and returns `[B, C]`, and adapt the KL coefficient for the next rollout."""
    mask, learnt = jnp.asarray(experience.mask), jnp.asarray(experience.learnt)
    scores = jnp.asarray(experience.rewards.reshape(-1))
    logprobs, values = jnp.asarray(measured["logprobs"]), jnp.asarray(measured["values"])
    kl, metrics, arrays = jnp.zeros_like(mask), dict[str, float](), {"old_logprobs": measured["logprobs"]}
    if "ref_logprobs" in measured:
        arrays["ref_logprobs"] = measured["ref_logprobs"]
        reference = jnp.asarray(measured["ref_logprobs"])
        kl = kl_estimate(logprobs, reference, ppo.kl_estimator) * mask
        completion_kl = float(((logprobs - reference) * mask).sum(-1).mean())
        metrics = {"completion_kl": completion_kl, "kl_coef": controls["kl_coef"]}
        controls = controls | {"kl_coef": adapted_kl_coef(ppo, controls["kl_coef"], completion_kl, len(scores))}
    rewards = kl_shaped_rewards(scores, kl, mask, metrics.get("kl_coef", 0.0))
    if ppo.whiten_rewards:
        rewards = whiten(rewards, learnt, shift_mean=False)
    advantages, returns = gae(rewards, values, mask, gamma=ppo.gamma, lam=ppo.gae_lambda)
    metrics["explained_variance"] = float(explained_variance(values, returns, learnt))
    metrics["value"] = float((values * mask).sum() / mask.sum())
    if ppo.whiten_advantages:
        advantages = whiten(advantages, learnt)
    arrays |= {"old_values": measured["values"], "advantages": np.asarray(advantages), "returns": np.asarray(returns)}
    return arrays, metrics, controls


def adapted_kl_coef(ppo: PpoConfig, kl_coef: float, kl: float, completions: int) -> float:
    """Raise or lower the KL coefficient towards its target (arXiv:1909.08593, sec. 2.2).

    Args:
        ppo: the target and the horizon.
        kl_coef: the coefficient β.
        kl: divergence measured, in nats per completion.
        completions: that it was measured on.

    Returns:
        β (1 + completions / horizon · e), with e the relative error kept within ±0.2; β itself without a target.
    """
    if ppo.target_kl is None:
        return kl_coef
    error = min(max(kl / ppo.target_kl - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * completions / ppo.kl_horizon)


def ppo_loss(ppo: PpoConfig, parts: ActorCritic, max_new_tokens: int) -> LossFn:
    """Make the loss: the clipped policy loss plus value_coef times the critic's.

    The batch is that of a rollout with `old_logprobs advantages old_values returns`, and `ref_logprobs` where there is
    a reference, `[B, C]` each.
    """

    def loss_fn(
        params: Params, frozen: Any, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        read, values = parts.read(params, frozen, batch, key)
        loss, (weight, metrics) = policy_terms(ppo.objective, *read, batch, max_new_tokens)
        old_values, returns, mask = (by_completion(batch[name]) for name in ("old_values", "returns", "weights"))
        critic_loss, (_, critic_metrics) = value_loss(values, old_values, returns, mask, ppo.value_clip)
        return with_loss((loss + ppo.value_coef * critic_loss, (weight, metrics | critic_metrics)))

    return loss_fn


def main() -> int:
    """Run the stage; returns the exit status."""
    with user_errors():
        config = parse_cli(PpoStageConfig, str(__doc__), read_model=read_model_config)
        model_path = require_model(config.run)
        setup_jax()
        run = open_run(config)
        task = load_task(config, run)
        policy = what_to_train(config, run)
        trained = with_critic(config, run.model, policy)
        parts = ActorCritic(run.model, config.compute, policy, config.ppo.shared_trunk, config.rollout.temperature)

        def measure(params: Params, frozen: Any, batch: Batch) -> dict[str, jax.Array]:
            (logprobs, _, _), values = parts.read(params, frozen, batch)
            found = {"logprobs": logprobs, "values": values}
            if (reference := policy.rest(frozen)) is not None:
                found["ref_logprobs"] = read_tokens(reference, run.model, config.compute, batch, parts.temperature)[0]
            return found

        return run_rl(
            RLJob(
                config=config,
                run=run,
                trained=trained,
                policy=parts.policy,
                measure=measure,
                weigh=partial(weigh, config.ppo),
                loss_fn=ppo_loss(config.ppo, parts, config.rollout.max_new_tokens),
                make_frozen=policy.make_frozen(reference_policy(model_path, run.model, config.ppo.kl_coef)),
                task=task,
                group_size=config.ppo.num_generations,
                controls={"kl_coef": config.ppo.kl_coef},
            )
        )


if __name__ == "__main__":
    sys.exit(main())
