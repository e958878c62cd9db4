"""Rollouts: completions depend on seed and prompt alone, end where they should, and come back from disk unchanged."""

import jax
import numpy as np
import pytest

from minillm_jax.config import ModelConfig
from minillm_jax.data import DataError
from minillm_jax.model import init_params
from rl.rollout import read_rollout, rollout_file, sample_rollout, write_rollout

DENSE = ModelConfig(
    vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    initializer_range=0.2,
)  # fmt: skip
EOS = [2, 17, 33, 48]


def random_prompts(rng, count):
    return [rng.integers(3, 61, rng.integers(1, 20)).tolist() for _ in range(count)]


def sample(config, prompts, **settings):
    settings = {"temperature": 0.7, "max_new_tokens": 24, "rows_at_once": 5, "seed": (3, 1)} | settings
    return sample_rollout(init_params(config, jax.random.key(0)), config, prompts, EOS, **settings)


def test_repeated_prompts_get_different_completions_even_across_batches():
    prompt = [5, 6, 7, 8]
    rollout = sample(DENSE, [prompt] * 12, rows_at_once=4)
    assert len({tuple(c) for c in rollout.completions}) >= 10  # two that end at once may be alike


def test_the_seed_decides_everything():
    prompts = random_prompts(np.random.default_rng(1), 6)
    first, again, other = (sample(DENSE, prompts, seed=seed) for seed in ((7, 1), (7, 1), (7, 2)))
    assert first.completions == again.completions and first.logprobs == again.logprobs
    assert first.completions != other.completions


def test_a_completion_ends_with_the_end_token_or_at_the_limit():
    rollout = sample(DENSE, random_prompts(np.random.default_rng(2), 20))
    for completion, finished in zip(rollout.completions, rollout.finished, strict=True):
        assert completion and not set(EOS) & set(completion[:-1])
        assert finished == (completion[-1] in EOS)
        assert finished or len(completion) == 24
    assert 0 < rollout.finished.sum() < 20


def test_a_rollout_is_read_as_it_was_written(tmp_path):
    rollout = sample(DENSE, random_prompts(np.random.default_rng(3), 4))
    path = rollout_file(tmp_path / "rollouts", 17)
    write_rollout(path, rollout, [4, 5, 6, 7], {"reward": [0.0, 1.0, 0.5, 0.0]})
    back, indices = read_rollout(path)
    assert (back.prompts, back.completions, back.logprobs) == (rollout.prompts, rollout.completions, rollout.logprobs)
    assert back.finished.tolist() == rollout.finished.tolist() and indices == [4, 5, 6, 7]


def test_replaying_what_is_not_there_names_the_file(tmp_path):
    with pytest.raises(DataError, match=r"0000003\.jsonl: cannot be replayed"):
        read_rollout(rollout_file(tmp_path, 3))
    rollout_file(tmp_path, 3).write_text('{"index": 1}\n')
    with pytest.raises(DataError, match="is no rollout"):
        read_rollout(rollout_file(tmp_path, 3))
