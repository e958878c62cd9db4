"""Does every stage learn in bfloat16 what it learns in float32? Short real runs of each, and their curves side by side.

    python -m benchmarks.stages --out_dir out/stages
    python -m benchmarks.stages --out_dir out/stages --size tiny       # seconds each, for a CPU

Tokenizer, pretraining, SFT, an adapter, DPO, distillation, a reward model, PPO and GRPO run as their commands do, on
the built-in data: first in float32 with full-precision products, then in bfloat16 with the same data and seeds. Both
start from the same float32 model of the stage before, so that differences do not add up over stages, and in bfloat16
PPO and GRPO learn from the completions that the float32 runs drew: with their own they would soon see different data.
One JSON line per stage is appended as soon as it is done; curves.png shows all. The exit status is 1 if a stage fails,
or if its curves are further apart than the tolerance.
"""

from __future__ import annotations

import importlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from benchmarks.common import digits, emit, machine, note
from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import ConfigError, parse_cli
from minillm_jax.data import builtin
from minillm_jax.metrics import read_metrics

PRECISIONS = {"float32": "highest", "bfloat16": None}
"""Dtype of a run → precision of its products of float32: an accelerator's default there would be TF32 or bfloat16."""
TOLERANCE = {"mean": 0.01, "max": 0.05}
"""Largest difference of the curves, relative to the root mean square of the float32 one: over the whole run, and at any
step. An element of bfloat16 is off by up to 0.4 %, a loss averages thousands of them; what the optimizer makes of the
differences in a short run stays in that order, while a broken bfloat16 path (a softmax, norm or loss in too few bits)
shows up in whole per cents from the first steps."""


@dataclass(frozen=True)
class Size:
    """How large the runs are.

    Attributes:
        shape: flags of the model.
        student: flags of the distilled one.
        rows: flags of supervised stages.
        rl: flags of PPO and GRPO.
        steps, rl_steps: optimizer steps of supervised stages, and rollouts of PPO and GRPO.
        vocab_size: of the tokenizer.
        documents: bytes of text.
        conversations, pairs, prompts: rows of data.
    """

    shape: tuple[str, ...]
    student: tuple[str, ...]
    rows: tuple[str, ...]
    rl: tuple[str, ...]
    steps: int
    rl_steps: int
    vocab_size: int
    documents: int
    conversations: int
    pairs: int
    prompts: int


def flags(**values: object) -> tuple[str, ...]:
    """Spell flags: `--name value`."""
    return tuple(word for name, value in values.items() for word in (f"--{name}", str(value)))


