"""Files to training rows, and rows to an endless stream of batches.

`load_rows` tokenises, sets documents aside for validation and plans the packing; `make_iterator` draws rows in an order
that is reshuffled each epoch. grain sees nothing but row numbers, and a batch of numbers is gathered in one go, so that
the iterator's whole state is one index.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from minillm_jax.data.documents import Documents, concatenate_documents
from minillm_jax.data.encode import Report, cache_folder, tokenize_file
from minillm_jax.data.errors import DataError, OnBadRow, SkipReport
from minillm_jax.data.packing import Batch, PackPlan, concatenate_plans, gather_rows, plan_packing
from minillm_jax.data.sources import Source, resolve_sources
from minillm_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Share:
    """Rows `first` to `stop`, and the weight with which they are drawn."""

    first: int
    stop: int
    weight: float


class Rows(Protocol):
    """What can be trained on: rows with random access. `TokenRows` are the usual ones."""

    @property
    def shares(self) -> tuple[Share, ...]:
        """One for all rows together, or one for each weighted path."""

    def __len__(self) -> int:
        """Rows, which is also the length of an epoch."""

    def gather(self, indices: Sequence[int]) -> Batch:
        """Return rows as arrays [B, ...]; one of zeros is padding."""


@dataclass(frozen=True)
class TokenRows:
    """Packed rows with random access: `rows[i]` is one row of arrays [T], `rows.gather(indices)` a batch [B, T]."""

    documents: Documents
    plan: PackPlan
    shares: tuple[Share, ...]
    """One for all rows together, or one for each weighted path."""

    def __len__(self) -> int:
        """Rows, which is also the length of an epoch."""
        return len(self.plan)

    def __getitem__(self, index: int) -> Batch:
        """Return row `index` as arrays [T]."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return {name: array[0] for name, array in self.gather([index]).items()}

    @property
    def tokens(self) -> int:
        """(input, target) pairs of an epoch, padding not counted."""
        return self.plan.tokens

    @property
    def trained_tokens(self) -> int:
        """Pairs of an epoch that carry loss."""
        return int(self.documents.trained_tokens().sum())

    @property
    def fill(self) -> float:
        """Share of all slots that hold a pair."""
        return self.plan.fill

    def gather(self, indices: Sequence[int]) -> Batch:
        """Return rows as arrays [B, T]."""
        return gather_rows(self.documents, self.plan, indices)

    def describe(self) -> str:
        """Say for the screen how much there is to learn from."""
        return (
            f"{len(self.documents):,} documents in {len(self):,} rows of {self.plan.seq_len}: {self.tokens:,} tokens, "
            f"{self.trained_tokens:,} of them trained; rows are {self.fill:.1%} full"
        )


def load_rows(
    path_specs: Sequence[str],
    kind: str,
    tokenizer: Tokenizer,
    max_seq_len: int,
    *,
    on_bad_row: OnBadRow = "error",
    cache_dir: str | None = None,
    num_proc: int = 1,
    seed: int = 0,
    valid_fraction: float = 0.0,
    valid_path: Sequence[str] = (),
    report: Report = print,
) -> tuple[TokenRows, TokenRows | None]:
    """Make rows for training, and for validation if any are asked for.

    Text longer than a row is split without losing a token; a conversation longer than a row is cut at its end. Paths
    with weights are packed each on their own and drawn by their weights; without weights all are packed together.

    Args:
        path_specs: files or folders, each with an optional `:weight`.
        kind: "pretrain" or "sft".
        tokenizer: encodes plain text and, for sft, carries the chat template.
        max_seq_len: slots T of a row; at most T + 1 tokens of a document share one.
        on_bad_row: "error" stops at the first bad row; "skip" leaves it out and reports it.
        cache_dir: where tokenised files are kept; None is $MINILLM_CACHE or ~/.cache/minillm_jax.
        num_proc: processes that tokenise.
        seed: decides which documents are set aside.
        valid_fraction: share of the documents to set aside when there is no `valid_path`.
        valid_path: files of held-out documents; their weights are ignored.
        report: receives lines for the screen.

    Returns:
        Training rows, and validation rows or None.

    Raises:
        DataError: a bad row, files that cannot be read, or too few documents.
    """
    tokenize = Tokenize(kind, tokenizer, max_seq_len, on_bad_row, cache_dir, num_proc, report)
    sources = resolve_sources(path_specs)
    stores = tokenize(sources)
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        stores, weights = [concatenate_documents(stores)], [1.0]
    valid: TokenRows | None = None
    if valid_path:
        held_out = tokenize(resolve_sources(valid_path))
        valid = _pack([concatenate_documents(held_out)], [1.0], max_seq_len)
    elif valid_fraction > 0:
        stores, held_out_documents = _set_aside(stores, valid_fraction, seed)
        for source, store in zip(sources, stores, strict=False):  # without weights there is one store, never empty
            if not len(store):
                raise DataError(f"{source.path}: every document was set aside for validation; give --valid_fraction 0")
        valid = _pack([held_out_documents], [1.0], max_seq_len)
    train = _pack(stores, weights, max_seq_len)
    report(f"training: {train.describe()}")
    if valid is not None:
        report(f"validation: {valid.describe()}")
    return train, valid


