"""train.dpo as people run it: from a run of SFT, killed and started again, with and without a cached reference."""

import json
import random

import pytest
from stages import SHAPE, execute, finished, kill_after, measured, stage_command

from minillm_jax.tokenizer import train_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = "40"
NOUNS = ("cat", "dog", "house", "tree", "river", "stone")
HELD_OUT = ["--valid_fraction", "0.1"]
DPO = ["--learning_rate", "5e-3", "--dropout", "0.1", "--steps", STEPS]


def turns(noun, answer):
    return [{"role": "user", "content": f"say {noun}"}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with conversations, pairs of a kind and a rude answer, a tokenizer, and a run of SFT on them."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    with (folder / "sft.jsonl").open("w") as chats, (folder / "dpo.jsonl").open("w") as pairs:
        for _ in range(80):
            noun = " ".join(rng.choices(NOUNS, k=rng.randint(1, 4)))
            kind, rude = f"gladly: {noun}", f"go away: {noun}"
            chats.write(json.dumps({"conversations": turns(noun, rng.choice([kind, rude]))}) + "\n")
            pairs.write(json.dumps({"chosen": turns(noun, kind), "rejected": turns(noun, rude)}) + "\n")
    texts = [json.loads(line)["chosen"][-1]["content"] for line in (folder / "dpo.jsonl").open()]
    train_tokenizer(texts, 280).save(folder / "tokenizer")
    start = ["--tokenizer_path", str(folder / "tokenizer"), *SHAPE]
    for name, flags in (("sft", []), ("moe", ["--use_moe"])):
        finished(run(folder, "sft", folder / name, *start, *flags, "--steps", "20", "--learning_rate", "1e-2"))
    return folder


def command(corpus, stage, out_dir, *flags):
    return stage_command(f"train.{stage}", corpus / f"{stage}.jsonl", out_dir, *HELD_OUT, *flags)


def run(corpus, stage, out_dir, *flags):
    return execute(corpus, command(corpus, stage, out_dir, *flags))


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """A run that nothing disturbed."""
    out_dir = tmp_path_factory.mktemp("reference") / "run"
    finished(run(corpus, "dpo", out_dir, "--model_path", str(corpus / "sft"), *DPO))
    return out_dir


def test_dpo_starts_at_ln_2_and_learns_to_prefer_held_out_answers(reference):
    rows = measured(reference)
    first = next(row for row in rows if "loss" in row)
    last = [row for row in rows if "valid_loss" in row][-1]
    assert first["step"] == 1 and first["loss"] == pytest.approx(0.6931, abs=0.05)  # dropout moves it a little
    assert first.keys() >= {"rewards_chosen", "rewards_rejected", "margin", "accuracy", "logps_chosen",
                            "logps_rejected", "kl"}  # fmt: skip
    assert last["valid_accuracy"] >= 0.9
    assert last["valid_margin"] > 0


def test_a_run_killed_again_and_again_measures_what_an_undisturbed_one_does(corpus, reference, tmp_path):
    rng, flags = random.Random(1), ["--model_path", str(corpus / "sft"), *DPO]
    for step in (1, 12, 24):
        words = command(corpus, "dpo", tmp_path / "run", *flags)
        kill_after(corpus, words, tmp_path / "run", step, delay=rng.random() * 0.05)
    finished(run(corpus, "dpo", tmp_path / "run", *flags))
    assert measured(tmp_path / "run") == measured(reference)


def test_an_online_reference_measures_what_a_cached_one_does(corpus, reference, tmp_path):
    flags = ["--model_path", str(corpus / "sft"), *DPO, "--reference", "online"]
    finished(run(corpus, "dpo", tmp_path / "run", *flags))
    assert not (tmp_path / "run" / "reference.npz").exists()
    for ours, theirs in zip(measured(tmp_path / "run"), measured(reference), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("loss_type", ["simpo", "orpo"])
def test_losses_without_a_reference_need_none(corpus, tmp_path, loss_type):
    flags = ["--model_path", str(corpus / "sft"), "--steps", "4", "--loss_type", loss_type]
    finished(run(corpus, "dpo", tmp_path / "run", *flags))
    assert not (tmp_path / "run" / "reference.npz").exists()
    assert "kl" not in measured(tmp_path / "run")[0]


def test_eight_devices_measure_what_one_does(corpus, tmp_path):
    flags = ["--model_path", str(corpus / "moe"), "--steps", "4", "--accumulation_steps", "2"]
    finished(run(corpus, "dpo", tmp_path / "alone", *flags))
    spread = command(corpus, "dpo", tmp_path / "mesh", "--mesh", "data=2,fsdp=2,tensor=2", *flags)
    finished(execute(corpus, spread, timeout=800, XLA_FLAGS="--xla_force_host_platform_device_count=8"))
    for ours, theirs in zip(measured(tmp_path / "mesh"), measured(tmp_path / "alone"), strict=True):
        if ours["step"] == 1:  # policy and reference are the same: rounding alone says which margins are positive
            del ours["accuracy"], theirs["accuracy"]
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert measured(tmp_path / "alone")[0]["router_loss"] > 0


def test_what_cannot_work_is_refused_in_one_line(corpus, tmp_path):
    result = run(corpus, "dpo", tmp_path / "run")
    assert result.returncode == 2 and "--model_path is needed" in result.stderr
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"chosen": turns("cat", "cat"), "rejected": turns("cat", "cat")}) + "\n")
    flags = ["--data_path", str(bad), "--model_path", str(corpus / "sft")]
    result = run(corpus, "dpo", tmp_path / "run", *flags)
    assert result.returncode == 2 and f"{bad}:1: rejected: is the same as chosen" in result.stderr
    assert "Traceback" not in result.stderr