SIZES = {
    "full": Size(
        shape=flags(preset="minillm"),
        student=flags(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2),
        rows=flags(batch_size=32, max_seq_len=256),
        rl=flags(batch_size=32, max_seq_len=128, max_new_tokens=24),
        steps=60, rl_steps=10, vocab_size=6400, documents=1_500_000, conversations=20_000, pairs=2000, prompts=2000,
    ),
    "tiny": Size(
        shape=flags(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1),
        student=flags(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1),
        rows=flags(batch_size=4, max_seq_len=96),
        rl=flags(batch_size=4, max_seq_len=96, max_new_tokens=8),
        steps=6, rl_steps=3, vocab_size=512, documents=60_000, conversations=200, pairs=60, prompts=60,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class StagesBenchmark:
    """What is run."""

    out_dir: str
    """Folder of data, runs and the picture; a run that is there already is deleted."""
    size: Literal["full", "tiny"] = "full"
    """full: the default model, some minutes on a GPU; tiny: a model of two layers."""
    stages: tuple[str, ...] = ()
    """Stages to run, by name; none stands for all. Each needs the models of those before it."""
    append: str | None = None
    """File that the lines are appended to as well."""

    def __post_init__(self) -> None:
        """Refuse names that mean nothing."""
        if unknown := sorted(set(self.stages) - {stage.name for stage in STAGES}):
            known = ", ".join(stage.name for stage in STAGES)
            raise ConfigError(f"--stages {' '.join(unknown)}: unknown; choose from {known}")


@dataclass(frozen=True)
class Stage:
    """A stage and its command.

    Attributes:
        name: of its folder and line.
        module: what `python -m` runs.
        flags: made from the folder of all runs and the size.
        curve: the metric that is compared.
        reinforcement: it draws completions, which the bfloat16 run reads instead.
    """

    name: str
    module: str
    flags: Callable[[Path, Size], tuple[str, ...]]
    curve: str = "loss"
    reinforcement: bool = False


def supervised(data: str, **values: object) -> Callable[[Path, Size], tuple[str, ...]]:
    """Make the flags of a supervised stage; values that are paths lie in the folder of all runs."""

    def make(folder: Path, size: Size) -> tuple[str, ...]:
        inside = {name: folder / value if isinstance(value, Path) else value for name, value in values.items()}
        return flags(data_path=folder / data, steps=size.steps, log_interval=1, **inside) + size.rows

    return make


def reinforced(**values: object) -> Callable[[Path, Size], tuple[str, ...]]:
    """Make the flags of a stage that learns from rewards."""

    def make(folder: Path, size: Size) -> tuple[str, ...]:
        inside = {name: folder / value if isinstance(value, Path) else value for name, value in values.items()}
        common = flags(data_path=folder / "prompts.jsonl", model_path=folder / SFT, learning_rate=1e-4, **inside)
        # A step is one minibatch. A model that has hardly learnt anything answers nothing exactly, but writes some e.
        reward = ("--reward", "exact", "regex", "--reward_pattern", "e")
        return (*common, *flags(steps=2 * size.rl_steps, minibatches=2), *reward, *size.rl)

    return make


BASE, SFT = Path("pretrain_float32"), Path("sft_float32")
PRETRAIN = supervised("pretrain.jsonl", tokenizer_path=Path("tokenizer"), learning_rate=1e-3)
DISTILL = supervised("sft.jsonl", teacher_path=SFT, learning_rate=1e-3)
STAGES = (
    Stage("pretrain", "train.pretrain", lambda folder, size: (*PRETRAIN(folder, size), *size.shape)),
    Stage("sft", "train.sft", supervised("sft.jsonl", model_path=BASE, learning_rate=1e-3)),
    Stage("sft_lora", "train.sft_lora", supervised("new_skill.jsonl", model_path=SFT, lora_rank=8, learning_rate=2e-3)),
    Stage("dpo", "train.dpo", supervised("pairs.jsonl", model_path=SFT, learning_rate=1e-4, sft_weight=1)),
    Stage("distill", "train.distill", lambda folder, size: (*DISTILL(folder, size), *size.student)),
    Stage("train_rm", "rl.train_rm", supervised("pairs.jsonl", model_path=SFT, learning_rate=1e-4)),
    Stage("ppo", "rl.ppo", reinforced(critic_path=Path("train_rm_float32")), reinforcement=True),
    # With advantages that sum to zero in every group the loss says little; the policy's entropy is read off its logits.
    Stage("grpo", "rl.grpo", reinforced(num_generations=4, algorithm="grpo"), curve="entropy", reinforcement=True),
)


# --- Running -------------------------------------------------------------------------------------------------------


def write_data(folder: Path, size: Size) -> None:
    """Write the built-in data of all stages."""
    builtin.write_pretrain(folder / "pretrain.jsonl", max_bytes=size.documents, exercise_pages=size.conversations // 20)
    builtin.write_sft(folder / "sft.jsonl", size.conversations, 0)
    builtin.write_new_skill(folder / "new_skill.jsonl", size.pairs, 0)
    builtin.write_preferences(folder / "pairs.jsonl", size.pairs, 0, "train")
    builtin.write_prompts(folder / "prompts.jsonl", size.prompts, 0)


def run_main(module: str, words: Sequence[str]) -> None:
    """Run a stage's `main` as `python -m module words` would, in this process, which has JAX loaded already.

    Raises:
        ConfigError: it ended with another status than 0.
        KeyboardInterrupt: a signal ended it, which stages answer by saving and a status of 128 plus its number.
    """
    note(f"$ python -m {module} {' '.join(words)}")
    before, sys.argv = sys.argv, [module, *words]
    try:
        status = importlib.import_module(module).main()
    except SystemExit as end:
        status = end.code
    finally:
        sys.argv = before
    if isinstance(status, int) and status > 128:
        raise KeyboardInterrupt
    if status:
        raise ConfigError(f"{module} ended with status {status}; see above")


def run_stage(stage: Stage, folder: Path, size: Size, dtype: str) -> tuple[list[float], float]:
    """Run a stage in one dtype; returns its curve and the seconds that all took, compilation included."""
    run = folder / f"{stage.name}_{dtype}"
    words = [*stage.flags(folder, size), *flags(out_dir=run, dtype=dtype, eval_interval=0, valid_fraction=0)]
    if stage.reinforcement:
        drawn = folder / f"{stage.name}_float32" / "rollouts"
        words += ["--save_rollouts"] if dtype == "float32" else ["--replay", str(drawn)]
    began = time.perf_counter()
    with jax.default_matmul_precision(PRECISIONS[dtype]):
        run_main(stage.module, [*words, "--overwrite"])
    seconds = time.perf_counter() - began
    return [row[stage.curve] for row in read_metrics(run) if stage.curve in row], seconds


def difference(exact: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Compare two curves: mean and largest distance over the root mean square of the first; infinite if not finite.

    Raises:
        ConfigError: they do not have the same number of points, or none.
    """
    if len(exact) != len(other) or not exact:
        raise ConfigError(f"the curves have {len(exact)} and {len(other)} points; both runs must log every step")
    reference = np.asarray(exact)
    distance = np.abs(np.asarray(other) - reference) / np.sqrt(np.mean(reference**2))
    found = {"mean": float(distance.mean()), "max": float(distance.max())}
    return {name: value if np.isfinite(value) else float("inf") for name, value in found.items()}


def compare(stage: Stage, folder: Path, size: Size) -> dict[str, Any]:
    """Run a stage in both dtypes; returns the fields of its line, the curves among them."""
    curves, seconds = {}, {}
    for dtype in PRECISIONS:
        curves[dtype], taken = run_stage(stage, folder, size, dtype)
        seconds[f"seconds_{dtype}"] = round(taken, 2)
    apart = difference(curves["float32"], curves["bfloat16"])
    return {
        "curve": stage.curve,
        "points": len(curves["float32"]),
        **{f"{name}_difference": digits(value) for name, value in apart.items()},
        **{f"{name}_tolerance": value for name, value in TOLERANCE.items()},
        "ok": all(apart[name] <= limit for name, limit in TOLERANCE.items()),
        **seconds,
        **{dtype: [digits(value) for value in curve] for dtype, curve in curves.items()},
    }


def learn_tokenizer(folder: Path, size: Size) -> dict[str, Any]:
    """Train the tokenizer, which has no dtype."""
    began = time.perf_counter()
    paths = (str(folder / name) for name in ("pretrain.jsonl", "sft.jsonl"))
    words = flags(vocab_size=size.vocab_size, out_dir=folder / "tokenizer")
    run_main("train.tokenizer", ["--data_path", *paths, *words])
    return {"ok": True, "vocab_size": size.vocab_size, "seconds": round(time.perf_counter() - began, 2)}


def all_lines(config: StagesBenchmark) -> Iterator[dict[str, Any]]:
    """Run everything; a stage that fails is a line that says so, and the next one is tried."""
    folder, size = Path(config.out_dir), SIZES[config.size]
    wanted = [stage for stage in STAGES if not config.stages or stage.name in config.stages]
    jobs: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    if not config.stages:
        write_data(folder, size)
        jobs.append(("tokenizer", lambda: learn_tokenizer(folder, size)))
    jobs += [(stage.name, lambda stage=stage: compare(stage, folder, size)) for stage in wanted]
    for name, job in jobs:
        line = {"name": "stages", "stage": name, "size": config.size}
        try:
            yield line | job()
        except Exception as error:  # whatever it was, the other stages still have something to say
            traceback.print_exc()
            yield line | {"ok": False, "failed": f"{type(error).__name__}: {error}"[:500]}
        jax.clear_caches()


def draw(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the curves of all stages that have some."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [line for line in lines if "curve" in line]
    columns = min(4, max(1, len(shown)))
    rows = -(-max(1, len(shown)) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(3.4 * columns, 2.6 * rows), squeeze=False)
    for axes, line in zip(grid.flat, shown, strict=False):
        steps = range(1, line["points"] + 1)
        axes.plot(steps, line["float32"], label="float32", linewidth=2.5, color="tab:grey")
        axes.plot(steps, line["bfloat16"], label="bfloat16", linewidth=1, color="tab:red")
        axes.set_title(f"{line['stage']}: {line['curve']}, {line['mean_difference']:.2%} apart", fontsize=9)
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(shown) :]:
        axes.axis("off")
    grid.flat[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    """Run, compare, draw; returns 1 if anything failed."""
    with user_errors():
        config = parse_cli(StagesBenchmark, str(__doc__))
        setup_jax()
        done: list[dict[str, Any]] = []
        for line in all_lines(config):
            emit(line | machine(), config.append)
            done.append(line)
            draw(done, Path(config.out_dir) / "curves.png")
        failed = [line["stage"] for line in done if not line["ok"]]
        note(
            f"{len(done) - len(failed)} of {len(done)} stages ok" + (f"; not ok: {', '.join(failed)}" if failed else "")
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
