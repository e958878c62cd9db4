"""Losses of reinforcement learning: of policies, of PPO's critics, and of reward models.

One policy loss serves GRPO, GSPO, RLOO and others, which differ in the choices of an `Objective`. Arrays are `[B, T]`:
B completions, T tokens, and a mask that is nonzero on the tokens of each completion. What stands outside the mask is
never read and gets no gradient. Sums and weights stay apart, so that micro-batches add up to the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from minillm_jax.losses import Metrics

Baseline = Literal["group", "mean", "leave_one_out", "batch", "group_batch", "none", "spo"]
Ratio = Literal["token", "sequence", "trajectory"]
Clip = Literal["ppo", "cispo"]
Aggregation = Literal["token", "sequence", "constant"]
KlEstimator = Literal["k1", "k2", "k3"]
KlPlace = Literal["loss", "reward"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are kept within this distance of 0, far beyond any clip range: the exponential of a whole trajectory's
would overflow, and take the gradient along."""


@dataclass(frozen=True)
class Objective:
    """What a policy optimises, without open choices; `rl.algorithms.PRESETS` holds those that have names."""

    baseline: Baseline
    """What is subtracted from rewards: a row of `rl.advantages.BASELINES`, or spo for the tracker's."""
    ratio: Ratio
    """π/π_old of each token, its geometric mean over a completion, or its product over a completion."""
    clip: Clip
    """PPO's pessimistic surrogate, or CISPO's clipped and constant weight of log π."""
    clip_low: float
    """The ratio is clipped below at 1 - clip_low; 1 is no bound, as ratios are positive."""
    clip_high: float
    """The ratio is clipped above at 1 + clip_high."""
    aggregation: Aggregation
    """Mean over tokens, over completions of their token means, or a sum over tokens by a constant length."""
    kl_coef: float
    """Price of a nat of divergence from the reference; 0 needs no reference."""
    kl_estimator: KlEstimator
    """How the divergence is estimated, see `kl_estimate`."""
    kl_in: KlPlace
    """Whether the divergence is a term of the loss or is taken off the rewards."""
    entropy_coef: float
    """Weight of the entropy that the loss rewards."""
    dynamic_sampling: bool
    """Whether groups of equal rewards are replaced by new prompts (DAPO)."""

    @property
    def needs_reference(self) -> bool:
        """Whether log-probabilities of a reference are needed."""
        return self.kl_coef > 0


# --- Policy ---------------------------------------------------------------------------------------------------------


def kl_estimate(logprobs: jax.Array, ref_logprobs: jax.Array, kind: KlEstimator) -> jax.Array:
    """Estimate KL(π | π_ref) from tokens that π sampled (Schulman 2020, "Approximating KL divergence").

    With log r = log π_ref - log π: k1 is -log r, unbiased; k2 is (log r)² / 2, whose gradient is unbiased; k3 is
    r - 1 - log r, unbiased and never negative. The expected gradient of k1 is zero, so it has no place in a loss.

    Args:
        logprobs: of the policy, any shape.
        ref_logprobs: of the reference, the same shape.
        kind: which estimator.

    Returns:
        Nats, elementwise.
    """
    log_r = ref_logprobs - logprobs
    if kind == "k1":
        return -log_r
    if kind == "k2":
        return 0.5 * log_r**2
    return jnp.expm1(log_r) - log_r


def policy_loss(
    objective: Objective,
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    ref_logprobs: jax.Array | None = None,
    entropy: jax.Array | None = None,
    max_new_tokens: int,
) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
    """Loss of a policy on completions that an older policy sampled: surrogate, KL and entropy terms.

    With r the ratio, ppo is -min(r Â, clip(r) Â) (arXiv:1707.06347, eq. 7) and cispo -sg[clip(r)] Â log π
    (arXiv:2506.13585). Each term is aggregated alike: `token` is Σ over tokens by their number (DAPO,
    arXiv:2503.14476), `sequence` the mean of completions' means (GRPO, arXiv:2402.03300), `constant` Σ over tokens by
    completions times max_new_tokens (Dr. GRPO, arXiv:2503.20783). Rows that are masked out altogether do not count.

    Args:
        objective: the choices.
        logprobs: `[B, T]` log π of the tokens.
        old_logprobs: `[B, T]` those of the policy that sampled them.
        advantages: `[B, T]` Â.
        mask: `[B, T]` nonzero on the tokens of completions.
        ref_logprobs: `[B, T]` those of the reference; needed for a KL term in the loss.
        entropy: `[B, T]` of the policy's distribution at each token, in nats; needed for an entropy term.
        max_new_tokens: the longest that a completion may be.

    Returns:
        The sum of the loss, and its weight with metrics. `policy_loss` is the surrogate alone, aggregated as the loss;
        the others are means over tokens: `ratio`; `clip_fraction`, the share of tokens whose gradient (ppo) or
        weight (cispo) is clipped; `approx_kl`, the k3 estimate of KL(π_old | π); `kl`, that of KL(π | π_ref), where a
        reference is given; and `entropy`, where given.

    Raises:
        ValueError: the objective needs `ref_logprobs` or `entropy`, which is missing.
    """
    inside = mask > 0
    mask = inside.astype(jnp.float32)
    logprobs, old_logprobs, advantages = (jnp.where(inside, x, 0.0) for x in (logprobs, old_logprobs, advantages))
    ratio = _ratio(objective.ratio, logprobs - old_logprobs, mask)
    low, high = 1.0 - objective.clip_low, 1.0 + objective.clip_high
    clipped = jnp.clip(ratio, low, high)
    if objective.clip == "ppo":
        per_token = -jnp.minimum(ratio * advantages, clipped * advantages)
        is_clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
    else:
        per_token = -jax.lax.stop_gradient(clipped) * advantages * logprobs
        is_clipped = (ratio < low) | (ratio > high)

    tokens = mask.sum()
    surrogate, weight = aggregate(objective.aggregation, per_token, mask, max_new_tokens)
    token_means = {
        "ratio": ratio,
        "clip_fraction": is_clipped.astype(jnp.float32),
        "approx_kl": kl_estimate(old_logprobs, logprobs, "k3"),
    }
    if ref_logprobs is not None:
        ref_logprobs = jnp.where(inside, ref_logprobs, 0.0)
        token_means["kl"] = kl_estimate(logprobs, ref_logprobs, "k3")
    if entropy is not None:
        entropy = token_means["entropy"] = jnp.where(inside, entropy, 0.0)
    metrics: Metrics = {"policy_loss": (surrogate, weight)}
    metrics |= {name: ((value * mask).sum(), tokens) for name, value in token_means.items()}

    loss = surrogate
    if objective.kl_coef and objective.kl_in == "loss":
        if ref_logprobs is None:
            raise ValueError("a KL term in the loss needs ref_logprobs")
        kl = kl_estimate(logprobs, ref_logprobs, objective.kl_estimator)
        loss += objective.kl_coef * aggregate(objective.aggregation, kl, mask, max_new_tokens)[0]
    if objective.entropy_coef:
        if entropy is None:
            raise ValueError("an entropy term needs entropy")
        loss -= objective.entropy_coef * aggregate(objective.aggregation, entropy, mask, max_new_tokens)[0]
    return loss, (weight, metrics)


