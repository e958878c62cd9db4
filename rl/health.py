"""Health of a reinforcement learning run: bounds on what a rollout and its update measured.

Rewards can be gamed and policies can collapse while the loss looks as ever. Metrics go in; the first broken bound
comes out as a sentence, and the loop decides what to do about it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from minillm_jax.config import ConfigError


@dataclass(frozen=True)
class HealthConfig:
    """Bounds beyond which a run goes back to its last healthy checkpoint; None for no bound."""

    min_reward: float | None = None
    """Smallest mean reward of a rollout."""
    min_reward_std: float | None = None
    """Smallest standard deviation of a rollout's rewards."""
    max_kl: float | None = 1.0
    """Largest divergence from the reference, in nats per token, where there is a reference."""
    min_entropy: float | None = None
    """Smallest entropy of the policy, in nats per token."""
    max_entropy: float | None = None
    """Largest entropy of the policy, in nats per token."""
    min_eos_rate: float | None = None
    """Smallest share of completions that end by themselves."""
    max_completion_length: float | None = None
    """Largest mean length of completions, in tokens."""
    max_zero_variance: float | None = None
    """Largest share of groups whose completions all have the same reward, and so teach nothing."""
    max_ratio: float | None = 10.0
    """Largest mean probability ratio of an update."""
    max_clip_fraction: float | None = 0.9
    """Largest share of tokens whose ratio is clipped."""
    min_explained_variance: float | None = None
    """Smallest share of the returns' variance that the critic explains (ppo)."""
    health_patience: int = 1
    """Rollouts in a row that a bound must be broken for."""
    rollback_lr_factor: float = 0.5
    """What the learning rate is multiplied by after going back."""

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        if self.health_patience < 1:
            raise ConfigError(f"--health_patience must be at least 1, not {self.health_patience}")
        if not 0.0 < self.rollback_lr_factor <= 1.0:
            raise ConfigError(f"--rollback_lr_factor must lie in (0, 1], not {self.rollback_lr_factor}")


MONITORS = {
    "min_reward": "reward",
    "min_reward_std": "reward_std",
    "max_kl": "kl",
    "min_entropy": "entropy",
    "max_entropy": "entropy",
    "min_eos_rate": "eos_rate",
    "max_completion_length": "completion_length",
    "max_zero_variance": "zero_variance",
    "max_ratio": "ratio",
    "max_clip_fraction": "clip_fraction",
    "min_explained_variance": "explained_variance",
}
"""Bound → the metric that it is about."""


def broken_bound(bounds: HealthConfig, metrics: Mapping[str, float]) -> str | None:
    """Say which bound a rollout's metrics break, if any.

    A loss that is not finite is always unhealthy. A metric that was not measured breaks no bound.
    """
    if not math.isfinite(metrics.get("loss", 0.0)):
        return f"the loss is {metrics['loss']}"
    for bound, name in MONITORS.items():
        limit, value = getattr(bounds, bound), metrics.get(name)
        if limit is None or value is None:
            continue
        too_low, too_high = bound.startswith("min") and value < limit, bound.startswith("max") and value > limit
        if too_low or too_high or not math.isfinite(value):
            return f"{name} is {value:.4g}, {'below' if too_low else 'above'} --{bound} {limit:g}"
    return None
