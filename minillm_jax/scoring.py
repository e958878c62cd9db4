"""Log-likelihoods of many token sequences under a model.

Sequences of any length go in, each with the index of its first scored token; the sum of its scored tokens'
log-probabilities comes out in float64. All are packed into rows of one shape, like documents in training, so that a
single compiled program scores everything; what is longer than a row becomes several windows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from minillm_jax.config import ComputeConfig, ModelConfig
from minillm_jax.data.documents import Documents
from minillm_jax.data.packing import PackPlan, gather_rows, plan_packing
from minillm_jax.lm import LanguageModel
from minillm_jax.losses import Batch, token_logprobs
from minillm_jax.model import Params, forward_hidden
from minillm_jax.sampler import bucket

SHORTEST_ROW = 128
"""Rows are no shorter than this many tokens, so that short sequences share them with little padding."""

Span = tuple[Sequence[int] | np.ndarray, int]
"""Token ids, and the index of the first scored one: at least 1, because nothing predicts the first token."""


@dataclass(frozen=True)
class Scores:
    """What is known of N sequences.

    Attributes:
        logprobs: `[N]` float64, summed over scored tokens, in nats.
        tokens: `[N]` int64, scored tokens.
        processed: tokens that went through the model, windows' overlaps counted twice.
        longer_than_window: sequences of which some token was scored without seeing all tokens before it.
    """

    logprobs: np.ndarray
    tokens: np.ndarray
    processed: int
    longer_than_window: int


@dataclass(frozen=True)
class Windows:
    """Pieces of sequences: window w is tokens `start[w]` to `stop[w]` of `sequence[w]`, scored from `first[w]` on."""

    sequence: np.ndarray  # [W] int64, as are the others
    start: np.ndarray
    stop: np.ndarray
    first: np.ndarray


def split_windows(lengths: Sequence[int], first_scored: Sequence[int], max_seq_len: int, stride: int) -> Windows:
    """Cover sequences by windows of at most `max_seq_len` (input, target) pairs that score every token once.

    The first window scores as many tokens as fit, behind as much of what precedes them as still fits. Each later one
    scores `stride` more; with `stride` equal to `max_seq_len` windows do not overlap.
    """
    windows: list[tuple[int, int, int, int]] = []
    for sequence, (length, first) in enumerate(zip(lengths, first_scored, strict=True)):
        stop = min(length, first + max_seq_len)
        start = max(0, stop - 1 - max_seq_len)
        while first < length:
            windows.append((sequence, start, stop, first))
            first, start, stop = stop, stop + stride - 1 - max_seq_len, min(length, stop + stride)
    return Windows(*np.asarray(windows, np.int64).reshape(-1, 4).T)


def score_sequences(
    lm: LanguageModel,
    sequences: Sequence[Span],
    *,
    max_seq_len: int,
    batch_size: int,
    stride: int | None = None,
    compute: ComputeConfig = ComputeConfig(),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Score token sequences, each as if it were alone.

    Under `jax.set_mesh` rows are split over devices; parameters must then lie on that mesh.

    Args:
        lm: the model.
        sequences: token ids and first scored index of each, see `Span`.
        max_seq_len: the most tokens that a scored token sees, and the longest row T. Where all sequences are shorter,
            so are rows, because attention costs what a row could hold.
        batch_size: rows of `max_seq_len` tokens per call of the model, or as many more as are shorter; a multiple of
            the mesh's data parallelism.
        stride: tokens scored by each further window of a longer sequence; None is `max_seq_len`.
        compute: dtype and attention implementation.
        progress: called with rows done and rows in all.

    Raises:
        ValueError: a first scored index below 1, or a stride or row length that cannot be.
    """
    stride = max_seq_len if stride is None else stride
    if not 1 <= stride <= max_seq_len:
        raise ValueError(f"stride must lie between 1 and max_seq_len ({max_seq_len}), not {stride}")
    if any(first < 1 for _, first in sequences):
        raise ValueError("first scored index must be at least 1: nothing predicts the first token")
    lengths = np.asarray([len(ids) for ids, _ in sequences], np.int64)
    first_scored = np.asarray([first for _, first in sequences], np.int64)
    windows = split_windows(lengths.tolist(), first_scored.tolist(), max_seq_len, stride)
    documents = _window_documents([ids for ids, _ in sequences], lengths, windows)
    row_length = min(max_seq_len, bucket(int(documents.length.max(initial=1)) - 1, SHORTEST_ROW))
    plan = plan_packing(documents.length, row_length)
    rows_per_batch = batch_size * (max_seq_len // row_length)
    skipped = windows.first - windows.start - 1  # pairs at the head of each window that are context only
    sums = np.zeros(len(sequences))
    for rows, logprobs in _row_logprobs(lm, documents, plan, rows_per_batch, compute):
        window, totals = _sum_pieces(logprobs, plan, rows, skipped)
        np.add.at(sums, windows.sequence[window], totals)
        progress(rows.stop, len(plan))
    partial = windows.sequence[windows.start > 0]
    return Scores(sums, np.maximum(lengths - first_scored, 0), plan.tokens, len(np.unique(partial)))


def _window_documents(
    token_ids: Sequence[Sequence[int] | np.ndarray], lengths: np.ndarray, windows: Windows
) -> Documents:
    """Lay the sequences end to end and see each window as one document of the packer."""
    tokens = np.concatenate([np.zeros(0, np.int32), *(np.asarray(ids, np.int32) for ids in token_ids)])
    base = np.cumsum(lengths) - lengths
    return Documents(
        (tokens,),
        None,
        chunk=np.zeros(len(windows.start), np.int32),
        start=base[windows.sequence] + windows.start,
        length=windows.stop - windows.start,
    )


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def _batch_logprobs(params: Params, config: ModelConfig, batch: Batch, compute: ComputeConfig) -> jax.Array:
    """Log-probability `[B, T]` float32 of every target; arbitrary at padding."""
    output = forward_hidden(
        params,
        config,
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        branched=False,
        compute=compute,
    )
    return token_logprobs(params, config, output.hidden, batch["targets"])


def _row_logprobs(
    lm: LanguageModel, documents: Documents, plan: PackPlan, batch_size: int, compute: ComputeConfig
) -> Iterator[tuple[range, np.ndarray]]:
    """Yield row numbers and their log-probabilities `[rows, T]` float64; a batch is read while the next one runs."""
    pending: tuple[range, jax.Array] | None = None
    for begin in range(0, len(plan), batch_size):
        rows = range(begin, min(begin + batch_size, len(plan)))
        missing = batch_size - len(rows)  # the last batch is filled up, so that it needs no program of its own
        host = gather_rows(documents, plan, rows)
        batch = {name: np.pad(array, ((0, missing), (0, 0))) for name, array in host.items() if name != "weights"}
        current = rows, _batch_logprobs(lm.params, lm.config, batch, compute)
        if pending is not None:
            yield _fetch(*pending)
        pending = current
    if pending is not None:
        yield _fetch(*pending)


def _fetch(rows: range, logprobs: jax.Array) -> tuple[range, np.ndarray]:
    return rows, np.asarray(logprobs, np.float64)[: len(rows)]


def _sum_pieces(
    logprobs: np.ndarray, plan: PackPlan, rows: range, skipped: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sum `[rows, T]` log-probabilities over each piece of some rows, without the first `skipped[document]` of it.

    Returns:
        Document and sum of each piece.
    """
    splits = plan.row_splits[rows.start : rows.stop + 1]
    pieces = slice(splits[0], splits[-1])
    document = plan.document[pieces]
    begin = plan.offset[pieces] + skipped[document]
    end = plan.offset[pieces] + plan.stop[pieces] - plan.start[pieces] - 1
    row = np.repeat(np.arange(len(rows)), np.diff(splits))
    running = np.pad(np.cumsum(logprobs, axis=1), ((0, 0), (1, 0)))
    return document, running[row, end] - running[row, begin]
