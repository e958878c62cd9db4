"""Advantages: tables worked out by hand, masks, equal rewards, and the tracker's arithmetic."""

import json
from typing import get_args

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.advantages import (
    BASELINES,
    BetaTracker,
    explained_variance,
    gae,
    kl_shaped_rewards,
    returns_to_go,
    single_stream,
    whiten,
)
from rl.losses import Baseline

NAN = np.nan
# A prompt before an end in the middle; a completion cut at the limit; one token; none at all.
MASK = np.asarray([[0, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], np.float32)
NUMBERS = st.floats(-8, 8, width=32)
jit_gae = jax.jit(gae, static_argnames=("gamma", "lam"))


def rows(seed, shape=(4, 4)):
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def spoiled(array):
    """The array with NaN wherever the mask is 0."""
    return np.where(MASK > 0, array, NAN).astype(np.float32)


def test_gae_by_hand():
    rewards = np.asarray([[9, 0, 1, 9], [0, 0, 0, 2], [3, 9, 9, 9], [9, 9, 9, 9]], np.float32)
    values = np.asarray([[9, 1, 2, 9], [1, 1, 1, 1], [1, 9, 9, 9], [9, 9, 9, 9]], np.float32)
    advantages, returns = gae(rewards, values, MASK, gamma=0.5, lam=0.5)
    # Row 0: δ = 0 + ½·2 - 1 = 0, then 1 - 2 = -1. Row 1: δ = -½, -½, -½, 1.
    expected = [[0, -0.25, -1, 0], [-0.640625, -0.5625, -0.25, 1], [2, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(advantages, expected, atol=1e-6)
    np.testing.assert_allclose(returns, np.asarray(expected) + values * MASK, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(NUMBERS, min_size=32, max_size=32))
def test_gae_without_discount_or_bootstrap_is_the_return_less_the_value(numbers):
    rewards, values = np.asarray(numbers, np.float32).reshape(2, 4, 4)
    advantages, returns = jit_gae(rewards, values, MASK, gamma=1.0, lam=1.0)
    to_go = returns_to_go(rewards, MASK)
    np.testing.assert_allclose(advantages, to_go - values * MASK, atol=1e-4)
    np.testing.assert_allclose(returns, to_go, atol=1e-4)


def test_gae_with_lambda_0_is_one_temporal_difference():
    rewards, values = rows(0), rows(1)
    advantages, _ = gae(rewards, values, MASK, gamma=0.9, lam=0.0)
    np.testing.assert_allclose(advantages[1, 2], rewards[1, 2] + 0.9 * values[1, 3] - values[1, 2], rtol=1e-5)
    np.testing.assert_allclose(advantages[0, 2], rewards[0, 2] - values[0, 2], rtol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: gae(x, y, MASK, gamma=0.9, lam=0.8),
        lambda x, y: whiten(x, MASK),
        lambda x, y: whiten(x, MASK, shift_mean=False),
        lambda x, y: kl_shaped_rewards(np.arange(4, dtype=np.float32), x, MASK, 0.1),
        lambda x, y: returns_to_go(x, MASK),
    ],
    ids=["gae", "whiten", "whiten-scale", "kl_shaped_rewards", "returns_to_go"],
)
def test_what_is_masked_out_is_never_read_and_comes_out_0(function):
    x, y = rows(0), rows(1)
    for clean, dirty in zip(
        jax.tree.leaves(function(x, y)), jax.tree.leaves(function(spoiled(x), spoiled(y))), strict=True
    ):
        np.testing.assert_array_equal(clean, dirty)
        assert clean.dtype == np.float32
        assert not np.any(np.asarray(clean)[MASK == 0])


def test_whitened_tokens_have_zero_mean_and_unit_variance():
    x = rows(2) * 3 + 5
    inside = np.asarray(whiten(x, MASK))[MASK > 0]
    np.testing.assert_allclose([inside.mean(), inside.std(ddof=1)], [0, 1], atol=1e-5)
    scaled = np.asarray(whiten(x, MASK, shift_mean=False))[MASK > 0]
    np.testing.assert_allclose(scaled, inside + x[MASK > 0].mean(), rtol=1e-5)


def test_whitening_what_does_not_vary_gives_exactly_its_mean():
    same = np.full((4, 4), 0.1, np.float32)
    assert not np.any(whiten(same, MASK))
    np.testing.assert_allclose(whiten(same, MASK, shift_mean=False), 0.1 * MASK, rtol=1e-6)
    assert not np.any(whiten(same, np.zeros_like(MASK)))


def test_the_score_stands_at_the_last_token():
    kl = np.ones((4, 4), np.float32)
    found = kl_shaped_rewards(np.asarray([5, 6, 7, 8], np.float32), kl, MASK, 0.5)
    expected = [[0, -0.5, 4.5, 0], [-0.5, -0.5, -0.5, 5.5], [6.5, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(found, expected)


def test_returns_to_go_by_hand():
    rewards = np.asarray([[9, 1, 2, 9], [1, 2, 3, 4], [5, 9, 9, 9], [9, 9, 9, 9]], np.float32)
    expected = [[0, 3, 2, 0], [10, 9, 7, 4], [5, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(returns_to_go(rewards, MASK), expected)


def test_explained_variance():
    returns = spoiled(rows(3))
    assert explained_variance(returns, returns, MASK) == 1
    np.testing.assert_allclose(explained_variance(np.ones((4, 4)), returns, MASK), 0, atol=1e-6)
    np.testing.assert_allclose(explained_variance(-returns, returns, MASK), -3, rtol=1e-5)
    assert explained_variance(returns, np.ones((4, 4)), MASK) == 0


REWARDS = np.asarray([[0, 0, 1, 1], [0.1, 0.1, 0.1, 0.1], [1, 2, 3, 6]], np.float32)


def test_group_baselines_by_hand():
    d, e = 3**-0.5 + 1e-4, (14 / 3) ** 0.5 + 1e-4  # unbiased deviations of 0 0 1 1 and 1 2 3 6
    expected = {
        "mean": [[-0.5, -0.5, 0.5, 0.5], [0] * 4, [-2, -1, 0, 3]],
        "group": [[-0.5 / d, -0.5 / d, 0.5 / d, 0.5 / d], [0] * 4, [-2 / e, -1 / e, 0, 3 / e]],
        "leave_one_out": [[-2 / 3, -2 / 3, 2 / 3, 2 / 3], [0] * 4, [1 - 11 / 3, 2 - 10 / 3, 0, 4]],
        "batch": (REWARDS - REWARDS.mean()) / REWARDS.std(ddof=1),
        "group_batch": np.asarray([[-0.5, -0.5, 0.5, 0.5], [0] * 4, [-2, -1, 0, 3]]) / (15 / 11) ** 0.5,
        "none": REWARDS,
    }  # fmt: skip
    assert set(expected) == set(BASELINES)
    for name in ("mean", "group", "leave_one_out", "group_batch"):
        assert not np.any(BASELINES[name](REWARDS)[1]), name
    for name, advantages in expected.items():
        np.testing.assert_allclose(BASELINES[name](REWARDS), np.asarray(advantages), rtol=1e-5, atol=1e-6, err_msg=name)


def test_every_baseline_of_the_command_line_is_one_of_the_table():
    assert set(get_args(Baseline)) == {*BASELINES, "spo"}


@settings(max_examples=25, deadline=None)
@given(NUMBERS, st.integers(1, 7))
def test_groups_of_equal_rewards_teach_exactly_nothing(reward, completions):
    rewards = np.full((2, completions), reward, np.float32)
    for name in ("group", "mean", "batch", "group_batch"):
        assert not np.any(BASELINES[name](rewards)), name
    assert completions == 1 or not np.any(BASELINES["leave_one_out"](rewards))


def test_a_group_of_one_has_no_baseline():
    rewards = np.asarray([[1.0], [3.0]], np.float32)
    for name in ("group", "mean", "group_batch"):
        assert not np.any(BASELINES[name](rewards)), name
    np.testing.assert_array_equal(BASELINES["leave_one_out"](rewards), rewards)
    np.testing.assert_allclose(BASELINES["batch"](rewards), [[-(0.5**0.5)], [0.5**0.5]], rtol=1e-6)


def test_the_tracker_forgets_and_adds():
    tracker = BetaTracker.create(3)
    np.testing.assert_allclose(tracker.value(np.asarray([0, 2])), [0.5, 0.5])
    # At the half life ρ is ½; a policy that stands still keeps at most 0.96; one that ran away keeps 0.3 here.
    after = tracker.update(
        np.asarray([0, 1, 2]), np.asarray([1, 0, 0.5]), np.asarray([0.1, 0.0, 9.0]), half_life=0.1, low=0.3
    )
    np.testing.assert_allclose(after.alpha, [3, 3.84, 1.7])
    np.testing.assert_allclose(after.beta, [2, 4.84, 1.7])
    np.testing.assert_allclose(after.value(np.asarray([0])), [0.6])
    np.testing.assert_array_equal(tracker.alpha, [4, 4, 4])


def test_a_prompt_that_occurs_twice_is_updated_twice():
    tracker, one = BetaTracker.create(2), np.asarray([1])
    both = tracker.update(np.asarray([1, 1]), np.asarray([1, 0]), np.asarray([0.01, 0.02]))
    in_turn = tracker.update(one, np.asarray([1]), np.asarray([0.01])).update(one, np.asarray([0]), np.asarray([0.02]))
    np.testing.assert_array_equal(both.alpha, in_turn.alpha)
    np.testing.assert_array_equal(both.beta, in_turn.beta)


def test_the_tracker_survives_json_exactly():
    tracker = BetaTracker.create(2, value=0.3).update(np.asarray([0]), np.asarray([0.1]), np.asarray([0.03]))
    back = BetaTracker.from_json(json.loads(json.dumps(tracker.to_json())))
    np.testing.assert_array_equal(back.alpha, tracker.alpha)
    np.testing.assert_array_equal(back.beta, tracker.beta)


@pytest.mark.parametrize("reward", [-0.1, 1.1, NAN])
def test_the_tracker_refuses_rewards_that_are_no_success(reward):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        BetaTracker.create(1).update(np.asarray([0]), np.asarray([reward]), np.asarray([0.0]))


def test_single_stream_advantages_are_surprises_whitened_over_the_batch():
    rewards, values = np.asarray([1, 0, 1], np.float32), np.asarray([0.5, 0.5, 0.9], np.float32)
    surprise = rewards - values
    np.testing.assert_allclose(
        single_stream(rewards, values), (surprise - surprise.mean()) / surprise.std(ddof=1), rtol=1e-5
    )
