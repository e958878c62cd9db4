"""Evaluation: how well a model predicts text, chooses, judges and answers. The last line printed is one JSON object.

    python -m train.evaluate --model_path out/sft --data_path questions.jsonl --task exact

`lm` reads `{"text"}` rows. Every token of a document is scored once, its end token included; the begin token is
    context. `bits_per_byte` is their negative log-likelihood in bits over the UTF-8 bytes of the text, `perplexity` is
    per token.
`choice` reads `{"query", "choices", "gold"}`. A choice's score is the log-likelihood of " " + choice after the query,
    divided by the choice's UTF-8 bytes for `accuracy` and as it is for `accuracy_unnormalized`.
`pairs` reads `{"good", "bad"}` and optionally `task`: is the good text likelier, as a sum over its tokens without an
    end token (BLiMP, arXiv:1912.00582)?
`exact` reads `{"prompt", "answer"}` and optionally `family`: does the greedy reply in the chat format equal the answer?

A tie is wrong: a model that cannot tell earns nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from minillm_jax.chat import render
from minillm_jax.checkpoint import CheckpointError
from minillm_jax.config import ComputeConfig, ConfigError, parse_cli
from minillm_jax.data import DataError, SkipReport, read_records
from minillm_jax.data.errors import FieldError
from minillm_jax.data.records import ChoiceRecord, ExactRecord, PairsRecord, PretrainRecord, bad_row
from minillm_jax.lm import Completion, LanguageModel, generate, load
from minillm_jax.model import param_axes
from minillm_jax.run import setup_jax, user_errors
from minillm_jax.sampling import SamplingParams
from minillm_jax.scoring import Scores, Span, score_sequences
from minillm_jax.sharding import data_parallelism, make_mesh, tree_shardings
from minillm_jax.tokenizer import Tokenizer, encode_documents

Metrics = dict[str, Any]
Score = Callable[[Sequence[Span]], Scores]
Complete = Callable[[Sequence[Sequence[int]]], list[Completion]]

KINDS = {"lm": "pretrain", "choice": "choice", "pairs": "pairs", "exact": "exact"}
"""Row format of each task."""
DEFAULT_WINDOW = 512
CPU_ROWS, ACCELERATOR_ROWS, PROMPTS = 4, 64, 64
WRONG_ANSWERS_SHOWN = 5
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate, on what."""

    model_path: str
    """Run folder, or one of its checkpoints."""
    data_path: tuple[str, ...]
    """JSONL files or folders of them."""
    task: Literal["lm", "choice", "pairs", "exact"]
    """Rows {"text"}, {"query", "choices", "gold"}, {"good", "bad"} or {"prompt", "answer"}."""
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
    """Device mesh as axis=size pairs, as in training; exact runs on one device."""
    compute: ComputeConfig = ComputeConfig()

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        for name in ("max_seq_len", "stride", "batch_size", "max_new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} must be at least 1, not {value}")


def accuracy(right: Sequence[bool]) -> float:
    """Share of rows that are right."""
    return float(np.mean(right))


def accuracy_by(name: str, groups: Iterable[str | None], right: Sequence[bool]) -> Metrics:
    """Accuracy of each named group as `{"accuracy_by_NAME": {group: accuracy}}`; nothing when no row names one."""
    members: dict[str, list[bool]] = defaultdict(list)
    for group, is_right in zip(groups, right, strict=True):
        if group is not None:
            members[group].append(is_right)
    return {f"accuracy_by_{name}": {group: accuracy(members[group]) for group in sorted(members)}} if members else {}


def _score_metrics(scores: Scores) -> Metrics:
    return {"longer_than_window": scores.longer_than_window, "tokens_processed": scores.processed}


def evaluate_lm(records: Sequence[PretrainRecord], tokenizer: Tokenizer, score: Score) -> Metrics:
    """Score whole documents.

    Raises:
        DataError: the rows hold no text at all.
    """
    size = sum(len(record.text.encode()) for record in records)
    if not size:
        raise DataError(f"{records[0].file}: every text is empty; there is nothing to predict")
    documents = encode_documents(tokenizer, [record.text for record in records])
    scores = score([(np.asarray(ids, np.int32), 1) for ids in documents])
    tokens, nats = int(scores.tokens.sum()), -float(scores.logprobs.sum())
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "perplexity": float(np.exp(nats / tokens)),
        "loss": nats / tokens,
        "tokens": tokens,
        "bytes": size,
        "documents": len(records),
        **_score_metrics(scores),
    }


def encode_choices(tokenizer: Tokenizer, records: Sequence[ChoiceRecord]) -> list[Span]:
    """Encode query and choice together, for every choice of every record in order.

    Scored is what follows the longest run of the query's tokens that all choices of the record share. Where a tokenizer
    merges the query's end into a choice, this scores the same text behind the same context for every choice.
    """
    queries = tokenizer.encode_batch([record.query for record in records])
    texts = [f"{record.query} {choice}" for record in records for choice in record.choices]
    encoded = iter(tokenizer.encode_batch(texts))
    spans: list[Span] = []
    for record, query in zip(records, queries, strict=True):
        wholes = list(islice(encoded, len(record.choices)))
        shared = min(min(_common_prefix(query, whole), len(whole) - 1) for whole in wholes)
        spans += [([tokenizer.bos_token_id, *whole], max(shared, 0) + 1) for whole in wholes]
    return spans


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Count the leading items that two sequences share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _is_best(values: Sequence[float], gold: int) -> bool:
    return all(values[gold] > value for i, value in enumerate(values) if i != gold)


