"""Adapters as people train them: real commands in real processes, killed, resumed, spread over devices, merged."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from test_stages import command, corpus, environment, finished, logged_step, measured, run

import minillm_jax as mj

__all__ = ["corpus"]  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = "60"
ADAPTER = ["--lora_rank", "4", "--lora_dropout", "0.1", "--learning_rate", "2e-2"]


def fine_tune(corpus, out_dir, base, *flags):
    return command(corpus, "sft_lora", out_dir, "--model_path", str(base), "--steps", STEPS, *ADAPTER, *flags)


def lora(corpus, *arguments):
    """Run `python -m minillm_jax.lora`."""
    words = [sys.executable, "-m", "minillm_jax.lora", *map(str, arguments)]
    return subprocess.run(words, env=environment(corpus), capture_output=True, text=True, timeout=800)


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("base") / "run"
    finished(run(corpus, "pretrain", out_dir, "--steps", "40", "--learning_rate", "2e-2"))
    return out_dir


@pytest.fixture(scope="module")
def reference(corpus, base):
    """A run of an adapter that nothing disturbed."""
    out_dir = base.parent / "adapter"
    words = fine_tune(corpus, out_dir, base, "--sample_interval", "30")
    result = finished(subprocess.run(words, env=environment(corpus), capture_output=True, text=True, timeout=800))
    assert "step 30 sample" in result.stdout
    return out_dir


def test_an_adapter_learns_and_stores_nothing_else(reference, base):
    losses = [row["loss"] for row in measured(reference) if "loss" in row]
    assert losses[-1] < 0.95 * losses[0]
    newest = max((reference / "checkpoints").iterdir(), key=lambda path: int(path.name))
    arrays = json.loads((newest / "metadata.json").read_text())["arrays"]
    assert arrays
    assert all(name.startswith(("params.layers.", "opt_state.")) or name in ("step", "key") for name in arrays)
    assert {name.rsplit(".", 1)[1] for name in arrays if name.startswith("params.")} == {"a", "b"}
    assert json.loads((newest / "adapter.json").read_text())["base"] == str(base / "checkpoints" / "40")


def test_an_adapters_run_killed_again_and_again_measures_what_an_undisturbed_one_does(
    corpus, base, reference, tmp_path
):
    rng = random.Random(1)
    shutil.copytree(base, tmp_path / "base")
    words = fine_tune(corpus, tmp_path / "run", tmp_path / "base")
    for attempt, target in enumerate([6, 24]):
        process = subprocess.Popen(words, env=environment(corpus), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while logged_step(tmp_path / "run") < target and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"attempt {attempt} ended before it could be killed"
        if attempt == 0:  # a base that is trained further does not change under its adapter
            shutil.copytree(tmp_path / "base/checkpoints/40", tmp_path / "base/checkpoints/41")
            shutil.rmtree(tmp_path / "base/checkpoints/41/state")
    finished(subprocess.run(words, env=environment(corpus), capture_output=True, text=True, timeout=800))
    assert measured(tmp_path / "run") == measured(reference)


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_eight_devices_train_the_adapter_that_one_does(corpus, tmp_path, use_moe):
    base, alone, mesh = tmp_path / "base", tmp_path / "alone", tmp_path / "mesh"
    finished(run(corpus, "pretrain", base, "--steps", "2", *(["--use_moe"] if use_moe else [])))
    start = ["--model_path", str(base), "--steps", "4", "--lora_rank", "2"]
    finished(run(corpus, "sft_lora", alone, *start))
    env = environment(corpus) | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    spread = command(corpus, "sft_lora", mesh, *start, "--mesh", "data=2,fsdp=2,tensor=2")
    finished(subprocess.run(spread, env=env, capture_output=True, text=True, timeout=800))
    for ours, theirs in zip(measured(mesh), measured(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_an_adapters_run_is_merged_exported_imported_and_trained_further(corpus, reference, base, tmp_path):
    finished(lora(corpus, "merge", "--model_path", reference, "--out_dir", tmp_path / "merged"))
    finished(lora(corpus, "export", "--model_path", reference, "--to", tmp_path / "peft"))
    again = ["import", "--from", tmp_path / "peft", "--model_path", base, "--out_dir", tmp_path / "again"]
    finished(lora(corpus, *again))
    logits = [
        np.asarray(mj.forward(lm.params, lm.config, [[1, 5, 7, 9]]))
        for lm in (mj.load(path) for path in (reference, tmp_path / "merged", tmp_path / "again"))
    ]
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[0], logits[2])
    finished(run(corpus, "sft", tmp_path / "further", "--model_path", str(reference), "--steps", "2"))
    finished(run(corpus, "sft_lora", tmp_path / "second", "--model_path", str(reference), "--steps", "2"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_rank", "0"], "--lora_rank 0 trains no adapter"),
        (["--lora_targets", "query"], "query names no projection of this model; it has mlp.down_proj, mlp"),
        (["--lora_dropout", "2"], "lora_dropout must lie in"),
    ],
)
def test_settings_that_cannot_work_stop_the_run_before_training(corpus, base, tmp_path, flags, message):
    result = run(corpus, "sft_lora", tmp_path / "run", "--model_path", str(base), *flags)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_an_adapter_needs_a_base(corpus, tmp_path):
    result = run(corpus, "sft", tmp_path / "run", "--lora_rank", "4")
    assert result.returncode == 2
    assert "--lora_rank needs --model_path" in result.stderr
