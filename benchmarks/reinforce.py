"""Does reinforcement learning learn? GRPO and PPO from one SFT model on the built-in tasks, for several seeds.

    python benchmarks/reinforce.py --out_dir out/rl

It runs the stages themselves: a tokenizer, a pretraining that meets the tasks as solved exercises, an SFT run that is
stopped after a few steps, when answers only begin to have the form of answers, and from there GRPO and PPO with the
exact-match reward; runs that are there already are resumed. One JSON line per run says what share of held-out questions
is answered exactly before and after, and how long it took. About half an hour for three seeds of each on two CPU cores.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm_jax.cli import user_errors
from minillm_jax.config import ConfigError, parse_cli
from minillm_jax.data import builtin

SHAPE = ("--hidden_size", "128", "--num_hidden_layers", "3", "--num_attention_heads", "4", "--rope_theta", "1e4",
         "--initializer_range", "0.08")  # fmt: skip
# Small steps, and many of them: half of the groups say nothing, and Muon would follow the noise of the rest.
SHARED = ("--steps", "500", "--batch_size", "32", "--num_generations", "8", "--minibatches", "4",
          "--optimizer", "muon", "--learning_rate", "4e-4", "--schedule", "wsd", "--decay_ratio", "0.5",
          "--min_lr_ratio", "0.05")  # fmt: skip
SETTINGS = {
    "grpo": (*SHARED, "--algorithm", "dapo", "--sampling_rounds", "1"),
    "ppo": (*SHARED, "--update_epochs", "1", "--shared_trunk", "--kl_coef", "0"),
}


@dataclass(frozen=True)
class RlBenchmark:
    """What is run."""

    out_dir: str
    """Folder of data and runs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the prompts' order and of all samples."""
    algorithms: tuple[str, ...] = ("grpo", "ppo")
    """Any of grpo and ppo."""
    sft_steps: int = 20
    """Steps after which SFT is stopped."""


def run_stage(stage: str, *flags: str) -> str:
    """Run a stage, show its command, and return its last line.

    Raises:
        ConfigError: it failed.
    """
    print(shlex.join(["python", "-m", stage, *flags]), flush=True)
    done = subprocess.run([sys.executable, "-m", stage, *flags], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ConfigError(f"{stage} failed; see above")
    return done.stdout.splitlines()[-1]


def accuracy(folder: Path, model: str) -> float:
    """Share of held-out questions that a model answers exactly."""
    flags = ["--model_path", str(folder / model), "--data_path", str(folder / "heldout.jsonl"), "--task", "exact"]
    found: dict[str, Any] = json.loads(run_stage("train.evaluate", *flags, "--max_new_tokens", "24"))
    return float(found["accuracy"])


def prepare(folder: Path, sft_steps: int) -> None:
    """Make data, tokenizer and the SFT model to start from."""
    builtin.write_pretrain(folder / "pretrain.jsonl", max_bytes=1_200_000, exercise_pages=8000, seed=5)
    builtin.write_sft(folder / "sft.jsonl", 30_000, 0)
    builtin.write_prompts(folder / "prompts.jsonl", 20_000, 0)
    builtin.write_eval(folder / "heldout.jsonl", 700, 0)
    text, chats, tokenizer = (str(folder / name) for name in ("pretrain.jsonl", "sft.jsonl", "tokenizer"))
    base, sft = str(folder / "pretrain"), str(folder / "sft")
    rows = ("--max_seq_len", "256", "--optimizer", "muon", "--eval_interval", "0")
    run_stage("train.tokenizer", "--data_path", text, chats, "--vocab_size", "2048", "--out_dir", tokenizer)
    run_stage("train.pretrain", "--data_path", text, "--tokenizer_path", tokenizer, "--out_dir", base,
              *SHAPE, *rows, "--steps", "1400", "--batch_size", "6", "--learning_rate", "5e-3",
              "--schedule", "wsd", "--decay_ratio", "0.5")  # fmt: skip
    run_stage("train.sft", "--data_path", chats, "--model_path", base, "--out_dir", sft,
              *rows, "--steps", str(sft_steps), "--batch_size", "4", "--learning_rate", "2e-3",
              "--schedule", "constant")  # fmt: skip


def main() -> int:
    """Run all; returns the exit status."""
    with user_errors():
        config = parse_cli(RlBenchmark, str(__doc__))
        folder = Path(config.out_dir)
        prepare(folder, config.sft_steps)
        before = accuracy(folder, "sft")
        for algorithm in config.algorithms:
            for seed in config.seeds:
                name, began = f"{algorithm}_{seed}", time.perf_counter()
                run_stage(
                    f"rl.{algorithm}", "--data_path", str(folder / "prompts.jsonl"), "--valid_fraction", "0",
                    "--model_path", str(folder / "sft"), "--out_dir", str(folder / name), "--reward", "exact",
                    "--max_seq_len", "128", "--max_new_tokens", "24", "--eval_interval", "0", "--save_interval", "1000",
                    "--seed", str(seed), *SETTINGS[algorithm],
                )  # fmt: skip
                seconds, after = time.perf_counter() - began, accuracy(folder, name)
                print(json.dumps({
                    "benchmark": "rl", "algorithm": algorithm, "seed": seed, "before": before, "after": after,
                    "gain": after - before, "seconds": round(seconds, 1),
                }), flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
