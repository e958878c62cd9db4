"""What tests of stages share: commands of real processes, how they are killed, and what they measured."""

import json
import os
import signal
import subprocess
import sys
import time

SHAPE = ["--hidden_size", "16", "--num_hidden_layers", "2", "--num_attention_heads", "2", "--num_key_value_heads", "1"]
RUN = [
    "--batch_size",
    "4",
    "--max_seq_len",
    "96",
    "--log_interval",
    "2",
    "--eval_interval",
    "5",
    "--save_interval",
    "3",
]
CLOCK = {"tokens_per_second", "mfu", "rollout_tokens_per_second", "rollout_seconds", "update_seconds"}
"""Metrics that depend on the machine."""


def environment(corpus):
    """The environment of a user: compiled with all optimisations, caches kept apart."""
    env = dict(os.environ, MINILLM_CACHE=str(corpus / "cache"), PYTHONUNBUFFERED="1")
    return {name: value for name, value in env.items() if name != "JAX_DISABLE_MOST_OPTIMIZATIONS"}


def stage_command(stage, data_path, out_dir, *flags):
    """The command of a stage such as `train.sft`."""
    return [sys.executable, "-m", stage, "--data_path", str(data_path), "--out_dir", str(out_dir), *RUN, *flags]


def execute(corpus, words, timeout=280, **env):
    return subprocess.run(words, env=environment(corpus) | env, capture_output=True, text=True, timeout=timeout)


def finished(result):
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def measured(out_dir):
    """What training measured, without what the clock says."""
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


def logged_step(out_dir):
    try:
        return measured(out_dir)[-1]["step"]
    except (OSError, IndexError, ValueError):
        return 0


def kill_after(corpus, words, out_dir, step, delay=0.0):
    """Start a command and kill it `delay` seconds after it has logged a step."""
    process = subprocess.Popen(
        words, env=environment(corpus), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while logged_step(out_dir) < step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, f"the run ended before it could be killed at step {step}"
