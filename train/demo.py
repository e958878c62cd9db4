"""The whole chain on built-in data, in one command: from raw text to a chat model that was rewarded for being right.

Tokenizer → pretrain → SFT → preferences and an adapter beside it → reward model → PPO → GRPO → report.

    make demo            # or: python -m train.demo --out_dir out/demo

Every step runs the same command that a person would type, and prints it. A step that was finished before is not done
again, so an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from minillm_jax.chat import render
from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import parse_cli
from minillm_jax.data import builtin
from minillm_jax.lm import generate, load
from minillm_jax.metrics import read_metrics
from minillm_jax.sampling import SamplingParams
from train.demo_report import Preferences, StepRecord, write_report

CONSOLE = Console(highlight=False)
PAIRS, HELDOUT_PAIRS, NEW_SKILL, HELDOUT_NEW_SKILL, PROMPTS = 500, 140, 800, 60, 10_000
"""Rows of the preference step, of the adapter step, and of reinforcement learning."""
LIVE_QUESTIONS = (
    "Hello!",
    "What is 17 + 5?",
    "Which is larger: 41 or 14?",
    "Sort these numbers: 9, 2, 4",
    "What is the last word: apple, moon, tree",
    'Spell backwards: "t-a-r"',
)


@dataclass(frozen=True)
class DemoConfig:
    """Settings of the demo."""

    out_dir: str = "out/demo"
    """Where data, runs and the report go."""
    seed: int = 0
    """Seed of data and training."""
    questions: int = 1400
    """Held-out questions."""


@dataclass(frozen=True)
class Scale:
    """How large the demo is on one kind of machine."""

    shape: tuple[str, ...]
    pretrain: tuple[str, ...]
    sft: tuple[str, ...]
    dpo: tuple[str, ...]
    lora: tuple[str, ...]
    rm: tuple[str, ...]
    ppo: tuple[str, ...]
    grpo: tuple[str, ...]
    conversations: int
    vocab_size: int


# Small models learn these tasks several times faster with Muon, and with rotary frequencies made for short texts.
FAST = ("--optimizer", "muon", "--learning_rate", "5e-3", "--schedule", "wsd", "--decay_ratio", "0.5")
RL = ("--max_seq_len", "128", "--max_new_tokens", "24", "--valid_fraction", "0", "--eval_interval", "0")
CPU = Scale(
    shape=(
        "--hidden_size", "128", "--num_hidden_layers", "3", "--num_attention_heads", "4",
        "--rope_theta", "1e4", "--initializer_range", "0.08",
    ),
    pretrain=("--steps", "250", "--batch_size", "8", "--max_seq_len", "256", *FAST),
    sft=("--steps", "2500", "--batch_size", "4", "--max_seq_len", "256", "--min_lr_ratio", "0.03", *FAST),
    # Preferences pull a little; the SFT term keeps right answers likely while wrong ones are pushed away.
    dpo=("--steps", "24", "--batch_size", "16", "--max_seq_len", "128", "--learning_rate", "3e-4", "--sft_weight", "1"),
    lora=("--steps", "40", "--batch_size", "4", "--max_seq_len", "256", "--learning_rate", "1e-2", "--lora_rank", "8"),
    rm=("--steps", "60", "--batch_size", "16", "--max_seq_len", "128", "--learning_rate", "1e-3"),
    ppo=("--steps", "32", "--batch_size", "128", *RL, "--learning_rate", "2e-4"),
    grpo=("--steps", "16", "--batch_size", "24", *RL, "--learning_rate", "3e-4", "--algorithm", "dapo"),
    conversations=30_000,
    vocab_size=2048,
)  # fmt: skip
ACCELERATOR = Scale(
    shape=(),
    pretrain=("--steps", "1500", "--batch_size", "64", "--max_seq_len", "512"),
    sft=("--steps", "3000", "--batch_size", "32", "--max_seq_len", "256"),
    dpo=("--steps", "300", "--batch_size", "64", "--max_seq_len", "128", "--sft_weight", "1"),
    lora=("--steps", "200", "--batch_size", "32", "--max_seq_len", "256", "--lora_rank", "8"),
    rm=("--steps", "300", "--batch_size", "64", "--max_seq_len", "128", "--learning_rate", "1e-4"),
    ppo=("--steps", "200", "--batch_size", "256", *RL, "--learning_rate", "3e-5"),
    grpo=("--steps", "100", "--batch_size", "64", *RL, "--learning_rate", "3e-5", "--algorithm", "dapo"),
    conversations=400_000,
    vocab_size=6400,
)


@dataclass
class Demo:
    """The chain: runs commands, keeps what each took and said."""

    config: DemoConfig
    scale: Scale
    steps: list[StepRecord] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return Path(self.config.out_dir)

    def run(self, title: str, module: str, *flags: str, produces: Path | None = None) -> dict[str, Any]:
        """Run one stage as a person would; returns the JSON object that it printed last, if it did.

        Raises:
            SystemExit: the stage failed; its own message is on the screen.
        """
        command = ["python", "-m", module, *flags]
        CONSOLE.rule(f"[bold]{title}")
        CONSOLE.print("$ " + shlex.join(command), style="dim", soft_wrap=True)
        began = time.perf_counter()
        capture = produces is None
        done = subprocess.run([sys.executable, *command[1:]], stdout=subprocess.PIPE if capture else None, text=True)
        if done.returncode:
            sys.exit(done.returncode)
        self.steps.append(StepRecord(title, shlex.join(command), time.perf_counter() - began, produces))
        return json.loads(done.stdout.splitlines()[-1]) if capture else {}

    def prepare_data(self) -> None:
        """Write the built-in data: documentation for pretraining, conversations for SFT, held-out questions."""
        CONSOLE.rule("[bold]built-in data")
        began = time.perf_counter()
        size = builtin.write_pretrain(self.folder / "pretrain.jsonl", exercise_pages=1500, seed=self.config.seed)
        builtin.write_sft(self.folder / "sft.jsonl", self.scale.conversations, self.config.seed)
        builtin.write_eval(self.folder / "heldout.jsonl", self.config.questions, self.config.seed)
        builtin.write_preferences(self.folder / "pairs.jsonl", PAIRS, self.config.seed, "train")
        builtin.write_preferences(self.folder / "heldout_pairs.jsonl", HELDOUT_PAIRS, self.config.seed, "heldout")
        builtin.write_prompts(self.folder / "prompts.jsonl", PROMPTS, self.config.seed)
        builtin.write_new_skill(self.folder / "new_skill.jsonl", NEW_SKILL, self.config.seed)
        builtin.write_eval(
            self.folder / "heldout_new_skill.jsonl", HELDOUT_NEW_SKILL, self.config.seed, builtin.NEW_FAMILIES
        )
        CONSOLE.print(
            f"{size / 1e6:.1f} MB of Python documentation and exercises, {self.scale.conversations:,} conversations, "
            f"{self.config.questions:,} held-out questions that no conversation contains"
        )
        self.steps.append(StepRecord("built-in data", "", time.perf_counter() - began, None))

    def evaluate(self, title: str, model: str, questions: str = "heldout.jsonl") -> dict[str, Any]:
        """Exact match on held-out questions."""
        result = self.run(
            title, "train.evaluate", "--model_path", str(self.folder / model),
            "--data_path", str(self.folder / questions), "--task", "exact", "--max_new_tokens", "24",
        )  # fmt: skip
        CONSOLE.print(f"exact match: [bold]{result['accuracy']:.1%}[/] of {result['rows']:,} held-out questions")
        return result

    def chain(self) -> None:
        """Run everything."""
        folder, scale, seed = self.folder, self.scale, str(self.config.seed)
        self.prepare_data()
        self.run(
            "tokenizer", "train.tokenizer", "--data_path", str(folder / "pretrain.jsonl"), str(folder / "sft.jsonl"),
            "--vocab_size", str(scale.vocab_size), "--out_dir", str(folder / "tokenizer"),
            produces=folder / "tokenizer",
        )  # fmt: skip
        self.run(
            "pretrain", "train.pretrain", "--data_path", str(folder / "pretrain.jsonl"),
            "--tokenizer_path", str(folder / "tokenizer"), "--out_dir", str(folder / "pretrain"),
            *scale.shape, *scale.pretrain, "--seed", seed, produces=folder / "pretrain",
        )  # fmt: skip
        before = self.evaluate("evaluation before SFT", "pretrain")
        self.run(
            "SFT", "train.sft", "--data_path", str(folder / "sft.jsonl"), "--model_path", str(folder / "pretrain"),
            "--out_dir", str(folder / "sft"), *scale.sft, "--seed", seed, produces=folder / "sft",
        )  # fmt: skip
        after = self.evaluate("evaluation after SFT", "sft")
        preferences = self.prefer()
        skill = self.adapt()
        accuracies = {"before SFT": before, "SFT": after, **self.reinforce()}
        CONSOLE.rule("[bold]a few live answers")
        answers = live_answers(folder / "grpo")
        for question, answer in answers:
            CONSOLE.print(f"[bold]you[/]    {question}\n[bold cyan]model[/]  {answer}", soft_wrap=True)
        report = write_report(folder, self.steps, accuracies, answers, preferences, skill)
        shown = ", ".join(f"{name} [bold green]{found['accuracy']:.1%}[/]" for name, found in accuracies.items())
        CONSOLE.rule("[bold]done")
        CONSOLE.print(
            f"exact match on held-out questions: {shown}\nreport: {report}\nchat with it: {chat_command(folder)}",
            soft_wrap=True,
        )

    def prefer(self) -> Preferences:
        """Learn from pairs of a right and a wrong answer, and look at held-out pairs and questions."""
        folder = self.folder
        self.run(
            "preferences", "train.dpo", "--data_path", str(folder / "pairs.jsonl"),
            "--valid_path", str(folder / "heldout_pairs.jsonl"), "--model_path", str(folder / "sft"),
            "--out_dir", str(folder / "dpo"), *self.scale.dpo, "--seed", str(self.config.seed), produces=folder / "dpo",
        )  # fmt: skip
        rows = [row for row in read_metrics(folder / "dpo") if "valid_accuracy" in row]
        found = Preferences(HELDOUT_PAIRS, rows[-1]["valid_accuracy"], rows[-1]["valid_margin"])
        CONSOLE.print(f"the right answer is preferred in [bold]{found.accuracy:.1%}[/] of {found.pairs} held-out pairs")
        return found

    def adapt(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Teach an adapter a kind of question that SFT never asked; exact match on held-out ones before and after."""
        folder, questions = self.folder, "heldout_new_skill.jsonl"
        before = self.evaluate("a new skill, before the adapter", "sft", questions)
        self.run(
            "adapter", "train.sft_lora", "--data_path", str(folder / "new_skill.jsonl"),
            "--model_path", str(folder / "sft"), "--out_dir", str(folder / "lora"), *self.scale.lora,
            "--seed", str(self.config.seed), produces=folder / "lora",
        )  # fmt: skip
        return before, self.evaluate("a new skill, with the adapter", "lora", questions)

    def reinforce(self) -> dict[str, dict[str, Any]]:
        """Go on from SFT: a reward model, PPO with it and with right answers, then GRPO; exact match after each."""
        folder, scale, seed = self.folder, self.scale, ("--seed", str(self.config.seed))
        prompts = ("--data_path", str(folder / "prompts.jsonl"))
        self.run(
            "reward model", "rl.train_rm", "--data_path", str(folder / "pairs.jsonl"),
            "--valid_path", str(folder / "heldout_pairs.jsonl"), "--model_path", str(folder / "sft"),
            "--out_dir", str(folder / "rm"), *scale.rm, *seed, produces=folder / "rm",
        )  # fmt: skip
        self.run(
            "PPO", "rl.ppo", *prompts, "--model_path", str(folder / "sft"), "--out_dir", str(folder / "ppo"),
            "--reward", "exact", "model:0.1", "--reward_model_path", str(folder / "rm"), *scale.ppo, *seed,
            produces=folder / "ppo",
        )  # fmt: skip
        ppo = self.evaluate("evaluation after PPO", "ppo")
        self.run(
            "GRPO", "rl.grpo", *prompts, "--model_path", str(folder / "ppo"), "--out_dir", str(folder / "grpo"),
            "--reward", "exact", *scale.grpo, *seed, produces=folder / "grpo",
        )  # fmt: skip
        return {"PPO": ppo, "GRPO": self.evaluate("evaluation after GRPO", "grpo")}


def chat_command(folder: Path) -> str:
    """The command to talk to the model."""
    python = Path(sys.executable)
    shown = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    return f"{shown} -m serve.chat --model_path {folder / 'grpo'}"


def live_answers(model: Path) -> list[tuple[str, str]]:
    """Ask the model a few questions, greedily."""
    lm = load(model)
    prompts = [
        render(lm.tokenizer, [{"role": "user", "content": q}], add_generation_prompt=True).token_ids
        for q in LIVE_QUESTIONS
    ]
    completions = generate(lm, prompts, SamplingParams(max_new_tokens=32, temperature=0.0))
    return [(q, c.text.strip()) for q, c in zip(LIVE_QUESTIONS, completions, strict=True)]


def main() -> int:
    """Run the demo; returns the exit status."""
    with user_errors():
        config = parse_cli(DemoConfig, str(__doc__))
        setup_jax()
        on_cpu = jax.default_backend() == "cpu"
        Demo(config, CPU if on_cpu else ACCELERATOR).chain()
    return 0


if __name__ == "__main__":
    sys.exit(main())
