"""Does a teacher help? One student trained on labels alone and one distilled, step by step on the same rows.

    python benchmarks/distill.py --data_path corpus.jsonl --out_dir out/distill --picture docs/distill.png

It runs the stages themselves: a tokenizer, a teacher, and two students that differ in nothing but `--alpha`; runs that
are there already are resumed. The last line printed is one JSON object with the held-out losses; the picture shows them
over steps. The defaults take some 15 minutes on two CPU cores.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from minillm_jax.cli import user_errors
from minillm_jax.config import ConfigError, parse_cli

ROWS = ["--max_seq_len", "256", "--batch_size", "8", "--valid_fraction", "0.02"]
HEADS = ["--num_attention_heads", "4", "--num_key_value_heads", "2"]
TEACHER = ["--hidden_size", "192", "--num_hidden_layers", "3", *HEADS, "--learning_rate", "2e-3"]
STUDENT = ["--hidden_size", "64", "--num_hidden_layers", "2", *HEADS, "--eval_interval", "50"]


@dataclass(frozen=True)
class DistillBenchmark:
    """What is compared, on what."""

    data_path: str
    """Raw text, {"text"} rows."""
    out_dir: str
    """Folder of the runs."""
    picture: str | None = None
    """Where to draw the held-out losses."""
    vocab_size: int = 2048
    """Tokens of the vocabulary."""
    teacher_steps: int = 900
    """Steps of the teacher."""
    student_steps: int = 600
    """Steps of each student."""
    learning_rate: float = 4e-3
    """Of both students."""
    optimizer: str = "adamw"
    """Of both students."""
    alpha: float = 0.5
    """Weight of the labels in the distilled student's loss."""
    temperature: float = 1.0
    """Of the distilled student's loss."""


def run_stage(stage: str, *flags: str) -> None:
    """Run a stage and show its command.

    Raises:
        ConfigError: it failed.
    """
    command = ["-m", f"train.{stage}", *flags]
    print(shlex.join(["python", *command]), flush=True)
    if subprocess.run([sys.executable, *command]).returncode:
        raise ConfigError(f"train.{stage} failed; see above")


def held_out(run: Path) -> list[tuple[int, float]]:
    """Read steps and held-out losses of a run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["valid_loss"]) for row in rows if "valid_loss" in row]


def draw(curves: dict[str, list[tuple[int, float]]], teacher: float, path: Path) -> None:
    """Draw held-out losses over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{name}: {points[-1][1]:.3f}")
    axes.axhline(teacher, color="grey", linestyle=":", label=f"teacher: {teacher:.3f}")
    axes.set(xlabel="step", ylabel="held-out cross-entropy, nats per token", title="The same student, the same steps")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> int:
    """Train, compare, print; returns the exit status."""
    with user_errors():
        config = parse_cli(DistillBenchmark, str(__doc__))
        out, data, began = Path(config.out_dir), ["--data_path", config.data_path], time.perf_counter()
        tokenizer, teacher = str(out / "tokenizer"), str(out / "teacher")
        if not (out / "tokenizer" / "tokenizer.json").is_file():
            run_stage("tokenizer", *data, "--out_dir", tokenizer, "--vocab_size", str(config.vocab_size))
        steps = ["--steps", str(config.teacher_steps)]
        run_stage("pretrain", *data, "--tokenizer_path", tokenizer, "--out_dir", teacher, *ROWS, *TEACHER, *steps)
        common = [*data, "--tokenizer_path", tokenizer, *ROWS, *STUDENT, "--steps", str(config.student_steps)]
        common += ["--learning_rate", str(config.learning_rate), "--optimizer", config.optimizer]
        run_stage("pretrain", "--out_dir", str(out / "labels"), *common)
        objective = ["--alpha", str(config.alpha), "--temperature", str(config.temperature)]
        run_stage("distill", "--teacher_path", teacher, "--out_dir", str(out / "distilled"), *common, *objective)
        curves = {"labels alone": held_out(out / "labels"), "distilled": held_out(out / "distilled")}
        goal = held_out(out / "teacher")[-1][1]
        if config.picture is not None:
            draw(curves, goal, Path(config.picture))
        losses = {name.replace(" ", "_"): points[-1][1] for name, points in curves.items()}
        seconds = round(time.perf_counter() - began)
        print(json.dumps({"benchmark": "distill", "teacher": goal, **losses, "seconds": seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
