"""From rewards to advantages in PPO and GRPO: completions that are left out do not sway those that are learnt from."""

import dataclasses

import numpy as np
import pytest

from rl import grpo, ppo
from rl.algorithms import AlgorithmConfig
from rl.experience import Experience, take_groups
from rl.layout import Layout, grown, to_batch
from rl.rewards import Scored
from rl.rollout import Rollout


def experience(lengths, rewards, kept):
    rollout = Rollout([[5, 6]] * len(lengths), [[7] * n for n in lengths], [[-1.0] * n for n in lengths],
                      np.ones(len(lengths), bool))  # fmt: skip
    scored = Scored(np.asarray(rewards, np.float32), {}, np.ones(len(lengths), bool))
    batch, logprobs = to_batch(rollout, 1, grown(Layout(groups=1, length=4), rollout, 1))
    batch["weights"] *= np.asarray(kept, np.float32)[:, None, None]
    return Experience(rollout, batch, logprobs, scored, np.arange(len(lengths)), 1)


def measured(rows):
    rng = np.random.default_rng(2)
    names = ("logprobs", "ref_logprobs", "values")
    return {name: rng.normal(size=(rows, 4)).astype(np.float32) for name in names}


def weigh(name, found, numbers):
    if name == "grpo":
        objective = AlgorithmConfig(algorithm="reinforce_pp").objective()
        return grpo.weigh(objective, found, numbers, {})[0]
    settings = dataclasses.replace(ppo.PpoConfig(), whiten_rewards=True)
    return ppo.weigh(settings, found, numbers, {"kl_coef": 0.05})[0]


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_completions_left_out_do_not_change_the_advantages_of_others(name):
    numbers = measured(4)
    lengths, rewards, kept = [3, 4, 2, 1], [1.0, 0.0, 50.0, 0.5], [1, 1, 0, 1]
    with_all = weigh(name, experience(lengths, rewards, kept), numbers)["advantages"]
    some = [i for i in range(4) if kept[i]]
    fewer = experience([lengths[i] for i in some], [rewards[i] for i in some], [1, 1, 1])
    without = weigh(name, fewer, {key: value[some] for key, value in numbers.items()})["advantages"]
    inside = fewer.learnt > 0
    assert np.abs(with_all[some][inside] - without[inside]).max() < 1e-5
    assert np.abs(without[inside]).max() > 0.1


def test_groups_are_taken_whole_and_in_the_order_asked():
    found = experience([1, 2, 3, 4], [0.0, 1.0, 2.0, 3.0], [1] * 4)
    rollout, indices, scored = take_groups((found.rollout, found.indices, found.scored), np.asarray([1, 0]), 2)
    assert [len(completion) for completion in rollout.completions] == [3, 4, 1, 2]
    assert indices.tolist() == [2, 3, 0, 1] and scored.total.tolist() == [2.0, 3.0, 0.0, 1.0]
