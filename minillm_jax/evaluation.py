"""The tasks of evaluation: records and a way to score or complete go in, a dict of metrics comes out.

Nothing here knows about files, meshes or terminals, so tests hand in scores by the number. A tie is wrong: a model
that cannot tell earns nothing.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np

from minillm_jax.data import DataError
from minillm_jax.data.records import ChoiceRecord, ExactRecord, PairsRecord, PretrainRecord
from minillm_jax.lm import Completion
from minillm_jax.reasoning import read_reasoning
from minillm_jax.scoring import Scores, Span
from minillm_jax.tokenizer import Tokenizer, encode_documents

Metrics = dict[str, Any]
Score = Callable[[Sequence[Span]], Scores]
Complete = Callable[[Sequence[Sequence[int]]], list[Completion]]

WRONG_ANSWERS_SHOWN = 5
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


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


def preference_metrics(scores: np.ndarray, lengths: np.ndarray, *, calibration: bool) -> Metrics:
    """Say how well scores order the answers of preference pairs.

    Args:
        scores: `[N, 2]` of chosen and rejected answers: rewards, or log-probabilities.
        lengths: `[N, 2]` tokens of the answers.
        calibration: take the logistic function of a difference for the probability that the order is right.

    Returns:
        `accuracy`, how often the chosen answer scores higher; `margin`, the mean difference of the scores;
        `longer_accuracy`, the accuracy of preferring the longer answer, where equal lengths count one half; `rows`; and
        with `calibration`, `calibration_error` and the Brier score `brier`, the mean square of (probability - 1).
    """
    margins = scores[:, 0].astype(np.float64) - scores[:, 1]
    longer = 0.5 + 0.5 * np.sign(lengths[:, 0] - lengths[:, 1])
    metrics: Metrics = {
        "accuracy": float((margins > 0).mean()),
        "margin": float(margins.mean()),
        "longer_accuracy": float(longer.mean()),
    }
    if calibration:
        metrics["calibration_error"] = calibration_error(margins)
        metrics["brier"] = float(np.square(1 - _logistic(margins)).mean())
    return {**metrics, "rows": len(margins)}


def calibration_error(margins: np.ndarray, bins: int = 10) -> float:
    """Compare how sure a reward model is with how often it is right: expected calibration error (arXiv:1706.04599).

    Its confidence in the answer that it prefers is σ(|margin|). Pairs fall into equally wide bins of confidence between
    1/2 and 1; what is averaged over pairs is the distance between a bin's mean confidence and its share of right ones.
    A margin of 0 prefers neither answer and is half right.

    Args:
        margins: `[N]` rewards of chosen answers less those of rejected ones.
        bins: how many.
    """
    confidence, right = _logistic(np.abs(margins)), 0.5 + 0.5 * np.sign(margins)
    which = np.minimum((2 * bins * (confidence - 0.5)).astype(np.int64), bins - 1)
    gaps = np.bincount(which, weights=confidence - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(margins))


def _logistic(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))  # does not overflow


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
    replies = complete_all(prompts, complete, batch_size, progress)
    right = [final_answer(replies[i].text) == record.answer.strip() for i, record in enumerate(records)]
    for i in [i for i, is_right in enumerate(right) if not is_right][:WRONG_ANSWERS_SHOWN]:
        show(f"wrong: {records[i].prompt[-200:]!r} → {replies[i].text[:200]!r}, expected {records[i].answer[:200]!r}")
    return {
        "accuracy": accuracy(right),
        **accuracy_by("family", [record.family for record in records], right),
        "tokens_processed": sum(len(reply.token_ids) for reply in replies),
    }


def evaluate_reasoning(
    prompts: Sequence[Sequence[int]],
    references: Sequence[str],
    complete: Complete,
    *,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Metrics:
    """Generate a reply to each prompt, and look at its form and its answer.

    Args:
        prompts: token ids of each, rendered.
        references: what the rows themselves reply.
        complete: answers a batch of prompts.
        batch_size: prompts per batch.
        progress: called with prompts done and prompts in all.

    Returns:
        `rows`; `well_formed`, the share of replies that are a thought and an answer, see `reasoning.read_reasoning`;
        `rows_with_answer`, rows whose own reply is; `accuracy`, the share of those whose answer is given exactly;
        `unfinished`, the share of replies that were cut off at the longest length.
    """
    replies = complete_all(prompts, complete, batch_size, progress)
    read = [read_reasoning(reply.text) for reply in replies]
    expected = [read_reasoning(reference) for reference in references]
    right = [
        ours is not None and ours.answer == theirs.answer
        for ours, theirs in zip(read, expected, strict=True)
        if theirs is not None
    ]
    return {
        "rows": len(prompts),
        "well_formed": accuracy([reasoning is not None for reasoning in read]),
        "unfinished": accuracy([reply.finish_reason == "length" for reply in replies]),
        "rows_with_answer": len(right),
        "accuracy": accuracy(right) if right else None,
    }


def complete_all(
    prompts: Sequence[Sequence[int]],
    complete: Complete,
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Completion]:
    """Answer prompts in batches of similar length, the longest first; replies come in the prompts' own order."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    replies: dict[int, Completion] = {}
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        replies.update(zip(batch, complete([prompts[i] for i in batch]), strict=True))
        progress(len(replies), len(order))
    return [replies[i] for i in range(len(prompts))]
