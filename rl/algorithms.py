"""Policy optimisation by name: the objectives of the papers, and the flags that choose and change one."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from minillm_jax.config import ConfigError
from rl.losses import Aggregation, Baseline, Clip, KlEstimator, KlPlace, Objective, Ratio

Algorithm = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "spo"]

GRPO = Objective(
    # DeepSeekMath (arXiv:2402.03300): β = 0.04 (sec. 4.2), k3 (eq. 4). It does not state ε: 0.2 is PPO's and TRL's.
    baseline="group",
    ratio="token",
    clip="ppo",
    clip_low=0.2,
    clip_high=0.2,
    aggregation="sequence",
    kl_coef=0.04,
    kl_estimator="k3",
    kl_in="loss",
    entropy_coef=0.0,
    dynamic_sampling=False,
)

PRESETS: dict[str, Objective] = {
    "grpo": GRPO,
    # arXiv:2503.20783: neither the standard deviation nor the completion's length divides, and there is no KL.
    "dr_grpo": replace(GRPO, baseline="mean", aggregation="constant", kl_coef=0.0),
    # arXiv:2503.14476, sec. 3: clip higher, token means, no KL, groups that teach nothing are resampled.
    "dapo": replace(GRPO, clip_high=0.28, aggregation="token", kl_coef=0.0, dynamic_sampling=True),
    # arXiv:2507.18071, sec. 5.1, for the clip range; KL is left out of its objective.
    "gspo": replace(GRPO, ratio="sequence", clip_low=3e-4, clip_high=4e-4, kl_coef=0.0),
    # MiniMax-M1 (arXiv:2506.13585): token means, no KL, no lower bound. It does not state the upper one: 5 is ScaleRL's
    # (arXiv:2510.13786), TRL's and MiniMind's.
    "cispo": replace(GRPO, clip="cispo", clip_low=1.0, clip_high=4.0, aggregation="token", kl_coef=0.0),
    # arXiv:2402.14740: whole completions are the actions, KL in the reward; clip range and β are TRL's.
    "rloo": replace(
        GRPO, baseline="leave_one_out", ratio="trajectory", kl_coef=0.05, kl_estimator="k1", kl_in="reward"
    ),
    # arXiv:2501.03262: PPO without a critic, k1 per token in the reward. β is that of RLinf's recipe.
    "reinforce_pp": replace(
        GRPO, baseline="batch", aggregation="token", kl_coef=0.001, kl_estimator="k1", kl_in="reward"
    ),
    # The same paper's variant for reasoning: group mean, then the batch's deviation, and k2 in the loss.
    "reinforce_pp_baseline": replace(
        GRPO, baseline="group_batch", aggregation="token", kl_coef=0.001, kl_estimator="k2"
    ),
    # arXiv:2509.13232: one completion a prompt; clip range and missing KL are those of the authors' recipe in verl.
    "spo": replace(GRPO, baseline="spo", clip_high=0.28, aggregation="token", kl_coef=0.0),
}


@dataclass(frozen=True)
class AlgorithmConfig:
    """The policy's objective. What is None follows the algorithm, see `PRESETS`."""

    algorithm: Algorithm = "grpo"
    """Whose choices to start from."""
    baseline: Baseline | None = None
    """What is subtracted from rewards: the group's mean (mean), the same over the group's deviation (group), the mean
    of the group's others (leave_one_out), the batch's mean over its deviation (batch), the group's mean and then the
    batch's deviation (group_batch), a tracker's memory of the prompt (spo), or nothing (none)."""
    ratio: Ratio | None = None
    """Probability ratio of each token, its geometric mean over the completion (sequence), or its product
    (trajectory)."""
    clip: Clip | None = None
    """ppo ignores tokens that have moved too far; cispo bounds their weight."""
    clip_low: float | None = None
    """The ratio is clipped below at 1 minus this; 1 is no bound."""
    clip_high: float | None = None
    """The ratio is clipped above at 1 plus this."""
    aggregation: Aggregation | None = None
    """Mean over tokens, mean over completions of their token means (sequence), or a sum over tokens by completions
    times max_new_tokens (constant)."""
    kl_coef: float | None = None
    """Price of a nat of divergence from the reference; 0 does without a reference."""
    kl_estimator: KlEstimator | None = None
    """Schulman's estimator of that divergence."""
    kl_in: KlPlace | None = None
    """Whether it is a term of the loss or is taken off the rewards."""
    entropy_coef: float | None = None
    """Weight of the policy's entropy, which the loss rewards."""
    dynamic_sampling: bool | None = None
    """Sample new prompts in place of those whose completions all have the same reward."""

    def __post_init__(self) -> None:
        """Refuse numbers and combinations that mean nothing."""
        if self.algorithm not in PRESETS:
            raise ConfigError(f"--algorithm must be one of {', '.join(PRESETS)}, not {self.algorithm}")
        objective = self.objective()
        if not 0.0 < objective.clip_low <= 1.0:
            raise ConfigError(f"--clip_low must lie in (0, 1], not {objective.clip_low}; 1 is no bound")
        if not (objective.clip_high > 0.0 and math.isfinite(objective.clip_high)):
            raise ConfigError(f"--clip_high must be positive, not {objective.clip_high}")
        for name, value in (("kl_coef", objective.kl_coef), ("entropy_coef", objective.entropy_coef)):
            if not (value >= 0.0 and math.isfinite(value)):
                raise ConfigError(f"--{name} must not be negative, but is {value}")
        if objective.kl_coef and objective.kl_in == "loss" and objective.kl_estimator == "k1":
            raise ConfigError(
                "--kl_estimator k1 in the loss pulls nowhere, as its expected gradient is zero: "
                "take k2 or k3, or --kl_in reward"
            )
        if objective.ratio == "trajectory" and objective.aggregation != "sequence":
            raise ConfigError("--ratio trajectory is one term a completion: it goes with --aggregation sequence")
        if objective.dynamic_sampling and objective.baseline not in ("group", "mean", "leave_one_out", "group_batch"):
            raise ConfigError(
                f"--dynamic_sampling drops groups of equal rewards, which do teach under --baseline "
                f"{objective.baseline}: take a baseline of the group"
            )

    def objective(self) -> Objective:
        """Write out what follows the algorithm."""
        chosen = {field.name: getattr(self, field.name) for field in fields(Objective)}
        return replace(PRESETS[self.algorithm], **{name: value for name, value in chosen.items() if value is not None})
