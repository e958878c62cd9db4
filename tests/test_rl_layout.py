"""The layout of rollouts: packed rows say of every token what rows of their own say, and the sampler said."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm_jax.cache import BRANCH
from minillm_jax.config import ComputeConfig, ModelConfig
from minillm_jax.model import init_params
from rl.layout import Layout, balanced_order, by_completion, group_sizes, groups_per_row, grown, to_batch
from rl.policy import read_tokens
from rl.rollout import Rollout, sample_rollout

DENSE = ModelConfig(
    vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    initializer_range=0.2,
)  # fmt: skip
MOE = dataclasses.replace(DENSE, use_moe=True, num_experts=4, num_experts_per_tok=2)
EOS = [2, 17, 33, 48]


def sample(config, prompts, temperature=0.7):
    params = init_params(config, jax.random.key(0))
    return sample_rollout(
        params, config, prompts, EOS, temperature=temperature, max_new_tokens=24, rows_at_once=5, seed=(3, 1)
    )


def random_prompts(rng, count, copies=1):
    return [p for _ in range(count) for p in [rng.integers(3, 61, rng.integers(1, 20)).tolist()] * copies]


def laid_out(rollout, group_size=1, groups=1):
    return to_batch(rollout, group_size, grown(Layout(groups=groups), rollout, group_size))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_trainer_finds_the_log_probabilities_that_were_sampled_with(config, temperature):
    rollout = sample(config, random_prompts(np.random.default_rng(0), 12), temperature)
    batch, logprobs = laid_out(rollout, groups=3)
    params = init_params(config, jax.random.key(0))
    found = read_tokens(params, config, ComputeConfig(), batch, temperature)[0] * by_completion(batch["weights"])
    assert np.abs(found - logprobs).max() < 1e-4
    assert len({len(c) for c in rollout.completions}) > 3  # rows of many lengths were padded


def test_groups_share_a_row_with_completions_as_branches_of_their_prompts():
    rollout = Rollout([[5, 6, 7]] * 2 + [[8]] * 2, [[9, 2], [2], [10, 11, 12, 2], [13, 14]],
                      [[-1.0, -2.0], [-7.0], [-3.0, -4.0, -5.0, -6.0], [-8.0, -9.0]], np.ones(4, bool))  # fmt: skip
    batch, logprobs = to_batch(rollout, 2, Layout(groups=2, tokens=10, drawn=10, length=4))
    one, two = BRANCH, 2 * BRANCH
    assert batch["tokens"].tolist() == [[5, 6, 7, 9, 8, 10, 11, 12, 13, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1 + one, 2, 2 + one, 2 + one, 2 + one, 2 + two, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 1, 0]]
    assert batch["states"].tolist() == [[2, 3, 2, 4, 5, 6, 7, 4, 8, 0]]
    assert batch["targets"].tolist() == [[9, 2, 2, 10, 11, 12, 2, 13, 14, 0]]
    assert batch["grid"].tolist() == [[[0, 1, 0, 0], [2, 0, 0, 0], [3, 4, 5, 6], [7, 8, 0, 0]]]
    assert batch["weights"].tolist() == [[[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]]
    assert logprobs.tolist() == [[-1, -2, 0, 0], [-7, 0, 0, 0], [-3, -4, -5, -6], [-8, -9, 0, 0]]


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_completions_in_one_row_are_read_as_in_rows_of_their_own(config):
    rollout = sample(config, random_prompts(np.random.default_rng(5), 4, copies=4))
    params = init_params(config, jax.random.key(0))

    def total(params, batch):
        logprobs = read_tokens(params, config, ComputeConfig(), batch, 0.7)[0]
        return (logprobs * by_completion(batch["weights"])).sum()

    batches = [laid_out(rollout, group_size=4, groups=2)[0], laid_out(rollout)[0]]
    (together, grads), (alone, grads_alone) = (jax.value_and_grad(total)(params, batch) for batch in batches)
    assert float(together) == pytest.approx(float(alone), rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_alone), strict=True):
        assert np.abs(ours - theirs).max() < 1e-4 * max(1.0, np.abs(theirs).max())


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 6))
def test_balanced_rows_hold_every_group_once_and_differ_by_less_than_one_group(sizes, groups):
    sizes = np.asarray((sizes * groups)[: len(sizes) // groups * groups or groups])
    order = balanced_order(sizes, groups)
    assert sorted(order.tolist()) == list(range(len(sizes)))
    totals = sizes[order].reshape(-1, groups).sum(1)
    assert totals.max() - totals.min() <= sizes.max()


@pytest.mark.parametrize(
    ("size", "count", "parts", "expected"),
    [(63, 32, 1, 4), (63, 32, 4, 4), (63, 6, 2, 3), (63, 7, 1, 1), (900, 8, 1, 1)],
)
def test_a_row_takes_as_many_groups_as_fit_and_can_be_shared_out(size, count, parts, expected):
    assert groups_per_row(np.full(count, size), parts) == expected


def test_a_layout_only_grows_and_fits():
    rng, layout = np.random.default_rng(7), Layout(groups=2, length=3)
    for _ in range(5):
        rollout = sample(DENSE, random_prompts(rng, 4, copies=2))
        wider = grown(layout, rollout, 2)
        assert all(new >= old for new, old in zip(dataclasses.astuple(wider), dataclasses.astuple(layout), strict=True))
        read, drawn = group_sizes(rollout, 2)
        batch, _ = to_batch(rollout, 2, wider)
        assert np.count_nonzero(batch["segment_ids"]) == read.sum() and batch["weights"].sum() == drawn.sum()
        layout = wider
