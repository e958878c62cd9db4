"""Distillation: a student learns from labels and from what a teacher says about every token.

    python -m train.distill --data_path corpus.jsonl --teacher_path out/large --out_dir out/small --hidden_size 128
    python -m train.distill --data_path chats.jsonl --teacher_path out/large_sft --model_path out/small --out_dir out/d

The loss is alpha * CE + (1 - alpha) * T^2 * D(teacher, student), a mean over trained tokens. Rows are those of
pretraining or of SFT. The teacher may be of another shape, with experts or without, but has the student's vocabulary; a
student without --model_path starts from random weights with the teacher's tokenizer. A large teacher is asked once
with --teacher_top_k 32, before training; --on_policy 0.5 lets the student itself write half of the rows.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import jax

from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import (
    ComputeConfig,
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    parse_cli,
)
from minillm_jax.data import DataError, TokenRows
from minillm_jax.data.peek import row_kind
from minillm_jax.data.sources import resolve_sources
from minillm_jax.distillation import DistillConfig, distillation_loss
from minillm_jax.on_policy import HostBatch, sample_replies
from minillm_jax.pretrained import read_model_config
from minillm_jax.run import Run, load_stage_rows, open_run, run_job
from minillm_jax.samples import answer_chats, continue_texts
from minillm_jax.sharding import make_mesh
from minillm_jax.teacher import TaughtRows, Teacher, open_teacher, store_teacher
from minillm_jax.trainer import TrainState, TransformBatch


@dataclass(frozen=True)
class TeacherConfig:
    """Who teaches, and what about."""

    teacher_path: str
    """Run, checkpoint or Hugging Face folder of the teacher."""
    teacher_top_k: int = 0
    """Ask the teacher once, before training, and keep its k likeliest tokens in the run folder; 0 keeps it in memory
    and asks at every step."""
    on_policy: float = 0.0
    """Share of rows whose replies the student writes itself, to be judged by the teacher alone."""
    data_format: Literal["auto", "pretrain", "sft"] = "auto"
    """Kind of rows; auto looks at the first file."""

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing, and a stored teacher that would have to judge new text."""
        if not 0.0 <= self.on_policy <= 1.0:
            raise ConfigError(f"--on_policy must lie in [0, 1], not {self.on_policy}")
        if self.teacher_top_k < 0:
            raise ConfigError(f"--teacher_top_k must not be negative, but is {self.teacher_top_k}")
        if self.on_policy and self.teacher_top_k:
            raise ConfigError("--on_policy needs the teacher at every step; leave --teacher_top_k out")


@dataclass(frozen=True)
class DistillStageConfig:
    """Settings of a distillation run."""

    run: RunConfig
    data: DataConfig
    teacher: TeacherConfig
    model: ModelConfig
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = OptimConfig(learning_rate=1e-3)
    compute: ComputeConfig = ComputeConfig()


def kind_of_rows(config: DistillStageConfig) -> str:
    """Return `pretrain` or `sft`, as asked for or as the first file says.

    Raises:
        DataError: the file holds rows of another kind.
    """
    if config.teacher.data_format != "auto":
        return config.teacher.data_format
    file = resolve_sources(config.data.data_path)[0].files[0]
    kind = row_kind(file)
    if kind not in ("pretrain", "sft"):
        raise DataError(f"{file}: holds {kind} rows; distillation reads {{'text'}} or {{'conversations'}}")
    return kind


def with_teachers_tokenizer(config: DistillStageConfig) -> DistillStageConfig:
    """Let a student without a tokenizer of its own take the teacher's."""
    if config.run.tokenizer_path is not None or config.run.model_path is not None:
        return config
    return dataclasses.replace(config, run=dataclasses.replace(config.run, tokenizer_path=config.teacher.teacher_path))


def store_answers(
    config: DistillStageConfig, run: Run, teacher: Teacher, parts: dict[str, TokenRows | None]
) -> list[TaughtRows | None]:
    """Ask the teacher about the rows of every part, unless it was asked before."""
    mesh = make_mesh(config.run.mesh)
    load = cache(lambda: teacher.load(mesh, config.compute))
    return [
        None
        if rows is None
        else store_teacher(
            teacher,
            rows,
            run.folder / "teacher" / part,
            k=config.teacher.teacher_top_k,
            temperature=config.distill.temperature,
            batch_size=config.data.batch_size,
            mesh=mesh,
            compute=config.compute,
            load=load,
        )
        for part, rows in parts.items()
    ]


def let_student_write(config: DistillStageConfig, run: Run) -> TransformBatch | None:
    """Make the change of a batch that on-policy distillation asks for."""
    if not config.teacher.on_policy:
        return None
    if jax.process_count() > 1:
        raise ConfigError("--on_policy samples with one process; leave it out, or train on one machine")
    if config.data.max_seq_len >= run.model.max_position_embeddings:
        raise ConfigError("--on_policy needs a --max_seq_len below the model's max_position_embeddings")

    def transform(state: TrainState, batch: HostBatch, step: int) -> HostBatch:
        return sample_replies(
            batch,
            state["params"],
            run.model,
            run.tokenizer.eos_token_ids,
            fraction=config.teacher.on_policy,
            seed=config.run.seed,
            step=step,
            compute=config.compute,
        )

    return transform


def main() -> int:
    """Run the stage; returns the exit status."""
    with user_errors():
        config = with_teachers_tokenizer(parse_cli(DistillStageConfig, str(__doc__), read_model=read_model_config))
        setup_jax()
        kind = kind_of_rows(config)
        run = open_run(config)
        teacher = open_teacher(config.teacher.teacher_path, run.model, run.tokenizer, config.data.max_seq_len)
        transform = let_student_write(config, run)
        rows: list[Any] = list(load_stage_rows(config, run, kind))
        stored = config.teacher.teacher_top_k > 0
        if stored:
            rows = store_answers(config, run, teacher, dict(zip(("train", "valid"), rows, strict=True)))
        show = continue_texts if kind == "pretrain" else answer_chats
        return run_job(
            config,
            run,
            distillation_loss(run.model, None if stored else teacher.config, config.compute, config.distill),
            *rows,
            make_frozen=None if stored else lambda mesh, _: teacher.load(mesh, config.compute),
            sample=lambda lm: show(lm, config.run.sample_prompts),
            transform_batch=transform,
        )


if __name__ == "__main__":
    sys.exit(main())
