"""Rollouts: the log-probabilities of sampler and trainer agree, and completions depend on seed and prompt alone."""

import jax
import numpy as np
import pytest

from minillm_jax.cache import BRANCH
from minillm_jax.config import ComputeConfig, ModelConfig
from minillm_jax.data import DataError
from minillm_jax.model import init_params
from rl.policy import completions, read_tokens
from rl.rollout import Rollout, read_rollout, rollout_file, sample_rollout, to_batch, write_rollout

DENSE = ModelConfig(
    vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    initializer_range=0.2,
)  # fmt: skip
MOE = ModelConfig(**{**DENSE.__dict__, "use_moe": True, "num_experts": 4, "num_experts_per_tok": 2})
EOS = [2, 17, 33, 48]


def random_prompts(rng, count):
    return [rng.integers(3, 61, rng.integers(1, 20)).tolist() for _ in range(count)]


def sample(config, prompts, **settings):
    settings = {"temperature": 0.7, "max_new_tokens": 24, "rows_at_once": 5, "seed": (3, 1)} | settings
    return sample_rollout(init_params(config, jax.random.key(0)), config, prompts, EOS, **settings)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_trainer_finds_the_log_probabilities_that_were_sampled_with(config, temperature):
    prompts = random_prompts(np.random.default_rng(0), 13)
    rollout = sample(config, prompts, temperature=temperature)
    batch, logprobs = to_batch(rollout)
    params = init_params(config, jax.random.key(0))
    found = read_tokens(params, config, ComputeConfig(), batch, temperature)[0] * completions(batch["weights"])
    assert np.abs(found - logprobs).max() < 1e-4
    assert len({len(c) for c in rollout.completions}) > 5  # rows of many lengths were padded


def test_a_rollout_is_laid_out_with_completions_as_branches_of_their_prompt():
    rollout = Rollout([[5, 6, 7]] * 2 + [[8]] * 2, [[9, 2], [2], [10, 11, 12, 2], [13, 14]],
                      [[-1.0, -2.0], [-7.0], [-3.0, -4.0, -5.0, -6.0], [-8.0, -9.0]], np.ones(4, bool))  # fmt: skip
    batch, logprobs = to_batch(rollout, group_size=2)
    one, two = 1 + BRANCH, 1 + 2 * BRANCH
    assert batch["tokens"][:, :6].tolist() == [[5, 6, 7, 9, 0, 0], [8, 10, 11, 12, 13, 0]]
    assert batch["segment_ids"][:, :6].tolist() == [[1, 1, 1, one, 0, 0], [1, one, one, one, two, 0]]
    assert batch["positions"][:, :6].tolist() == [[0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 1, 0]]
    assert batch["slots"][..., :4].tolist() == [[[2, 3, 0, 0], [2, 0, 0, 0]], [[0, 1, 2, 3], [0, 4, 0, 0]]]
    assert batch["targets"][..., :4].tolist() == [[[9, 2, 0, 0], [2, 0, 0, 0]], [[10, 11, 12, 2], [13, 14, 0, 0]]]
    assert batch["weights"][..., :4].tolist() == [[[1, 1, 0, 0], [1, 0, 0, 0]], [[1, 1, 1, 1], [1, 1, 0, 0]]]
    assert logprobs[:, :4].tolist() == [[-1, -2, 0, 0], [-7, 0, 0, 0], [-3, -4, -5, -6], [-8, -9, 0, 0]]


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_completions_in_one_row_are_read_as_in_rows_of_their_own(config):
    prompts = [prompt for prompt in random_prompts(np.random.default_rng(5), 3) for _ in range(4)]
    rollout, params = sample(config, prompts), init_params(config, jax.random.key(0))
    together, alone = to_batch(rollout, group_size=4)[0], to_batch(rollout)[0]

    def total(params, batch):
        logprobs = read_tokens(params, config, ComputeConfig(), batch, 0.7)[0]
        return (logprobs * completions(batch["weights"])).sum()

    results = [jax.value_and_grad(total)(params, batch) for batch in (together, alone)]
    (sum_together, grads_together), (sum_alone, grads_alone) = results
    assert float(sum_together) == pytest.approx(float(sum_alone), rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(grads_together), jax.tree.leaves(grads_alone), strict=True):
        assert np.abs(ours - theirs).max() < 1e-4 * max(1.0, np.abs(theirs).max())


def test_repeated_prompts_get_different_completions_even_across_batches():
    prompt = [5, 6, 7, 8]
    rollout = sample(DENSE, [prompt] * 12, rows_at_once=4)
    assert len({tuple(c) for c in rollout.completions}) == 12


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
