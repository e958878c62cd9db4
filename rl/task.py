"""What a policy is asked and judged by: prompts and rewards, loaded as a stage's configuration says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from minillm_jax.config import ConfigError
from minillm_jax.data import PromptRows, load_prompts
from minillm_jax.run import ModelStageConfig, Run
from minillm_jax.sharding import make_mesh
from rl.config import PromptConfig, RLRunConfig, RolloutConfig
from rl.health import HealthConfig
from rl.rewards import RewardConfig, Rewards, make_rewards


class RLConfig(ModelStageConfig, Protocol):
    """What the configuration of a stage of reinforcement learning holds."""

    @property
    def run(self) -> RLRunConfig: ...  # noqa: D102
    @property
    def data(self) -> PromptConfig: ...  # noqa: D102
    @property
    def reward(self) -> RewardConfig: ...  # noqa: D102
    @property
    def rollout(self) -> RolloutConfig: ...  # noqa: D102
    @property
    def health(self) -> HealthConfig: ...  # noqa: D102


@dataclass(frozen=True)
class Task:
    """Prompts to learn from, held-out ones or None, and what completions are rewarded for."""

    prompts: PromptRows
    valid_prompts: PromptRows | None
    reward: Rewards


def load_task(config: RLConfig, run: Run) -> Task:
    """Render the prompts that a stage's configuration names, and load its rewards.

    Raises:
        ConfigError: no room is left for prompts, or rewards do not fit together.
        DataError, RewardError: bad rows, or rows that a reward has no answer for.
    """
    data, rollout = config.data, config.rollout
    room = data.max_seq_len - rollout.max_new_tokens
    if room < 1:
        raise ConfigError(
            f"--max_seq_len {data.max_seq_len} leaves no room for a prompt before --max_new_tokens "
            f"{rollout.max_new_tokens}"
        )
    if data.max_seq_len > run.model.max_position_embeddings:
        raise ConfigError(
            f"--max_seq_len {data.max_seq_len} is more than the model's {run.model.max_position_embeddings} positions"
        )
    prompts, valid_prompts = load_prompts(
        data.data_path,
        run.tokenizer,
        room,
        on_bad_row=data.on_bad_row,
        seed=config.run.seed,
        valid_fraction=data.valid_fraction,
        valid_path=data.valid_path,
    )
    rewards = make_rewards(
        config.reward,
        run.tokenizer,
        max_prompt_len=room,
        max_new_tokens=rollout.max_new_tokens,
        mesh=make_mesh(config.run.mesh),
        compute=config.compute,
    )
    rewards.check([*prompts.records, *(valid_prompts.records if valid_prompts else [])])
    return Task(prompts, valid_prompts, rewards)
