"""Stages as people run them: real commands in real processes, killed, interrupted, damaged and started again."""

import json
import random
import signal
import subprocess
import time

import pytest
from stages import SHAPE, environment, execute, finished, kill_after, logged_step, measured, stage_command

from minillm_jax.tokenizer import train_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = "60"  # enough to be killed in the middle
WORDS = ("the", "a", "cat", "dog", "sees", "finds", "red", "blue", "house", "tree", "and", "under", "small", "old")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with raw text, conversations and a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    sentence = lambda: " ".join(rng.choices(WORDS, k=rng.randint(4, 40)))
    with (folder / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": sentence()}) + "\n" for _ in range(200))
    with (folder / "chat.jsonl").open("w") as file:
        for _ in range(100):
            word = rng.choice(WORDS)
            turns = [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]
            file.write(json.dumps({"conversations": turns}) + "\n")
    train_tokenizer([sentence() for _ in range(100)], 300).save(folder / "tokenizer")
    return folder


def command(corpus, stage, out_dir, *flags):
    start = ["--tokenizer_path", str(corpus / "tokenizer"), *SHAPE] if "--model_path" not in flags else []
    data = corpus / ("text.jsonl" if stage == "pretrain" else "chat.jsonl")
    return stage_command(f"train.{stage}", data, out_dir, *start, *flags)


def run(corpus, stage, out_dir, *flags):
    return execute(corpus, command(corpus, stage, out_dir, *flags))


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """A run that nothing disturbed."""
    out_dir = tmp_path_factory.mktemp("reference") / "run"
    finished(run(corpus, "pretrain", out_dir, "--steps", STEPS, "--dropout", "0.1"))
    return out_dir


def test_a_run_leaves_what_the_readme_promises(reference):
    names = {path.name for path in reference.iterdir()}
    assert {"config.json", "checkpoints", "tokenizer", "metrics.jsonl", "curves.png"} <= names
    rows = measured(reference)
    assert [row["step"] for row in rows if "loss" in row] == [1, *range(2, int(STEPS) + 1, 2)]
    assert rows[-1].keys() >= {"step", "valid_loss"} or rows[-2].keys() >= {"step", "valid_loss"}
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]


def test_a_run_killed_again_and_again_measures_what_an_undisturbed_one_does(corpus, reference, tmp_path):
    rng = random.Random(1)
    for step in (6, 20, 34):
        words = command(corpus, "pretrain", tmp_path / "run", "--steps", STEPS, "--dropout", "0.1")
        kill_after(corpus, words, tmp_path / "run", step, delay=rng.random() * 0.05)
    finished(run(corpus, "pretrain", tmp_path / "run", "--steps", STEPS, "--dropout", "0.1"))
    assert measured(tmp_path / "run") == measured(reference)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_a_second_start_goes_on(corpus, reference, tmp_path, signum):
    process = subprocess.Popen(
        command(corpus, "pretrain", tmp_path / "run", "--steps", STEPS, "--dropout", "0.1", "--save_interval", "1000"),
        env=environment(corpus), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while logged_step(tmp_path / "run") < 6 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signum, output
    assert "start again to go on from here" in output
    output = finished(run(corpus, "pretrain", tmp_path / "run", "--steps", STEPS, "--dropout", "0.1")).stdout
    assert "resuming" in output
    training = lambda folder: [row for row in measured(folder) if "loss" in row]
    assert training(tmp_path / "run") == training(reference)


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(corpus, reference, tmp_path):
    out_dir = tmp_path / "run"
    finished(run(corpus, "pretrain", out_dir, "--steps", STEPS, "--dropout", "0.1", "--keep", "3"))
    newest = max((out_dir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    result = finished(run(corpus, "pretrain", out_dir, "--steps", STEPS, "--dropout", "0.1", "--keep", "3"))
    assert f"{newest.name}" in result.stdout
    assert "after step 57 of 60" in result.stdout
    assert measured(out_dir) == measured(reference)


@pytest.mark.parametrize("flags", [(), ("--use_moe", "--optimizer", "muon")], ids=["dense", "moe_muon"])
def test_eight_devices_measure_what_one_does(corpus, tmp_path, flags):
    alone, mesh = tmp_path / "alone", tmp_path / "mesh"
    finished(run(corpus, "pretrain", alone, "--steps", "4", *flags))
    spread = command(corpus, "pretrain", mesh, "--steps", "4", "--mesh", "data=2,fsdp=2,tensor=2", *flags)
    finished(execute(corpus, spread, timeout=800, XLA_FLAGS="--xla_force_host_platform_device_count=8"))
    for ours, theirs in zip(measured(mesh), measured(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_sft_starts_from_a_run_and_learns_the_answers(corpus, reference, tmp_path):
    result = finished(
        run(
            corpus, "sft", tmp_path / "sft", "--model_path", str(reference), "--steps", "60", "--learning_rate", "1e-2",
            "--sample_interval", "30",
        )
    )  # fmt: skip
    losses = [row["loss"] for row in measured(tmp_path / "sft") if "loss" in row]
    assert losses[-1] < 0.6 * losses[0]
    assert "step 30 sample" in result.stdout


def test_moe_pretraining_reports_its_router(corpus, tmp_path):
    finished(run(corpus, "pretrain", tmp_path / "moe", "--steps", "6", "--use_moe", "--accumulation_steps", "2"))
    row = next(row for row in measured(tmp_path / "moe") if "loss" in row)
    assert row["router_loss"] > 0
    assert 0.25 <= row["expert_load_max"] <= 1.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hidden_size", "24"], "holds a run with hidden_size = 16"),
        (["--seed", "7"], "holds a run with seed = 42"),
        (["--batch_size", "8"], "holds a run with batch_size = 4"),
    ],
)
def test_resuming_with_other_settings_is_refused(corpus, reference, flags, message):
    result = run(corpus, "pretrain", reference, "--steps", STEPS, "--dropout", "0.1", *flags)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_shape_that_contradicts_the_checkpoint_is_refused(corpus, reference, tmp_path):
    result = run(corpus, "sft", tmp_path / "sft", "--model_path", str(reference), "--num_hidden_layers", "5")
    assert result.returncode == 2
    assert "--num_hidden_layers 5 contradicts" in result.stderr


def test_a_bad_row_stops_the_run_before_training(corpus, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": 3}\n')
    result = run(corpus, "pretrain", tmp_path / "run", "--data_path", str(bad))
    assert result.returncode == 2
    assert f"{bad}:2: text: " in result.stderr


def test_a_folder_that_is_no_run_is_never_touched(corpus, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    for flags in ([], ["--overwrite"]):
        assert run(corpus, "pretrain", tmp_path / "run", *flags).returncode == 2
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"
