"""From rewards to advantages: what a token, or a whole completion, was worth beyond what was expected of it.

Token-level functions take `[B, T]` arrays and a mask of the completion's tokens, whose positions in a row are
contiguous; whatever stands outside the mask, NaN included, is never read, and comes out as 0. Group baselines take
rewards `[P, G]` of G completions for each of P prompts, and are rows of the table `BASELINES`. The tracker of
single-stream policy optimisation, which remembers prompts between steps, lives on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# --- Tokens, [B, T] -------------------------------------------------------------------------------------------------


def gae(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, *, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation (arXiv:1506.02438, eq. 16).

    Â_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γV_{t+1} - V_t. The state after a completion's last token is terminal: its
    value is 0.

    Args:
        rewards: `[B, T]` r_t, for the token at t.
        values: `[B, T]` V_t, of the state in which the token at t is chosen.
        mask: `[B, T]` nonzero on the tokens of the completion.
        gamma: discount γ.
        lam: λ, from 0 (one step of bootstrapping) to 1 (none).

    Returns:
        Advantages, and returns Â_t + V_t, which the values are trained towards; each `[B, T]` float32.
    """
    inside = mask > 0
    rewards, values = _only(rewards, inside), _only(values, inside)
    next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    deltas = rewards + gamma * next_values - values

    def backwards(later: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        delta, inside = step
        advantage = jnp.where(inside, delta + gamma * lam * later, 0.0)  # [B]
        return advantage, advantage

    _, advantages = jax.lax.scan(backwards, jnp.zeros_like(deltas[:, 0]), (deltas.T, inside.T), reverse=True)
    return advantages.T, advantages.T + values


def whiten(x: jax.Array, mask: jax.Array, *, shift_mean: bool = True, epsilon: float = 1e-8) -> jax.Array:
    """Scale to unit variance, and shift to zero mean, over all masked entries.

    Args:
        x: any shape.
        mask: the same shape, nonzero on the entries that count.
        shift_mean: whether the mean becomes 0; otherwise it stays what it was.
        epsilon: added to the unbiased variance.

    Returns:
        The shape of x, float32. Entries that are all alike, or a single one, have exactly no deviation from their mean.
    """
    inside = mask > 0
    x = _only(x, inside)
    count = jnp.maximum(inside.sum(dtype=jnp.float32), 1.0)
    mean = x.sum() / count
    # A rounded mean would leave a residue, which the tiny standard deviation of equal entries would blow up.
    alike = jnp.where(inside, x, -jnp.inf).max() == jnp.where(inside, x, jnp.inf).min()
    centered = jnp.where(inside & ~alike, x - mean, 0.0)
    whitened = centered * jax.lax.rsqrt((centered**2).sum() / jnp.maximum(count - 1.0, 1.0) + epsilon)
    return whitened if shift_mean else jnp.where(inside, whitened + mean, 0.0)


def kl_shaped_rewards(scores: jax.Array, kl: jax.Array, mask: jax.Array, kl_coef: float) -> jax.Array:
    """Rewards per token of a policy that pays for leaving its reference (arXiv:2203.02155, eq. 2).

    Args:
        scores: `[B]` of whole completions.
        kl: `[B, T]` estimated divergence from the reference at each token, in nats.
        mask: `[B, T]` nonzero on the tokens of the completion.
        kl_coef: price of a nat.

    Returns:
        `[B, T]` float32: -kl_coef · kl, and the score on top at each row's last masked token. A row that is masked out
        altogether has nowhere to put its score.
    """
    inside = mask > 0
    remaining = jnp.cumsum(inside[:, ::-1], axis=1)[:, ::-1]
    last = inside & (remaining == 1)
    return -kl_coef * _only(kl, inside) + jnp.where(last, scores[:, None], 0.0)


def returns_to_go(rewards: jax.Array, mask: jax.Array) -> jax.Array:
    """Undiscounted sum of the rewards `[B, T]` from each masked token on, as REINFORCE++ takes it."""
    inside = mask > 0
    return _only(jnp.cumsum(_only(rewards, inside)[:, ::-1], axis=1)[:, ::-1], inside)


def explained_variance(values: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
    """Share of the variance of the returns that the values predict: 1 is perfect, 0 no better than their mean.

    Args:
        values: `[B, T]`.
        returns: `[B, T]`.
        mask: `[B, T]` nonzero on the entries that count.

    Returns:
        A scalar, 1 - Var(returns - values) / Var(returns); 0 where the returns do not vary.
    """
    inside = mask > 0
    values, returns = _only(values, inside), _only(returns, inside)
    count = jnp.maximum(inside.sum(dtype=jnp.float32), 1.0)

    def variance(x: jax.Array) -> jax.Array:
        return (_only(x - x.sum() / count, inside) ** 2).sum() / count

    total = variance(returns)
    return jnp.where(total > 0, 1.0 - variance(returns - values) / jnp.where(total > 0, total, 1.0), 0.0)


def _only(x: jax.Array, inside: jax.Array) -> jax.Array:
    """What lies inside the mask, in float32; multiplying by a mask would let NaN through."""
    return jnp.where(inside, x, 0.0).astype(jnp.float32)


# --- Groups, [P, G] -------------------------------------------------------------------------------------------------


def group_centered(rewards: jax.Array) -> jax.Array:
    """Dr. GRPO (arXiv:2503.20783): r_i - mean(r) of the prompt's group; exactly 0 where a group's rewards are equal."""
    alike = rewards.max(axis=1, keepdims=True) == rewards.min(axis=1, keepdims=True)
    return jnp.where(alike, 0.0, rewards - rewards.mean(axis=1, keepdims=True))


def group_normalized(rewards: jax.Array) -> jax.Array:
    """GRPO (arXiv:2402.03300): (r_i - mean(r)) / (std(r) + 1e-4), of the prompt's group.

    The standard deviation is the unbiased one, as in most implementations. Groups of equal rewards, such as those of
    one completion, give exactly 0.
    """
    centered = group_centered(rewards)
    degrees = max(rewards.shape[1] - 1, 1)
    return centered / (jnp.sqrt((centered**2).sum(axis=1, keepdims=True) / degrees) + 1e-4)


def leave_one_out(rewards: jax.Array) -> jax.Array:
    """RLOO (arXiv:2402.14740): r_i minus the mean reward of the prompt's other completions.

    A completion without others has no baseline: its advantage is the reward itself, plain REINFORCE.
    """
    completions = rewards.shape[1]
    if completions == 1:
        return rewards
    return group_centered(rewards) * (completions / (completions - 1))


def batch_whitened(rewards: jax.Array) -> jax.Array:
    """REINFORCE++ (arXiv:2501.03262): (r_i - mean(r)) / std(r), over all completions of the batch; any shape."""
    return whiten(rewards, jnp.ones_like(rewards))


def group_centered_batch_whitened(rewards: jax.Array) -> jax.Array:
    """REINFORCE++-baseline (arXiv:2501.03262): the group's mean is subtracted, then the batch's deviation divides.

    What is left after the group's means has a mean of 0, which is not subtracted again: groups of equal rewards stay at
    exactly 0.
    """
    centered = group_centered(rewards)
    return centered * jax.lax.rsqrt((centered**2).sum() / max(rewards.size - 1, 1) + 1e-8)


def no_baseline(rewards: jax.Array) -> jax.Array:
    """REINFORCE without a baseline: the rewards as they are."""
    return rewards


BASELINES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "group": group_normalized,
    "mean": group_centered,
    "leave_one_out": leave_one_out,
    "batch": batch_whitened,
    "group_batch": group_centered_batch_whitened,
    "none": no_baseline,
}
"""Rewards `[P, G]` to advantages `[P, G]`, by the name on the command line."""


# --- Single-stream policy optimisation ------------------------------------------------------------------------------


def single_stream(rewards: jax.Array, values: jax.Array) -> jax.Array:
    """SPO's advantages (arXiv:2509.13232): rewards minus what the tracker expected of them, whitened over the batch.

    Args:
        rewards: of completions, any shape.
        values: the tracker's, the same shape, from before it saw these rewards.

    Returns:
        Advantages of that shape.
    """
    return batch_whitened(rewards - values)


@dataclass(frozen=True)
class BetaTracker:
    """SPO's memory of how often each prompt succeeds (arXiv:2509.13232): a Beta(α, β) for each, on the host."""

    alpha: np.ndarray
    """`[N]` float64 successes that are remembered, by prompt."""
    beta: np.ndarray
    """`[N]` float64 failures."""

    @classmethod
    def create(cls, n: int, value: float = 0.5, weight: float = 8.0) -> BetaTracker:
        """Start with the same expectation for every prompt.

        Args:
            n: number of prompts.
            value: expected success, in (0, 1).
            weight: observations that it counts for; 8 is 1 / (1 - ρ) at the fastest forgetting, ρ = 0.875.
        """
        return cls(alpha=np.full(n, value * weight), beta=np.full(n, (1.0 - value) * weight))

    def value(self, indices: np.ndarray) -> np.ndarray:
        """Expected success α / (α + β) of prompts: their indices `[B]` to float32 `[B]`."""
        alpha, beta = self.alpha[indices], self.beta[indices]
        return (alpha / (alpha + beta)).astype(np.float32)

    def update(
        self,
        indices: np.ndarray,
        rewards: np.ndarray,
        kl: np.ndarray,
        *,
        half_life: float = 0.06,
        low: float = 0.875,
        high: float = 0.96,
    ) -> BetaTracker:
        """Forget as much as the policy has changed, then add what was seen: α ← ρα + r, β ← ρβ + (1 - r).

        The defaults are those of the authors' recipe. A prompt that occurs several times is updated that often.

        Args:
            indices: `[B]` prompts.
            rewards: `[B]` in [0, 1].
            kl: `[B]` D, how far the policy has moved since the prompt was last seen, in nats per token.
            half_life: the D at which half is forgotten: ρ = 2^(-D / half_life), kept in [low, high].
            low: the least that is kept, even by a policy that has become another one.
            high: the most, even by a policy that stands still.

        Returns:
            A new tracker.

        Raises:
            ValueError: a reward lies outside [0, 1].
        """
        rewards = np.asarray(rewards, np.float64)
        if not np.all((rewards >= 0) & (rewards <= 1)):
            raise ValueError("a Beta tracker takes rewards in [0, 1]: scale them first")
        keep = np.clip(2.0 ** (-np.asarray(kl, np.float64) / half_life), low, high)
        alpha, beta = self.alpha.copy(), self.beta.copy()
        for index, reward, rho in zip(np.asarray(indices), rewards, keep, strict=True):
            alpha[index] = rho * alpha[index] + reward
            beta[index] = rho * beta[index] + (1.0 - reward)
        return BetaTracker(alpha, beta)

    def to_json(self) -> dict[str, Any]:
        """As lists that JSON can hold, exactly."""
        return {"alpha": self.alpha.tolist(), "beta": self.beta.tolist()}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> BetaTracker:
        """Back from `to_json`."""
        return cls(alpha=np.asarray(state["alpha"], np.float64), beta=np.asarray(state["beta"], np.float64))