def evaluate_choice(records: Sequence[ChoiceRecord], tokenizer: Tokenizer, score: Score) -> Metrics:
    """Compare the choices of each query."""
    scores = score(encode_choices(tokenizer, records))
    logprobs = iter(scores.logprobs.tolist())
    normalized, plain = [], []
    for record in records:
        sums = list(islice(logprobs, len(record.choices)))
        means = [total / max(1, len(text.encode())) for total, text in zip(sums, record.choices, strict=True)]
        normalized.append(_is_best(means, record.gold))
        plain.append(_is_best(sums, record.gold))
    return {
        "accuracy": accuracy(normalized),
        "accuracy_unnormalized": accuracy(plain),
        **_score_metrics(scores),
    }


def evaluate_pairs(records: Sequence[PairsRecord], tokenizer: Tokenizer, score: Score) -> Metrics:
    """Compare the two texts of each pair."""
    ids = tokenizer.encode_batch([text for record in records for text in (record.good, record.bad)])
    scores = score([([tokenizer.bos_token_id, *text], 1) for text in ids])
    right = (scores.logprobs[::2] > scores.logprobs[1::2]).tolist()
    return {
        "accuracy": accuracy(right),
        **accuracy_by("task", [record.task for record in records], right),
        **_score_metrics(scores),
    }


_SCORED: dict[str, Callable[[list[Any], Tokenizer, Score], Metrics]] = {
    "lm": evaluate_lm,
    "choice": evaluate_choice,
    "pairs": evaluate_pairs,
}


def final_answer(reply: str) -> str:
    """Take what a reply offers as its answer: inside the last `<answer>` tags, else all that follows a thought."""
    tagged = _ANSWER.findall(reply)
    return (tagged[-1] if tagged else reply.rpartition("</think>")[2]).strip()


def evaluate_exact(
    records: Sequence[ExactRecord],
    prompts: Sequence[Sequence[int]],
    complete: Complete,
    *,
    batch_size: int,
    show: Callable[[str], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Metrics:
    """Generate a reply to each prompt, in batches of similar length with the longest first, and compare.

    Args:
        records: the questions.
        prompts: token ids of each, rendered.
        complete: answers a batch of prompts.
        batch_size: prompts per batch.
        show: receives a line for each of the first few wrong answers.
        progress: called with prompts done and prompts in all.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    replies: dict[int, Completion] = {}
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        replies.update(zip(batch, complete([prompts[i] for i in batch]), strict=True))
        progress(len(replies), len(order))
    right = [final_answer(replies[i].text) == record.answer.strip() for i, record in enumerate(records)]
    for i in [i for i, is_right in enumerate(right) if not is_right][:WRONG_ANSWERS_SHOWN]:
        show(f"wrong: {records[i].prompt[-200:]!r} → {replies[i].text[:200]!r}, expected {records[i].answer[:200]!r}")
    return {
        "accuracy": accuracy(right),
        **accuracy_by("family", [record.family for record in records], right),
        "tokens_processed": sum(len(reply.token_ids) for reply in replies.values()),
    }


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


def _run_scoring(config: EvaluateConfig, lm: LanguageModel, records: list[Any], console: Console) -> Metrics:
    """Score on the mesh: rows over its data axes, parameters as in training."""
    run = _SCORED[config.task]
    window = _window(config, lm)
    if config.stride is not None and config.stride > window:
        raise ConfigError(f"--stride {config.stride} is more than a window of {window} tokens and would skip text")
    mesh = make_mesh(config.mesh)
    ways = data_parallelism(mesh)
    default = CPU_ROWS if jax.default_backend() == "cpu" else ACCELERATOR_ROWS
    rows = ways * -(-(config.batch_size or default) // ways)
    with jax.set_mesh(mesh), _progress(console, f"scoring {len(records):,} rows") as progress:
        params = jax.device_put(lm.params, tree_shardings(mesh, param_axes(lm.config)))
        score = partial(
            score_sequences,
            dataclasses.replace(lm, params=params),
            max_seq_len=window,
            batch_size=rows,
            stride=config.stride,
            compute=config.compute,
            progress=progress,
        )

        def checked(sequences: Sequence[Span]) -> Scores:
            scores = score(sequences)
            if not np.isfinite(scores.logprobs).all():
                raise CheckpointError(
                    f"{config.model_path}: the model's log-probabilities are not finite; its parameters may have "
                    "diverged in training, so evaluate an earlier checkpoint, or try --dtype float32"
                )
            return scores

        return {"max_seq_len": window, **run(records, lm.tokenizer, checked)}


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


def _refuse_nothing(records: Sequence[Any], config: EvaluateConfig) -> None:
    if not records:
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
        ConfigError: a window that the model or the stride does not fit.
        CheckpointError: the model's parameters are not finite.
    """
    report = SkipReport()
    records = list(islice(read_records(config.data_path, KINDS[config.task], config.on_bad_row, report), config.limit))
    _refuse_nothing(records, config)
    start = time.perf_counter()
    if config.task == "exact":
        metrics = _run_exact(config, lm, records, console, report)
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
        lm = load(config.model_path)
        line = json.dumps(evaluate(config, lm, Console(stderr=True, highlight=False)), ensure_ascii=False)
        print(line)
        if config.out_file is not None:
            _write(Path(config.out_file), line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
