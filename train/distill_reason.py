"""Learning to reason from traces: fine-tuning on thoughts and answers in tags, with the tags weighted.

    python -m train.distill_reason --data_path traces.jsonl --model_path out/pretrain --out_dir out/reason

Rows are `{"conversations": [...]}` whose assistant turns read `<think> … </think> <answer> … </answer>`, as a larger
model wrote them. The four tags are single tokens; a target that is one of them weighs --tag_weight times as much in the
loss, which is divided by the weighted mask. After training the model answers rows that were set aside, and report.json
says how often in the right form, and how often with the row's own answer.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import (
    ComputeConfig,
    ConfigError,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    parse_cli,
)
from minillm_jax.data import TokenRows
from minillm_jax.evaluation import Metrics, evaluate_reasoning
from minillm_jax.lm import Completion, generate, load
from minillm_jax.losses import language_model_loss, reweighted
from minillm_jax.pretrained import read_model_config
from minillm_jax.reasoning import REASONING_TAGS
from minillm_jax.run import Run, load_stage_rows, open_run, run_job, write_atomically
from minillm_jax.samples import answer_chats
from minillm_jax.sampling import SamplingParams
from minillm_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class ReasonConfig:
    """What is particular about reasoning."""

    tag_weight: float = 10.0
    """Weight of a tag token in the loss; every other trained token weighs 1."""
    system_prompt: str | None = None
    """System turn of conversations that have none, in training and wherever the model is used afterwards; None leaves
    the chat template's own."""
    report_rows: int = 128
    """Rows that were set aside and are answered for the report, at most; 0 for no report."""
    report_max_new_tokens: int = 512
    """Longest reply of the report in tokens."""
    report_temperature: float = 0.6
    """Temperature of those replies, 0 for greedy ones. Small models that have learnt to think in steps repeat a step
    without end when decoded greedily; 0.6 is what DeepSeek recommends for R1 (arXiv:2501.12948)."""
    report_batch_size: int = 64
    """Rows answered together."""

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        if not self.tag_weight > 0:
            raise ConfigError(f"--tag_weight must be positive, not {self.tag_weight}")
        for name in ("report_max_new_tokens", "report_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.report_temperature < 0:
            raise ConfigError(f"--report_temperature must not be negative, but is {self.report_temperature}")
        if self.report_rows < 0:
            raise ConfigError(f"--report_rows must not be negative, but is {self.report_rows}")


@dataclass(frozen=True)
class DistillReasonConfig:
    """Settings of a run on reasoning traces."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    reason: ReasonConfig = ReasonConfig()
    optim: OptimConfig = OptimConfig(learning_rate=1e-3)
    compute: ComputeConfig = ComputeConfig()
    lora: LoraConfig = LoraConfig()


def tag_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of the reasoning tags.

    Raises:
        ConfigError: the tokenizer spells a tag with several tokens, so that a weight would fall on `<` everywhere.
    """
    ids = []
    for tag in REASONING_TAGS:
        token_id = tokenizer.token_to_id(tag)
        if token_id is None or tokenizer.encode_control(tag) != [token_id]:
            raise ConfigError(f"this tokenizer has no single token {tag}; make one with train.tokenizer")
        ids.append(token_id)
    return ids


def with_system_prompt(run: Run, prompt: str | None) -> Run:
    """Put the system prompt into the run's chat template, and so into every checkpoint."""
    if prompt is None:
        return run
    run = dataclasses.replace(run, tokenizer=run.tokenizer.with_system_prompt(prompt))
    run.tokenizer.save(run.folder / "tokenizer")
    return run


def questions(rows: TokenRows, tokenizer: Tokenizer, count: int) -> tuple[list[list[int]], list[str]]:
    """Take the first documents apart: the prompt of the first reply as token ids, and the reply as text."""
    prompts, replies = [], []
    documents = rows.documents
    assert documents.masks is not None
    for i in range(min(count, len(documents))):
        chunk, start, length = documents.chunk[i], documents.start[i], documents.length[i]
        ids = documents.tokens[chunk][start : start + length].tolist()
        trained = np.append(documents.masks[chunk][start : start + length], 0)
        begin = int(trained.argmax())
        end = begin + int((trained[begin:] == 0).argmax())
        prompts.append(ids[:begin])
        replies.append(tokenizer.decode(ids[begin:end], skip_special_tokens=True))
    return prompts, replies


def report(config: DistillReasonConfig, run: Run, rows: TokenRows) -> Metrics:
    """Let the finished model answer rows that were set aside."""
    lm, temperature = load(run.folder, mesh=config.run.mesh), config.reason.report_temperature
    prompts, replies = questions(rows, run.tokenizer, config.reason.report_rows)
    room = run.model.max_position_embeddings - max(map(len, prompts))
    sampling = SamplingParams(max_new_tokens=min(config.reason.report_max_new_tokens, room), temperature=temperature)

    def complete(batch: Sequence[Sequence[int]]) -> list[Completion]:
        return generate(lm, batch, sampling, seed=config.run.seed, compute=config.compute)

    found = evaluate_reasoning(prompts, replies, complete, batch_size=config.reason.report_batch_size)
    return {"temperature": temperature, **found}


def main() -> int:
    """Run the stage, and print the report as one JSON object in the last line; returns the exit status."""
    with user_errors():
        config = parse_cli(DistillReasonConfig, str(__doc__), read_model=read_model_config)
        setup_jax()
        run = with_system_prompt(open_run(config), config.reason.system_prompt)
        loss_fn = language_model_loss(run.model, config.compute)
        loss_fn = reweighted(loss_fn, tag_ids(run.tokenizer), config.reason.tag_weight)
        train_rows, valid_rows = load_stage_rows(config, run, "sft")
        show = lambda lm: answer_chats(lm, config.run.sample_prompts)  # noqa: E731
        status = run_job(config, run, loss_fn, train_rows, valid_rows, sample=show)
        if status == 0 and valid_rows is not None and config.reason.report_rows:
            line = json.dumps(report(config, run, valid_rows))
            write_atomically(run.folder / "report.json", line + "\n")
            print(line)
        return status


if __name__ == "__main__":
    sys.exit(main())
