"""The stages of distillation as people run them: real commands in real processes, killed and started again."""

import json
import random
import signal
import subprocess
import time

import pytest
from test_stages import SHAPE, WORDS, command, corpus, environment, finished, logged_step, measured, run  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = "32"  # enough to be killed twice in the middle
LARGER = ["--hidden_size", "32"]


@pytest.fixture(scope="module")
def traces(corpus):  # noqa: F811
    """Reasoning traces that a tiny model can learn: the answer is the last word of the question."""
    rng = random.Random(0)
    path = corpus / "traces.jsonl"
    with path.open("w") as file:
        for _ in range(300):
            words = rng.choices(WORDS, k=3)
            reply = f"<think>\nlast of {' '.join(words)}\n</think>\n<answer>\n{words[-1]}\n</answer>"
            turns = [{"role": "user", "content": " ".join(words)}, {"role": "assistant", "content": reply}]
            file.write(json.dumps({"conversations": turns}) + "\n")
    return path


@pytest.fixture(scope="module")
def teacher(corpus, tmp_path_factory):  # noqa: F811
    """A pretrained mixture of experts, wider than its students."""
    out_dir = tmp_path_factory.mktemp("teacher") / "run"
    rarely = ["--save_interval", "100", "--eval_interval", "0"]
    finished(run(corpus, "pretrain", out_dir, "--steps", "10", "--use_moe", *LARGER, *rarely))
    return out_dir


def distill_flags(corpus, teacher):  # noqa: F811
    return ["--teacher_path", str(teacher), "--data_path", str(corpus / "text.jsonl"), "--steps", STEPS]


def reason_flags(traces):
    return ["--data_path", str(traces), "--steps", STEPS, "--report_rows", "4", "--report_max_new_tokens", "16"]


def killed(corpus, stage, out_dir, flags, target):  # noqa: F811
    """Start a stage and kill it when it has logged a step."""
    process = subprocess.Popen(
        command(corpus, stage, out_dir, *flags),
        env=environment(corpus), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while logged_step(out_dir) < target and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"


def check_resuming(corpus, stage, tmp_path, flags):  # noqa: F811
    finished(run(corpus, stage, tmp_path / "whole", *flags))
    for target in (6, 16):
        killed(corpus, stage, tmp_path / "killed", flags, target)
    finished(run(corpus, stage, tmp_path / "killed", *flags))
    assert measured(tmp_path / "killed") == measured(tmp_path / "whole")


@pytest.mark.parametrize(
    "more",
    [[], ["--teacher_top_k", "8", "--temperature", "2"], ["--on_policy", "0.5", "--dropout", "0.1"]],
    ids=["on_the_fly", "stored", "on_policy"],
)
def test_a_distillation_killed_again_and_again_measures_what_an_undisturbed_one_does(
    corpus,  # noqa: F811
    teacher,
    tmp_path,
    more,
):
    check_resuming(corpus, "distill", tmp_path, [*distill_flags(corpus, teacher), *more])
    rows = [row for row in measured(tmp_path / "whole") if "loss" in row]
    assert rows[-1].keys() >= {"loss", "divergence", "total_loss"}
    assert rows[-1]["divergence"] < rows[0]["divergence"]
    assert (tmp_path / "whole" / "teacher" / "train" / "ids.npy").exists() == ("--teacher_top_k" in more)


@pytest.mark.parametrize("more", [[], ["--teacher_top_k", "8"]], ids=["on_the_fly", "stored"])
def test_eight_devices_measure_what_one_does(corpus, teacher, tmp_path, more):  # noqa: F811
    flags = [*distill_flags(corpus, teacher), *more, "--steps", "4"]
    finished(run(corpus, "distill", tmp_path / "alone", *flags))
    env = environment(corpus) | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    spread = command(corpus, "distill", tmp_path / "mesh", *flags, "--mesh", "data=2,fsdp=2,tensor=2")
    finished(subprocess.run(spread, env=env, capture_output=True, text=True, timeout=800))
    for ours, theirs in zip(measured(tmp_path / "mesh"), measured(tmp_path / "alone"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_reasoning_killed_again_and_again_measures_what_an_undisturbed_run_does(corpus, traces, tmp_path):  # noqa: F811
    flags = reason_flags(traces)
    check_resuming(corpus, "distill_reason", tmp_path, flags)
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "killed")]
    assert reports[0] == reports[1]


def test_a_model_learns_the_form_of_reasoning_and_reports_it(corpus, traces, tmp_path):  # noqa: F811
    result = finished(
        run(
            corpus, "distill_reason", tmp_path / "run", "--data_path", str(traces), "--steps", "300",
            "--learning_rate", "1e-2", "--valid_fraction", "0.1", "--report_max_new_tokens", "64",
            "--system_prompt", "Think first.", "--eval_interval", "100", "--save_interval", "100",
        )
    )  # fmt: skip
    report = json.loads(result.stdout.splitlines()[-1])
    assert report == json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["rows"] == report["rows_with_answer"] >= 10
    assert report["well_formed"] >= 0.9
    assert "Think first." in (tmp_path / "run" / "tokenizer" / "tokenizer_config.json").read_text()


def test_conversations_are_distilled_from_a_hugging_face_folder(corpus, teacher, tmp_path):  # noqa: F811
    student = tmp_path / "student"
    finished(run(corpus, "sft", tmp_path / "sft", "--steps", "6", *LARGER))
    subprocess.run(
        [*command(corpus, "sft", "")[:1], "-c", EXPORT, str(tmp_path / "sft"), str(tmp_path / "hf")], check=True,
        env=environment(corpus),
    )  # fmt: skip
    finished(run(corpus, "distill", student, "--teacher_path", str(tmp_path / "hf"), "--steps", "6"))
    assert all("divergence" in row for row in measured(student) if "loss" in row)


EXPORT = "import sys, minillm_jax as mj; mj.export_hf(mj.load(sys.argv[1]), sys.argv[2])"


@pytest.mark.parametrize("stage", ["distill", "distill_reason"])
def test_a_bad_row_stops_the_run_before_training(corpus, teacher, tmp_path, stage):  # noqa: F811
    bad = tmp_path / "bad.jsonl"
    good = {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    bad.write_text(json.dumps(good) + '\n{"conversations": [{"role": "user", "content": 3}]}\n')
    more = ["--teacher_path", str(teacher)] if stage == "distill" else []
    result = run(corpus, stage, tmp_path / "run", "--data_path", str(bad), *more)
    assert result.returncode == 2
    assert f"{bad}:2: conversations[0].content: " in result.stderr
    assert "Traceback" not in result.stderr


def test_a_teacher_of_another_vocabulary_is_refused(corpus, teacher, tmp_path):  # noqa: F811
    result = run(corpus, "distill", tmp_path / "run", *distill_flags(corpus, teacher), "--vocab_size", "512")
    assert result.returncode == 2
    assert "and the student one of 512" in result.stderr


def test_resuming_with_another_teacher_or_loss_is_refused(corpus, teacher, tmp_path):  # noqa: F811
    flags = [*distill_flags(corpus, teacher), "--steps", "2"]
    finished(run(corpus, "distill", tmp_path / "run", *flags))
    result = run(corpus, "distill", tmp_path / "run", *flags, "--alpha", "0.9")
    assert result.returncode == 2
    assert "holds a run with alpha = 0.5" in result.stderr
