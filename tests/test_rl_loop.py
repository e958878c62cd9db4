"""rl.grpo and rl.ppo in small: they learn what is rewarded, go back when health breaks, and keep what they know."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_tokenizers import TOKENIZER

import minillm_jax as mj
from minillm_jax.checkpoint import load_params
from minillm_jax.config import ConfigError, ModelConfig
from minillm_jax.metrics import read_metrics
from minillm_jax.model import init_params
from minillm_jax.run import write_run
from rl import grpo, ppo
from rl.config import RolloutConfig, check_batch
from rl.experience import best_groups
from rl.rewards import Scored
from rl.rollout import Rollout

MODEL = ModelConfig(
    vocab_size=TOKENIZER.vocab_size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    initializer_range=0.2,
).resolved()  # fmt: skip
FLAGS = ["--max_seq_len", "80", "--max_new_tokens", "8", "--batch_size", "4", "--valid_fraction", "0.2",
         "--learning_rate", "1e-2", "--eval_interval", "0", "--max_kl", "100"]  # fmt: skip
REWARDS = """
def letters(prompts, completions, rows):
    return [completion.count("e") / 8 for completion in completions]

def nothing(prompts, completions, rows):
    return [0.0] * len(rows)

def missing(prompts, completions, rows):
    return [float("nan") if "7" in row["prompt"] else 0.5 for row in rows]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with prompts, a model with random weights, and a module of reward functions."""
    (tmp_path / "rewards_of_tests.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"prompt": f"say {i}", "answer": str(i)} for i in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_run(tmp_path / "sft", MODEL, init_params(MODEL, jax.random.key(1)), TOKENIZER, {})
    return tmp_path


@pytest.fixture
def run(folder, monkeypatch):
    """Run a stage in this process; returns its exit status and what it logged."""

    def run(stage, *flags, out="out", reward="rewards_of_tests:letters"):
        paths = ["--data_path", folder / "prompts.jsonl", "--model_path", folder / "sft", "--out_dir", folder / out]
        argv = [stage.__name__, *paths, "--reward", reward, *FLAGS, *flags]
        monkeypatch.setattr(sys, "argv", [str(arg) for arg in argv])
        try:
            return stage.main(), read_metrics(folder / out)
        except SystemExit as stop:
            return stop.code, read_metrics(folder / out)

    return run


def mean_reward(rows, part):
    return np.mean([row["reward"] for row in rows[part]])


def test_grpo_learns_what_is_rewarded(run, folder):
    status, rows = run(grpo, "--steps", "30", "--num_generations", "4", "--eval_interval", "30")
    assert status == 0
    rollouts = [row for row in rows if "reward" in row]
    assert mean_reward(rollouts, slice(-5, None)) > 2 * mean_reward(rollouts, slice(5))
    assert all(row["logprob_gap"] < 1e-4 for row in rollouts)
    assert rollouts[0]["kl"] == pytest.approx(0, abs=1e-6) and rollouts[-1]["kl"] > 0.01
    before, after = (row["valid_reward"] for row in rows if "valid_reward" in row)
    assert after > before
    assert {"zero_variance", "eos_rate", "completion_length", "entropy", "rollout_tokens_per_second"} <= set(
        rollouts[0]
    )
    assert mj.load(folder / "out").config == MODEL


@pytest.mark.parametrize("flags", [[], ["--shared_trunk"]], ids=["critic", "shared_trunk"])
def test_ppo_learns_what_is_rewarded_and_its_critic_to_expect_it(run, folder, flags):
    status, rows = run(ppo, "--steps", "60", "--batch_size", "16", "--kl_coef", "0", *flags)
    assert status == 0
    rollouts = [row for row in rows if "reward" in row]
    first, last = mean_reward(rollouts, slice(3)), mean_reward(rollouts, slice(-3, None))
    assert last > 2 * first
    assert rollouts[0]["value"] == 0  # a new head expects nothing
    assert np.mean([row["value"] for row in rollouts[-3:]]) == pytest.approx(last, rel=0.5)
    params = load_params(folder / "out")[1]
    assert set(params) == set(init_params(MODEL, jax.random.key(0)))  # the critic is no part of the model


def test_the_price_of_divergence_follows_its_target():
    settings = ppo.PpoConfig(kl_coef=0.1, target_kl=5.0, kl_horizon=100.0)
    assert ppo.adapted_kl_coef(settings, 0.1, 5.0, 10) == pytest.approx(0.1)
    assert ppo.adapted_kl_coef(settings, 0.1, 5.5, 10) == pytest.approx(0.1 * 1.01)
    assert ppo.adapted_kl_coef(settings, 0.1, 500.0, 10) == pytest.approx(0.1 * 1.02)  # the error is clipped
    assert ppo.adapted_kl_coef(settings, 0.1, 0.0, 10) == pytest.approx(0.1 * 0.98)
    assert ppo.adapted_kl_coef(ppo.PpoConfig(), 0.1, 500.0, 10) == 0.1


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp",
                                       "reinforce_pp_baseline", "spo"])  # fmt: skip
def test_every_algorithm_takes_steps_that_change_the_policy(run, folder, algorithm):
    rollout = ["--batch_size", "16", "--num_generations", "1"] if algorithm == "spo" else ["--num_generations", "4"]
    status, rows = run(grpo, "--steps", "3", "--algorithm", algorithm, *rollout)
    assert status == 0 and len(rows) == 3
    assert all(np.isfinite(row["loss"]) and (row["grad_norm"] > 0 or row["reward_std"] == 0) for row in rows)
    assert any(row["grad_norm"] > 0 for row in rows)
    assert ("completion_kl" in rows[0]) == (algorithm in ("rloo", "reinforce_pp", "reinforce_pp_baseline"))
    assert ("expected_reward" in rows[0]) == (algorithm == "spo")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "steps"), [(grpo, "40"), (ppo, "160")])
def test_an_adapter_learns_with_its_base_as_the_reference(run, folder, stage, steps):
    status, rows = run(stage, "--steps", steps, "--batch_size", "16", "--lora_rank", "2", "--kl_coef", "0.001")
    assert status == 0 and rows[0]["completion_kl"] == pytest.approx(0, abs=1e-3)
    assert mean_reward(rows, slice(-4, None)) > mean_reward(rows, slice(4))
    assert "q_proj" in mj.load(folder / "out").params["layers"]["self_attn"]


def test_a_reward_that_is_always_zero_changes_nothing_and_says_so(run, folder, capsys):
    flags = ["--steps", "11", "--num_generations", "4", "--kl_coef", "0"]
    status, rows = run(grpo, *flags, reward="rewards_of_tests:nothing")
    assert status == 0
    assert all(row["zero_variance"] == 1 and row["loss"] == 0 and row["grad_norm"] == 0 for row in rows)
    assert "there was nothing to learn" in capsys.readouterr().out
    before, after = (load_params(folder / name)[1] for name in ("sft", "out"))
    assert jax.tree.all(jax.tree.map(lambda a, b: jnp.array_equal(a, b), before, after))


def test_a_reward_that_is_not_finite_stops_the_run_or_is_left_out(run, folder, capsys):
    flags = ["--steps", "8", "--num_generations", "4"]
    status, _ = run(grpo, *flags, reward="rewards_of_tests:missing")
    assert status not in (0, None)
    told = capsys.readouterr().err
    assert re.search(r"prompts\.jsonl:(8|18): --reward rewards_of_tests:missing is nan", told)
    status, rows = run(grpo, *flags, "--on_bad_reward", "skip", out="skipped", reward="rewards_of_tests:missing")
    assert status == 0 and max(row["bad_rewards"] for row in rows) == 4
    assert all(np.isfinite(row["loss"]) for row in rows)


def test_a_broken_bound_goes_back_once_with_a_lower_rate_and_stops_the_second_time(run, folder, capsys):
    flags = ["--steps", "40", "--num_generations", "4", "--save_interval", "5", "--max_kl", "0.05"]
    status, rows = run(grpo, *flags)
    said = capsys.readouterr()
    assert status not in (0, None)
    assert "kl is" in said.out and "going back to the parameters of step" in said.out
    assert "although the run had gone back once" in said.err.replace("\n", " ")
    broken = [i for i, row in enumerate(rows) if row["kl"] > 0.05]
    assert len(broken) == 2 and broken[1] == len(rows) - 1
    before, after = rows[broken[0]], rows[broken[0] + 1]
    assert after["kl"] < before["kl"] and after["step"] == before["step"] + 1
    assert after["learning_rate"] == pytest.approx(before["learning_rate"] / 2)


def test_saved_rollouts_replay_to_the_same_numbers(run, folder):
    flags = ["--steps", "4", "--num_generations", "4"]
    _, rows = run(grpo, *flags, "--save_rollouts")
    row = json.loads((folder / "out" / "rollouts" / "0000000.jsonl").read_text().splitlines()[0])
    assert {"prompt", "completion", "reward", "reward/rewards_of_tests:letters", "token_ids"} <= set(row)
    _, again = run(grpo, *flags, "--replay", folder / "out" / "rollouts", out="again")
    for name in ("loss", "reward", "grad_norm"):
        assert [row[name] for row in again] == [row[name] for row in rows]


def test_prompts_that_leave_no_room_are_refused(run, capsys):
    assert run(grpo, "--max_seq_len", "8")[0] not in (0, None)
    assert "leaves no room for a prompt" in capsys.readouterr().err.replace("\n", " ")


def test_rollouts_split_evenly_or_are_refused_with_a_size_that_would_do():
    assert check_batch(16, RolloutConfig(minibatches=4), 2, 1) == 8
    with pytest.raises(ConfigError, match="use a multiple of 3 for --batch_size"):
        check_batch(4, RolloutConfig(minibatches=3), 1, 1)


def test_dynamic_sampling_prefers_groups_that_teach():
    def part(rewards, first):
        count = len(rewards)
        rollout = Rollout([[first + i] for i in range(count)], [[2]] * count, [[-1.0]] * count, np.ones(count, bool))
        scored = Scored(np.asarray(rewards, np.float32), {"x": np.asarray(rewards, np.float32)}, np.ones(count, bool))
        return rollout, np.arange(first, first + count), scored

    rollout, indices, scored = best_groups([part([0, 0, 0, 1], 0), part([1, 0, 1, 1], 4)], group_size=2, count=2)
    assert indices.tolist() == [2, 3, 4, 5]
    assert [prompt[0] for prompt in rollout.prompts] == [2, 3, 4, 5]
    assert scored.total.tolist() == [0, 1, 1, 0] and scored.components["x"].tolist() == [0, 1, 1, 0]
