"""Evaluation: how well a model predicts text, chooses, judges and answers. The last line printed is one JSON object.

    python -m train.evaluate --model_path out/sft --data_path questions.jsonl --task exact

`lm` reads `{"text"}` rows. Every token of a document is scored once, its end token included; the begin token is
    context. `bits_per_byte` is their negative log-likelihood in bits over the UTF-8 bytes of the text, `perplexity` is
    per token.
`choice` reads `{"query", "choices", "gold"}`. A choice's score is the log-likelihood of " " + choice after the query,
    divided by the choice's UTF-8 bytes for `accuracy` and as it is for `accuracy_unnormalized`.
`pairs` reads `{"good", "bad"}` and optionally `task`: is the good text likelier, as a sum over its tokens without an
    end token (BLiMP, arXiv:1912.00582)? Or `{"chosen", "rejected"}` as for preferences: does the chosen answer get the
    higher reward from a reward model, or the higher log-probability given the prompt from a language model?
`exact` reads `{"prompt", "answer"}` and optionally `family`: does the greedy reply in the chat format equal the answer?

A tie is wrong: a model that cannot tell earns nothing.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from minillm_jax.chat import render
from minillm_jax.checkpoint import CheckpointError
from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import ComputeConfig, ConfigError, parse_cli
from minillm_jax.data import DataError, SkipReport, read_records
from minillm_jax.data.encode import encode_preference
from minillm_jax.data.errors import FieldError
from minillm_jax.data.peek import row_kind
from minillm_jax.data.preference import pair_rows
from minillm_jax.data.records import ExactRecord, PreferenceRecord, bad_row, chat_field_error
from minillm_jax.data.sources import resolve_sources
from minillm_jax.evaluation import (
    Metrics,
    Score,
    evaluate_choice,
    evaluate_exact,
    evaluate_lm,
    evaluate_pairs,
    preference_metrics,
)
from minillm_jax.lm import LanguageModel, generate, load
from minillm_jax.model import param_axes
from minillm_jax.preference import reference_logps, reward_pairs
from minillm_jax.reward import is_reward_model, reward_axes
from minillm_jax.sampling import SamplingParams
from minillm_jax.scoring import Scores, Span, score_sequences
from minillm_jax.sharding import check_mesh, data_parallelism, make_mesh, tree_shardings
from minillm_jax.tokenizer import Tokenizer

SCORED: dict[str, Callable[[list[Any], Tokenizer, Score], Metrics]] = {
    "lm": evaluate_lm,
    "choice": evaluate_choice,
    "pairs": evaluate_pairs,
}
KINDS = {"lm": "pretrain", "choice": "choice", "pairs": "pairs", "exact": "exact"}
"""Row format of each task; pairs reads rows of preferences as well."""
DEFAULT_WINDOW = 512
CPU_ROWS, ACCELERATOR_ROWS, PROMPTS = 4, 64, 64


@dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate, on what."""

    model_path: str
    """Run folder, or one of its checkpoints."""
    data_path: tuple[str, ...]
    """JSONL files or folders of them."""
    task: Literal["lm", "choice", "pairs", "exact"]
    """Rows {"text"}, {"query", "choices", "gold"}, {"good", "bad"} or {"chosen", "rejected"}, {"prompt", "answer"}."""
    max_seq_len: int | None = None
    """Tokens per row of scored text; longer documents become several windows, a longer query loses its beginning. None
    takes what the model's run was trained with, or 512."""
    stride: int | None = None
    """Tokens scored by each further window of a long document; fewer than max_seq_len leave room for context. None
    takes max_seq_len: no overlap."""
    batch_size: int | None = None
    """Rows of max_seq_len tokens per batch, or prompts of exact. None takes 64, or on CPU 4 rows, which is faster."""
    max_new_tokens: int = 64
    """Longest reply in tokens (exact)."""
    limit: int | None = None
    """Use this many rows from the start; None takes all."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at a bad row, or count and report it."""
    out_file: str | None = None
    """File to write the JSON object to as well."""
    mesh: str = "data=-1"
    """Device mesh as axis=size pairs, as in training."""
    compute: ComputeConfig = ComputeConfig()

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        for name in ("max_seq_len", "stride", "batch_size", "max_new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} must be at least 1, not {value}")


