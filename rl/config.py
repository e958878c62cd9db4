"""What the command lines of rl.ppo and rl.grpo share: where prompts come from, how completions are drawn and used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minillm_jax.config import ConfigError, RunConfig


@dataclass(frozen=True)
class RLRunConfig(RunConfig):
    """A run whose steps are expensive: it is logged, evaluated and saved more often."""

    log_interval: int = 1
    """Steps between logged metrics."""
    eval_interval: int = 20
    """Steps between evaluations on held-out prompts; 0 for never."""
    save_interval: int = 20
    """Steps between checkpoints; the first and the last step are always saved."""


@dataclass(frozen=True)
class PromptConfig:
    """Where prompts come from."""

    data_path: tuple[str, ...]
    """JSONL files or folders of them, each with an optional weight: a.jsonl:0.7 b.jsonl:0.3."""
    valid_path: tuple[str, ...] = ()
    """Held-out files; without them `valid_fraction` of the prompts is set aside."""
    valid_fraction: float = 0.02
    """Share of prompts set aside for evaluation when there is no valid_path; 0 for none."""
    max_seq_len: int = 512
    """Tokens of a prompt and its completion together; a prompt that leaves less than max_new_tokens is left out."""
    batch_size: int = 16
    """Prompts per rollout."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at a bad row before training starts, or count and report it."""


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are drawn, and how often they are learnt from."""

    max_new_tokens: int = 128
    """Longest completion in tokens."""
    temperature: float = 1.0
    """Of the sampling; log-probabilities in the loss are at the same temperature."""
    rollout_batch_size: int = 256
    """Completions drawn together."""
    sampling_rounds: int = 4
    """Rollouts that dynamic sampling draws for one update, at most; with 1 groups of equal rewards are left out and not
    replaced (zero-variance filtering, arXiv:2510.13786)."""
    update_epochs: int = 1
    """Passes over each rollout."""
    minibatches: int = 1
    """Optimizer steps per pass."""
    max_update_kl: float | None = None
    """Stop learning from a rollout once the policy has moved this far from the one that drew it, in nats per token."""
    mask_truncated_completions: bool = False
    """Leave completions without an end token out of the loss (DAPO's overlong filtering, arXiv:2503.14476)."""
    eval_prompts: int = 256
    """Held-out prompts answered greedily at each evaluation, at most."""
    save_rollouts: bool = False
    """Write every rollout into the run folder as JSONL, to be read or replayed."""
    replay: str | None = None
    """Folder of rollouts to take completions from instead of drawing them, step by step."""

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        for name in ("max_new_tokens", "rollout_batch_size", "sampling_rounds", "update_epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if not self.temperature > 0:
            raise ConfigError(f"--temperature must be positive, not {self.temperature}: learning needs variety")


def check_batch(prompts: int, rollout: RolloutConfig, accumulation_steps: int, ways: int) -> int:
    """Return into how many parts the prompts of a rollout are split: minibatches, micro-batches and devices.

    Raises:
        ConfigError: they cannot be split evenly; the message says what can.
    """
    parts = rollout.minibatches * accumulation_steps * ways
    if prompts % parts:
        raise ConfigError(
            f"a rollout of {prompts} prompts cannot be split into {rollout.minibatches} minibatches of "
            f"{accumulation_steps} micro-batches over {ways} devices; use a multiple of {parts} for --batch_size"
        )
    return parts