@dataclass(frozen=True)
class Tokenize:
    """Tokenises sources and reports what came of it."""

    kind: str
    tokenizer: Tokenizer
    max_seq_len: int
    on_bad_row: OnBadRow
    cache_dir: str | None
    num_proc: int
    report: Report

    def __call__(self, sources: Sequence[Source]) -> list[Documents]:
        """Return the usable documents of each source, cut to the row length if they are conversations."""
        return self._usable(sources, self.whole(sources))

    def whole(self, sources: Sequence[Source]) -> list[Documents]:
        """Return all documents of each source, whatever their length."""
        begin, skipped = time.monotonic(), SkipReport()
        documents, files = {True: 0, False: 0}, {True: 0, False: 0}
        stores = []
        for source in sources:
            found = [
                tokenize_file(
                    file,
                    self.kind,
                    self.tokenizer,
                    on_bad_row=self.on_bad_row,
                    cache_dir=self.cache_dir,
                    num_proc=self.num_proc,
                    report=self.report,
                )
                for file in source.files
            ]
            for file in found:
                documents[file.reused] += len(file.documents)
                files[file.reused] += 1
                skipped.merge(file.skipped)
            stores.append(concatenate_documents([file.documents for file in found]))
        folder, seconds = cache_folder(self.cache_dir), time.monotonic() - begin
        if files[False]:
            made = f"tokenised {documents[False]:,} documents of {files[False]:,} file(s) in {seconds:.1f} s"
            self.report(f"{made}; cached in {folder}")
        if files[True]:
            self.report(f"reusing {documents[True]:,} tokenised documents of {files[True]:,} file(s) from {folder}")
        for line in skipped.lines():
            self.report(line)
        return stores

    def _usable(self, sources: Sequence[Source], stores: Sequence[Documents]) -> list[Documents]:
        limit, cut, useless, usable = self.max_seq_len + 1, 0, 0, []
        for source, store in zip(sources, stores, strict=True):
            if self.kind == "sft":
                cut += int((store.length > limit).sum())
                store = store.truncate(limit)
            trained = store.trained_tokens() > 0
            if not trained.any():
                raise DataError(f"{source.path}: not one of its {len(store):,} usable rows holds a token to train on")
            useless += int((~trained).sum())
            usable.append(store.take(trained))
        if cut:
            self.report(f"cut {cut:,} conversations to {limit:,} tokens; a larger --max_seq_len would keep them whole")
        if useless:
            self.report(f"left out {useless:,} documents without a token to train on")
        return usable


def held_out_mask(count: int, fraction: float, seed: int) -> np.ndarray:
    """Choose documents for validation by a hash of their index, so that appending documents moves none of the others.

    Args:
        count: documents, at least 2.
        fraction: share to choose; at least one is chosen, and at least one is not.
        seed: another seed chooses others.

    Returns:
        [count] bool, True for validation.
    """
    key = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    x = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key  # splitmix64; uint64 wraps around
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    chosen = x.astype(np.float64) / 2.0**64 < fraction
    chosen[np.argmin(x)], chosen[np.argmax(x)] = True, False
    return chosen