def trained_window(model_path: str) -> int | None:
    """Read from a run's config.json how many tokens a row had in training; None when the folder is of no such run."""
    root = Path(model_path).absolute()
    runs = [root, *(folder.parent for folder in (root, root.parent) if folder.name == "checkpoints")]
    for run in runs:
        try:
            return int(json.loads((run / "config.json").read_text(encoding="utf-8"))["data"]["max_seq_len"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _window(config: EvaluateConfig, lm: LanguageModel) -> int:
    limit = lm.config.max_position_embeddings
    if config.max_seq_len is None:
        return min(trained_window(config.model_path) or DEFAULT_WINDOW, limit)
    if config.max_seq_len > limit:
        raise ConfigError(
            f"--max_seq_len {config.max_seq_len} is more than the {limit} positions of {config.model_path}"
        )
    return config.max_seq_len


@contextmanager
def _progress(console: Console, title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal, and nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _on_mesh(config: EvaluateConfig, lm: LanguageModel) -> tuple[Mesh, LanguageModel]:
    """Lay the model over the mesh as in training, where it does not lie there already."""
    mesh = make_mesh(config.mesh)
    check_mesh(mesh, lm.config, config.model_path)
    axes = (reward_axes if is_reward_model(lm.params) else param_axes)(lm.config)
    return mesh, dataclasses.replace(lm, params=jax.device_put(lm.params, tree_shardings(mesh, axes)))


def _run_scoring(config: EvaluateConfig, lm: LanguageModel, records: list[Any], console: Console) -> Metrics:
    """Score on the mesh, rows over its data axes."""
    run = SCORED[config.task]
    window = _window(config, lm)
    if config.stride is not None and config.stride > window:
        raise ConfigError(f"--stride {config.stride} is more than a window of {window} tokens and would skip text")
    mesh, lm = _on_mesh(config, lm)
    rows = _rows_at_once(config, mesh)
    with jax.set_mesh(mesh), _progress(console, f"scoring {len(records):,} rows") as progress:
        score = partial(
            score_sequences,
            lm,
            max_seq_len=window,
            batch_size=rows,
            stride=config.stride,
            compute=config.compute,
            progress=progress,
        )

        def checked(sequences: Sequence[Span]) -> Scores:
            scores = score(sequences)
            _refuse_not_finite(scores.logprobs, config)
            return scores

        return {"max_seq_len": window, **run(records, lm.tokenizer, checked)}


def _rows_at_once(config: EvaluateConfig, mesh: Mesh) -> int:
    ways = data_parallelism(mesh)
    default = CPU_ROWS if jax.default_backend() == "cpu" else ACCELERATOR_ROWS
    return ways * -(-(config.batch_size or default) // ways)


def _refuse_not_finite(scores: np.ndarray, config: EvaluateConfig) -> None:
    if not np.isfinite(scores).all():
        raise CheckpointError(
            f"{config.model_path}: the model's scores are not finite; its parameters may have diverged in training, so "
            "evaluate an earlier checkpoint, or try --dtype float32"
        )


def _run_preferences(
    config: EvaluateConfig, lm: LanguageModel, records: list[PreferenceRecord], console: Console, report: SkipReport
) -> Metrics:
    """Score both answers of each pair: by their rewards, or by their log-probabilities given the prompt.

    As in training answers are cut at their end, and pairs are left out of which nothing to compare remains.
    """
    rewards = is_reward_model(lm.params)
    window = _window(config, lm)
    if rewards:  # which reads the last token as well
        window = min(window, lm.config.max_position_embeddings - 1)
    encoded = encode_preference(lm.tokenizer, records)
    for record, error in encoded.bad:
        bad_row(record, chat_field_error(error), config.on_bad_row, report)
    _refuse_nothing(encoded.lengths, config)
    rows = pair_rows(encoded, window, partial(console.print, markup=False, soft_wrap=True))
    mesh, lm = _on_mesh(config, lm)
    score = reward_pairs if rewards else reference_logps
    scores = score(lm.params, lm.config, config.compute, rows, _rows_at_once(config, mesh), mesh)
    _refuse_not_finite(scores, config)
    return {
        "max_seq_len": window,
        **preference_metrics(scores, rows.answer_lengths, calibration=rewards),
        "rows_left_out": len(encoded.lengths) // 2 - len(rows),
        "tokens_processed": int(rows.documents.length.sum()),
    }


def _run_exact(
    config: EvaluateConfig, lm: LanguageModel, records: list[ExactRecord], console: Console, report: SkipReport
) -> Metrics:
    limit = lm.config.max_position_embeddings
    kept, prompts = [], []
    for record in records:
        turns = [{"role": "user", "content": record.prompt}]
        prompt = render(lm.tokenizer, turns, add_generation_prompt=True).token_ids
        if len(prompt) < limit:
            kept.append(record)
            prompts.append(prompt)
        else:
            detail = f": {len(prompt)} tokens, of at most {limit - 1}"
            bad_row(
                record, FieldError("prompt", "leaves the model no room to answer", detail), config.on_bad_row, report
            )
    _refuse_nothing(kept, config)
    _, lm = _on_mesh(config, lm)
    sampling = SamplingParams(max_new_tokens=config.max_new_tokens, temperature=0.0)
    with _progress(console, f"answering {len(kept):,} prompts") as progress:
        metrics = evaluate_exact(
            kept,
            prompts,
            lambda batch: generate(lm, batch, sampling, compute=config.compute),
            batch_size=config.batch_size or PROMPTS,
            show=partial(console.print, markup=False, soft_wrap=True),
            progress=progress,
        )
    return {**metrics, "rows": len(kept)}


def _kind(config: EvaluateConfig) -> str:
    """Row format of the data: that of the task, or for pairs what the first file holds."""
    if config.task == "pairs" and row_kind(resolve_sources(config.data_path)[0].files[0]) == "preference":
        return "preference"
    return KINDS[config.task]


def _refuse_nothing(records: Sequence[Any] | np.ndarray, config: EvaluateConfig) -> None:
    if not len(records):
        raise DataError(f"{' '.join(config.data_path)}: every row was skipped; there is nothing to evaluate")


def evaluate(config: EvaluateConfig, lm: LanguageModel, console: Console) -> Metrics:
    """Evaluate a loaded model.

    Args:
        config: the task and its data.
        lm: the model at `config.model_path`.
        console: receives progress, skipped rows and wrong answers.

    Returns:
        The JSON object: what was evaluated, the task's metrics, `rows`, `skipped_rows`, `tokens_processed`, `seconds`
        from first token to last score with compilation included, `tokens_per_second`.

    Raises:
        DataError: a bad row, or none.
        ConfigError: a window that the model or the stride does not fit, a task that a reward model cannot do, or a mesh
            that cannot split the model.
        CheckpointError: the model's parameters are not finite.
    """
    kind = _kind(config)
    if is_reward_model(lm.params) and kind != "preference":
        raise ConfigError(
            f"{config.model_path} is a reward model, which predicts no text; it can be evaluated with --task pairs on "
            "rows {chosen, rejected}"
        )
    report = SkipReport()
    records = list(islice(read_records(config.data_path, kind, config.on_bad_row, report), config.limit))
    _refuse_nothing(records, config)
    start = time.perf_counter()
    if config.task == "exact":
        metrics = _run_exact(config, lm, records, console, report)
    elif kind == "preference":
        metrics = _run_preferences(config, lm, records, console, report)
    else:
        metrics = _run_scoring(config, lm, records, console)
    seconds = time.perf_counter() - start
    for line in report.lines():
        console.print(line, markup=False, soft_wrap=True)
    return {
        "task": config.task,
        "model_path": config.model_path,
        "data_path": list(config.data_path),
        "rows": len(records),
        "skipped_rows": report.total,
        **metrics,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(metrics["tokens_processed"] / seconds, 1),
    }


def _write(path: Path, line: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out_file {path}: cannot be written: {error.strerror}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, and print one JSON object as the last line; returns the exit status."""
    with user_errors():
        config = parse_cli(EvaluateConfig, str(__doc__), argv=argv)
        setup_jax()
        lm = load(config.model_path, mesh=config.mesh)
        line = json.dumps(evaluate(config, lm, Console(stderr=True, highlight=False)), ensure_ascii=False)
        print(line)
        if config.out_file is not None:
            _write(Path(config.out_file), line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
