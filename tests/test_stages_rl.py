"""rl.grpo and rl.ppo as people run them: from a run of SFT, killed inside rollouts and started again."""

import json
import random

import pytest
from stages import execute, finished, kill_after, measured, stage_command
from test_stages_dpo import corpus

import minillm_jax as mj

__all__ = ["corpus"]  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RL = ["--reward", "regex", "--reward_pattern", "gladly", "--max_new_tokens", "16", "--valid_fraction", "0.2",
      "--learning_rate", "1e-2", "--log_interval", "1", "--max_kl", "100"]  # fmt: skip
STAGES = {
    "rl.grpo": ["--num_generations", "4", "--algorithm", "dapo", "--steps", "12"],
    "rl.ppo": ["--batch_size", "16", "--target_kl", "4", "--missing_eos_penalty", "0.5", "--steps", "24"],
}


@pytest.fixture(scope="module")
def prompts(corpus):
    path = corpus / "prompts.jsonl"
    nouns = ("cat", "dog", "house", "tree", "river", "stone")
    path.write_text("".join(json.dumps({"prompt": f"say {a} {b}"}) + "\n" for a in nouns for b in nouns))
    return path


def command(corpus, prompts, stage, out_dir):
    model = ["--model_path", str(corpus / "sft")]
    return stage_command(stage, prompts, out_dir, *model, *RL, *STAGES[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_inside_rollouts_measures_what_an_undisturbed_one_does(corpus, prompts, stage, tmp_path):
    finished(execute(corpus, command(corpus, prompts, stage, tmp_path / "whole")))
    rng, words = random.Random(1), command(corpus, prompts, stage, tmp_path / "killed")
    for step in (1, 8):
        kill_after(corpus, words, tmp_path / "killed", step, delay=rng.random() * 0.2)
    finished(execute(corpus, words))
    assert measured(tmp_path / "killed") == measured(tmp_path / "whole")
    rewards = [row["reward"] for row in measured(tmp_path / "whole") if "reward" in row]
    assert sum(rewards[-3:]) > sum(rewards[:3])
    assert mj.load(tmp_path / "whole").tokenizer.vocab_size > 256


def test_a_policy_is_judged_by_a_reward_model_that_was_trained_here(corpus, prompts, tmp_path):
    pairs = stage_command("rl.train_rm", corpus / "dpo.jsonl", tmp_path / "rm", "--valid_fraction", "0.2")
    flags = ["--learning_rate", "5e-3", "--steps", "60", "--model_path", str(corpus / "sft")]
    finished(execute(corpus, [*pairs, *flags]))
    flags = ["--model_path", str(corpus / "sft"), "--reward_model_path", str(tmp_path / "rm"), "--batch_size", "16"]
    rest = ["--max_new_tokens", "16", "--valid_fraction", "0.2", "--learning_rate", "1e-2", "--log_interval", "1"]
    finished(execute(corpus, stage_command("rl.ppo", prompts, tmp_path / "ppo", *flags, *rest, "--steps", "24")))
    rows = [row for row in measured(tmp_path / "ppo") if "reward/model" in row]
    assert rows[-1]["reward/model"] > rows[0]["reward/model"]
    assert rows[-1]["kl"] < 1.0 and rows[0]["value"] != 0  # the critic starts from the reward model