def _set_aside(stores: list[Documents], fraction: float, seed: int) -> tuple[list[Documents], Documents]:
    """Split off documents for validation; returns what remains of each store, and what was taken."""
    counts = [len(store) for store in stores]
    if sum(counts) < 2:
        raise DataError("one document cannot be split into training and validation; give --valid_fraction 0")
    masks = np.split(held_out_mask(sum(counts), fraction, seed), np.cumsum(counts)[:-1])
    taken = [store.take(mask) for store, mask in zip(stores, masks, strict=True)]
    return [store.take(~mask) for store, mask in zip(stores, masks, strict=True)], concatenate_documents(taken)


def _pack(stores: Sequence[Documents], weights: Sequence[float], seq_len: int) -> TokenRows:
    plans = [plan_packing(store.length, seq_len) for store in stores]
    stops = np.cumsum([len(plan) for plan in plans]).tolist()
    shares = tuple(map(Share, [0, *stops[:-1]], stops, weights))
    return TokenRows(concatenate_documents(stores), concatenate_plans(plans, [len(s) for s in stores]), shares)


class _EpochOrder:
    """Replaces the i-th number of rows counted over and over by the i-th of rows shuffled anew each time around.

    grain's own shuffle needs no memory, but on fewer than a thousand rows it takes longer than a training step.
    """

    def __init__(self, share: Share, seed: tuple[int, ...]) -> None:
        self.share, self.seed = share, seed
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def _permute(self, epoch: int) -> np.ndarray:
        rows = np.arange(self.share.first, self.share.stop)
        return np.random.default_rng((*self.seed, epoch)).permutation(rows)

    def __call__(self, index: int, _row: int) -> int:
        epoch, position = divmod(index, self.share.stop - self.share.first)
        return int(self._permutation(epoch)[position])


def make_iterator(rows: Rows, rows_per_step: int, seed: int, process_index: int = 0, process_count: int = 1) -> Any:
    """Draw batches for ever, in an order that is shuffled anew each epoch.

    Without weights each row occurs exactly once an epoch; batches run on across the end of one, so that no row is lost.
    With weights each path's rows are drawn in proportion, each path reshuffled whenever it has been used up.

    Args:
        rows: what to draw from.
        rows_per_step: rows B of a step over all processes.
        seed: decides the order.
        process_index: which of the processes this one is.
        process_count: processes that share each step's rows evenly.

    Returns:
        A grain iterator of batches [B / process_count, ...]. Its `get_state()` is a small JSON-able dict; after
        `set_state` with it, another iterator continues with the very next batch.

    Raises:
        DataError: the processes cannot share a step's rows evenly.
    """
    import grain  # imports jax, which nothing else in this package needs

    if rows_per_step % process_count:
        raise DataError(f"{rows_per_step} rows a step cannot be shared evenly by {process_count} processes")
    streams = [
        grain.MapDataset.range(share.first, share.stop).repeat().map_with_index(_EpochOrder(share, (seed, number)))
        for number, share in enumerate(rows.shares)
    ]
    order = grain.MapDataset.mix(streams, [share.weight for share in rows.shares]) if len(streams) > 1 else streams[0]
    batches = order[process_index::process_count].batch(rows_per_step // process_count, batch_fn=list).map(rows.gather)
    # Rows are in memory already: threads and buffers would cost more than gathering them.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def eval_batches(rows: Rows, batch_size: int) -> Iterator[Batch]:
    """Go through all rows once, in order; the last batch [B, ...] is filled up with rows of zeros."""
    for first in range(0, len(rows), batch_size):
        indices = range(first, min(first + batch_size, len(rows)))
        missing = batch_size - len(indices)
        batch = rows.gather(indices)
        yield {name: np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) for name, array in batch.items()}