def _ratio(kind: Ratio, log_ratio: jax.Array, mask: jax.Array) -> jax.Array:
    """π/π_old `[B, T]` from its logarithm for each token, which is 0 outside the mask."""
    if kind == "sequence":
        # GSPO-token (arXiv:2507.18071): the value is the completion's, the gradient each token's own.
        mean = log_ratio.sum(1, keepdims=True) / jnp.maximum(mask.sum(1, keepdims=True), 1.0)
        log_ratio = jax.lax.stop_gradient(mean - log_ratio) + log_ratio
    elif kind == "trajectory":
        log_ratio = jnp.broadcast_to(log_ratio.sum(1, keepdims=True), log_ratio.shape)
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def aggregate(
    kind: Aggregation, per_token: jax.Array, mask: jax.Array, max_new_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Sum and weight of a term `[B, T]`."""
    lengths = mask.sum(1)
    completions = (lengths > 0).sum(dtype=jnp.float32)
    sums = (per_token * mask).sum(1)  # [B]
    if kind == "token":
        return sums.sum(), lengths.sum()
    if kind == "sequence":
        return (sums / jnp.maximum(lengths, 1.0)).sum(), completions
    return sums.sum(), completions * max_new_tokens


# --- Values and rewards ---------------------------------------------------------------------------------------------


def value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array, clip_range: float | None
) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
    """PPO's loss of a critic: ½ max((V - R)², (clip(V) - R)²), where V is clipped to clip_range around what it was.

    The clipping is not in the paper (arXiv:1707.06347) but in its authors' code, `ppo2` of OpenAI baselines.

    Args:
        values: `[B, T]` V.
        old_values: `[B, T]` those at the time of sampling.
        returns: `[B, T]` R.
        mask: `[B, T]` nonzero on the tokens of completions.
        clip_range: None is the plain squared error.

    Returns:
        The sum over tokens, and their number with the metrics `value_loss` and `value_clip_fraction`, the share of
        tokens whose clipped error is the larger one.
    """
    inside = mask > 0
    mask = inside.astype(jnp.float32)
    values, old_values, returns = (jnp.where(inside, x, 0.0) for x in (values, old_values, returns))
    error = clipped_error = (values - returns) ** 2
    if clip_range is not None:
        clipped = old_values + jnp.clip(values - old_values, -clip_range, clip_range)
        clipped_error = (clipped - returns) ** 2
    loss, tokens = (0.5 * jnp.maximum(error, clipped_error) * mask).sum(), mask.sum()
    is_clipped = ((clipped_error > error) * mask).sum()
    return loss, (tokens, {"value_loss": (loss, tokens), "value_clip_fraction": (is_clipped, tokens)})


def reward_model_loss(
    chosen: jax.Array, rejected: jax.Array, margin: jax.Array | None = None, center_coef: float = 0.0
) -> jax.Array:
    """Bradley-Terry loss of pairs, -log σ(r_c - r_r - m) (arXiv:2203.02155, eq. 1; margins from arXiv:2307.09288).

    Args:
        chosen: `[B]` rewards r_c of the preferred answers.
        rejected: `[B]` rewards r_r of the others.
        margin: `[B]` m, by how much the preferred answer is better; None is 0.
        center_coef: weight of (r_c + r_r)², which keeps rewards around 0 (arXiv:2312.09244).

    Returns:
        `[B]` float32.
    """
    lead = chosen - rejected if margin is None else chosen - rejected - margin
    return -jax.nn.log_sigmoid(lead) + center_coef * (chosen + rejected) ** 2
