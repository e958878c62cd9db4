"""Experience: a rollout with its rewards, as learning sees it; and which groups of it are worth learning from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minillm_jax.data import Batch
from rl.rewards import Scored
from rl.rollout import Rollout


@dataclass(frozen=True)
class Experience:
    """A rollout with its rewards.

    Attributes:
        rollout: B = P * G completions; those of one prompt stand together.
        batch: see `layout.to_batch`; the weights mark the tokens to learn from.
        sampler_logprobs: `[B, C]`, that the tokens were drawn with.
        scored: rewards of the completions.
        indices: `[B]`, which prompt of the data each one answers.
        group_size: completions G per prompt.
    """

    rollout: Rollout
    batch: Batch
    sampler_logprobs: np.ndarray
    scored: Scored
    indices: np.ndarray
    group_size: int

    @property
    def rewards(self) -> np.ndarray:
        """Total rewards `[P, G]`."""
        return total_rewards(self.scored, self.group_size)

    @property
    def mask(self) -> np.ndarray:
        """`[B, C]`, 1 for every token that was drawn, to be learnt from or not."""
        lengths = np.asarray([len(completion) for completion in self.rollout.completions])
        return (np.arange(self.batch["weights"].shape[-1]) < lengths[:, None]).astype(np.float32)

    @property
    def learnt(self) -> np.ndarray:
        """`[B, C]`, 1 for every token to learn from: completions that were left out do not sway the others."""
        return self.batch["weights"].reshape(self.mask.shape)


def total_rewards(scored: Scored, group_size: int) -> np.ndarray:
    """Total rewards `[P, G]`; one that failed counts as the mean of its group, where there is any other."""
    total, ok = (array.reshape(-1, group_size) for array in (scored.total, scored.ok))
    mean = (total * ok).sum(-1, keepdims=True) / np.maximum(ok.sum(-1, keepdims=True), 1)
    return np.where(ok, total, mean).astype(np.float32)


def differing(scored: Scored, group_size: int) -> np.ndarray:
    """`[P]` bool: in which groups not all rewards are equal."""
    total, ok = (array.reshape(-1, group_size) for array in (scored.total, scored.ok))
    return np.where(ok, total, -np.inf).max(-1) > np.where(ok, total, np.inf).min(-1)


Round = tuple[Rollout, np.ndarray, Scored]
"""A rollout, which prompts it answers `[B]`, and its rewards."""


def take_groups(drawn: Round, groups: np.ndarray, group_size: int) -> Round:
    """Take groups out of a rollout, in the order given."""
    rollout, indices, scored = drawn
    rows = (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)
    taken = Rollout(
        [rollout.prompts[i] for i in rows],
        [rollout.completions[i] for i in rows],
        [rollout.logprobs[i] for i in rows],
        rollout.finished[rows],
    )
    components = {name: values[rows] for name, values in scored.components.items()}
    return taken, indices[rows], Scored(scored.total[rows], components, scored.ok[rows])


def best_groups(rounds: Sequence[Round], group_size: int, count: int) -> Round:
    """Take `count` groups out of several rounds: first, in the order drawn, those whose rewards differ."""
    drawn = (
        join([rollout for rollout, _, _ in rounds]),
        np.concatenate([indices for _, indices, _ in rounds]),
        join_scores([scored for _, _, scored in rounds]),
    )
    order = np.argsort(~differing(drawn[2], group_size), kind="stable")[:count]
    return take_groups(drawn, order, group_size)


def join(rollouts: Sequence[Rollout]) -> Rollout:
    """Put rollouts one behind the other."""
    return Rollout(
        [prompt for rollout in rollouts for prompt in rollout.prompts],
        [completion for rollout in rollouts for completion in rollout.completions],
        [logprobs for rollout in rollouts for logprobs in rollout.logprobs],
        np.concatenate([rollout.finished for rollout in rollouts]),
    )


def join_scores(scores: Sequence[Scored]) -> Scored:
    """Put their rewards one behind the other."""
    components = {name: np.concatenate([s.components[name] for s in scores]) for name in scores[0].components}
    return Scored(np.concatenate([s.total for s in scores]), components, np.concatenate([s.ok for s in scores]))


def reward_metrics(scored: Scored, rollout: Rollout) -> dict[str, float]:
    """Means of the rewards and of the completions' form."""
    return {
        **scored.metrics(),
        "completion_length": rollout.tokens / len(rollout.completions),
        "eos_rate": float(rollout.finished.mean()),
    }


def rollout_metrics(rollouts: Sequence[Rollout], scores: Sequence[Scored], group_size: int) -> dict[str, float]:
    """What rollouts were like, before anything was chosen and learnt from them."""
    rollout, scored = join(rollouts), join_scores(scores)
    return {
        **reward_metrics(scored, rollout),
        "reward_std": float(total_rewards(scored, group_size).std()),
        "zero_variance": float(1.0 - differing(scored, group_size).mean()),
    }
