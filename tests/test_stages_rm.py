"""rl.train_rm as people run it: from a run of SFT, killed and started again, spread over devices, taken elsewhere."""

import json
import random

import numpy as np
import pytest
from stages import execute, finished, kill_after, measured, stage_command
from test_stages_dpo import corpus, turns

import minillm_jax as mj
from minillm_jax.chat import render
from minillm_jax.reward import reward_scores

__all__ = ["corpus"]  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RM = ["--learning_rate", "5e-3", "--dropout", "0.1", "--steps", "60"]


def command(corpus, out_dir, *flags):
    return stage_command("rl.train_rm", corpus / "dpo.jsonl", out_dir, "--valid_fraction", "0.2", *flags)


def run(corpus, out_dir, *flags):
    return execute(corpus, command(corpus, out_dir, *flags))


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """A run that nothing disturbed, and what it printed last."""
    out_dir = tmp_path_factory.mktemp("reference") / "run"
    result = finished(run(corpus, out_dir, "--model_path", str(corpus / "sft"), *RM))
    return out_dir, json.loads(result.stdout.splitlines()[-1])


def test_a_reward_model_starts_at_ln_2_and_learns_to_order_held_out_answers(reference):
    out_dir, report = reference
    first = next(row for row in measured(out_dir) if "loss" in row)
    assert first["step"] == 1 and first["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert first.keys() >= {"rewards_chosen", "rewards_rejected", "margin", "accuracy", "longer_accuracy", "brier"}
    assert report == json.loads((out_dir / "report.json").read_text())
    assert report["accuracy"] > 0.9 and report["margin"] > 0 and report["rows"] >= 10
    assert report["brier"] < 0.25


def test_a_run_killed_again_and_again_measures_what_an_undisturbed_one_does(corpus, reference, tmp_path):
    rng, flags = random.Random(1), ["--model_path", str(corpus / "sft"), *RM]
    for step in (1, 24):
        words = command(corpus, tmp_path / "run", *flags)
        kill_after(corpus, words, tmp_path / "run", step, delay=rng.random() * 0.05)
    result = finished(run(corpus, tmp_path / "run", *flags))
    assert measured(tmp_path / "run") == measured(reference[0])
    assert json.loads(result.stdout.splitlines()[-1]) == reference[1]


@pytest.mark.parametrize("adapter", [[], ["--lora_rank", "2"]], ids=["full", "adapter"])
def test_eight_devices_measure_what_one_does(corpus, tmp_path, adapter):
    flags = ["--model_path", str(corpus / "moe"), "--steps", "4", "--accumulation_steps", "2", *adapter]
    flags += ["--batch_size", "8"]  # a report reads this many pairs at once, over all devices
    alone = finished(run(corpus, tmp_path / "alone", *flags))
    spread = command(corpus, tmp_path / "mesh", "--mesh", "data=2,fsdp=2,tensor=2", *flags)
    mesh = finished(execute(corpus, spread, timeout=800, XLA_FLAGS="--xla_force_host_platform_device_count=8"))
    for ours, theirs in zip(measured(tmp_path / "mesh"), measured(tmp_path / "alone"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert measured(tmp_path / "alone")[0]["router_loss"] > 0
    reports = [json.loads(result.stdout.splitlines()[-1]) for result in (mesh, alone)]
    assert reports[0] == pytest.approx(reports[1], rel=1e-3, abs=1e-4)


def test_a_run_is_loaded_exported_and_judged_again(corpus, reference, tmp_path):
    out_dir, _ = reference
    lm = mj.load(out_dir)
    mj.export_hf(lm, tmp_path / "hf")
    back = mj.load(tmp_path / "hf")
    kind, rude = (render(lm.tokenizer, turns("stone", f"{words}: stone")).token_ids for words in ("gladly", "go away"))
    for model in (lm, back):
        scores = [float(reward_scores(model.params, model.config, np.asarray([ids]))[0]) for ids in (kind, rude)]
        assert scores[0] > scores[1]
    for path in (out_dir, tmp_path / "hf"):
        words = [*command(corpus, "")[:2], "train.evaluate", "--task", "pairs", "--max_seq_len", "96"]
        words += ["--data_path", str(corpus / "dpo.jsonl"), "--model_path", str(path)]
        found = json.loads(finished(execute(corpus, words)).stdout.splitlines()[-1])
        assert found["rows"] == 80 and found["accuracy"] > 0.9
    finished(run(corpus, tmp_path / "further", "--model_path", str(tmp_path / "hf"), "--steps", "2"))


def test_what_cannot_work_is_refused_in_one_line(corpus, reference, tmp_path):
    result = run(corpus, tmp_path / "run")
    assert result.returncode == 2 and "--model_path is needed" in result.stderr
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"chosen": turns("cat", "a"), "rejected": turns("cat", "b"), "margin": "1"}) + "\n")
    result = run(corpus, tmp_path / "run", "--data_path", str(bad), "--model_path", str(corpus / "sft"))
    assert result.returncode == 2 and f"{bad}:1: margin: must be a number, not a string" in result.stderr
    words = stage_command("train.sft", corpus / "sft.jsonl", tmp_path / "sft", "--model_path", str(reference[0]))
    result = execute(corpus, words)
    assert result.returncode == 2 and "holds a reward model, where a language model is needed" in result.stderr
    assert "Traceback" not in result.stderr
