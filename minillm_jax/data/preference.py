"""Preference rows to pairs of tokenised answers, with random access.

Both sides of a pair are rendered whole and stored as neighbouring documents, so that tokenising, caching and reporting
are those of every other kind of row; `PairRows` gathers them as arrays [B, 2, T], chosen before rejected. Pairs are not
packed: a row of the batch is one pair.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from minillm_jax.data.documents import Documents, concatenate_documents
from minillm_jax.data.encode import Encoded, Report
from minillm_jax.data.errors import DataError, OnBadRow
from minillm_jax.data.loader import Share, Tokenize, held_out_mask
from minillm_jax.data.packing import Batch, PackPlan, gather_rows
from minillm_jax.data.sources import Source, resolve_sources
from minillm_jax.tokenizer import Tokenizer

LENGTH_STEP = 32
"""Rows are a multiple of this long, if `max_seq_len` allows, so that similar data shares compiled programs."""


@dataclass(frozen=True)
class PairRows:
    """Pairs with random access: `rows.gather(indices)` is a batch [B, 2, T]."""

    documents: Documents
    """Chosen and rejected in turn, each cut to T + 1 tokens; only answers carry loss."""
    seq_len: int
    """Slots T of a row."""
    shares: tuple[Share, ...]
    """One for all pairs together, or one for each weighted path."""
    ref_logps: np.ndarray | None = None
    """[N, 2] float32 log-probabilities of the answers under a reference model, once they are known."""

    def __len__(self) -> int:
        """Pairs, which is also the length of an epoch."""
        return len(self.documents) // 2

    @property
    def margins(self) -> np.ndarray:
        """[N] float32, by how much each chosen answer's reward should lead; 0 where a row does not say."""
        margins = self.documents.margins
        return np.zeros(len(self), np.float32) if margins is None else margins[::2]

    @property
    def answer_lengths(self) -> np.ndarray:
        """[N, 2] int64, tokens of the answers as far as they are kept, what closes their turn included."""
        return self.documents.trained_tokens().reshape(-1, 2)

    def gather(self, indices: Sequence[int]) -> Batch:
        """Return pairs as arrays [B, 2, T], `margin` [B], and `ref_logps` [B, 2] if they are known."""
        pairs = np.asarray(indices, np.int64)
        sides = self.documents.take(np.stack([2 * pairs, 2 * pairs + 1], axis=1).reshape(-1))
        number = np.arange(len(sides) + 1, dtype=np.int32)
        zeros = np.zeros(len(sides), np.int32)
        one_each = PackPlan(self.seq_len, number, number[:-1], zeros, sides.length.astype(np.int32), zeros)
        flat = gather_rows(sides, one_each, range(len(sides)))
        batch = {name: array.reshape(len(pairs), 2, self.seq_len) for name, array in flat.items()}
        batch["margin"] = self.margins[pairs]
        if self.ref_logps is not None:
            batch["ref_logps"] = self.ref_logps[pairs]
        return batch

    def describe(self) -> str:
        """Say for the screen how much there is to learn from."""
        tokens = int((self.documents.length - 1).sum())
        trained = int(self.documents.trained_tokens().sum())
        fill = tokens / max(1, len(self.documents) * self.seq_len)
        return (
            f"{len(self):,} pairs in rows of 2 x {self.seq_len}: {tokens:,} tokens, {trained:,} of them in answers; "
            f"rows are {fill:.1%} full"
        )

    def fingerprint(self) -> str:
        """Hash of everything that `gather` returns, `ref_logps` aside."""
        digest = hashlib.sha256(str(self.seq_len).encode())
        for i in range(len(self.documents)):
            digest.update(self.documents.length[i].tobytes())
            for array in _side(self.documents, i):
                digest.update(np.ascontiguousarray(array, np.int32).tobytes())
        if self.margins.any():  # rows without margins keep the hash that they had before there were any
            digest.update(self.margins.tobytes())
        return digest.hexdigest()


def load_pairs(
    path_specs: Sequence[str],
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
) -> tuple[PairRows, PairRows | None]:
    """Make pairs for training, and for validation if any are asked for.

    A prompt is never cut, because half a prompt is another prompt: answers are cut at their end. A pair of which an
    answer is cut away entirely, or whose answers are the same as far as they are kept, is left out and counted.

    Args:
        path_specs: files or folders, each with an optional `:weight`.
        tokenizer: carries the chat template.
        max_seq_len: the most slots T of a row; rows are no longer than the longest pair needs.
        on_bad_row: "error" stops at the first bad row; "skip" leaves it out and reports it.
        cache_dir: where tokenised files are kept; None is $MINILLM_CACHE or ~/.cache/minillm_jax.
        num_proc: processes that tokenise.
        seed: decides which pairs are set aside.
        valid_fraction: share of the pairs to set aside when there is no `valid_path`.
        valid_path: files of held-out pairs; their weights are ignored.
        report: receives lines for the screen.

    Returns:
        Training pairs, and validation pairs or None.

    Raises:
        DataError: a bad row, files that cannot be read, or too few pairs.
    """
    tokenize = Tokenize("preference", tokenizer, max_seq_len, on_bad_row, cache_dir, num_proc, report)
    sources = resolve_sources(path_specs)
    stores = _usable(sources, tokenize.whole(sources), max_seq_len, report)
    held_out: Documents | None = None
    if valid_path:
        held_sources = resolve_sources(valid_path)
        held_out = concatenate_documents(_usable(held_sources, tokenize.whole(held_sources), max_seq_len, report))
    elif valid_fraction > 0:
        stores, held_out = _set_aside(sources, stores, valid_fraction, seed)
    stops = np.cumsum([len(store) // 2 for store in stores]).tolist()
    if sources[0].weight is None:
        shares: tuple[Share, ...] = (Share(0, stops[-1], 1.0),)
    else:
        shares = tuple(
            Share(a, b, float(s.weight or 0)) for (a, b), s in zip(pairwise([0, *stops]), sources, strict=True)
        )
    longest = max(int(store.length.max(initial=2)) for store in [*stores, *([] if held_out is None else [held_out])])
    seq_len = _row_length(longest, max_seq_len)
    train = PairRows(concatenate_documents(stores), seq_len, shares)
    report(f"training: {train.describe()}")
    if held_out is None:
        return train, None
    valid = PairRows(held_out, seq_len, (Share(0, len(held_out) // 2, 1.0),))
    report(f"validation: {valid.describe()}")
    return train, valid


def pair_rows(encoded: Encoded, max_seq_len: int, report: Report = print) -> PairRows:
    """Make rows of pairs that were encoded, in memory; what does not fit is cut or left out as by `load_pairs`.

    Args:
        encoded: from `encode.encode_preference`.
        max_seq_len: the most slots T of a row; rows are no longer than the longest pair needs.
        report: receives lines for the screen.

    Raises:
        DataError: no pair fits.
    """
    starts = np.cumsum(encoded.lengths) - encoded.lengths
    masks = None if encoded.mask is None else (encoded.mask,)
    chunk = np.zeros(len(starts), np.int32)
    whole = Documents((encoded.ids,), masks, chunk, starts, encoded.lengths, encoded.margins)
    documents, fit = _fit(whole, max_seq_len + 1)
    if not len(documents):
        raise DataError(_nothing_fits(len(whole) // 2, max_seq_len))
    fit.tell(max_seq_len + 1, report)
    seq_len = _row_length(int(documents.length.max()), max_seq_len)
    return PairRows(documents, seq_len, (Share(0, len(documents) // 2, 1.0),))


def _row_length(longest: int, max_seq_len: int) -> int:
    """Slots that documents of at most `longest` tokens need."""
    return min(max_seq_len, -(-(longest - 1) // LENGTH_STEP) * LENGTH_STEP)


def _nothing_fits(pairs: int, max_seq_len: int) -> str:
    return (
        f"not one of its {pairs:,} pairs fits; --max_seq_len {max_seq_len} leaves no room for different answers behind "
        "their prompts"
    )


@dataclass(frozen=True)
class _Fit:
    """How many pairs were cut, have no answer left, or have the same one."""

    cut: int = 0
    gone: int = 0
    alike: int = 0

    def __add__(self, other: _Fit) -> _Fit:
        return _Fit(self.cut + other.cut, self.gone + other.gone, self.alike + other.alike)

    def tell(self, limit: int, report: Report) -> None:
        if self.cut:
            cut = f"cut answers of {self.cut:,} pairs to {limit:,} tokens"
            report(f"{cut}; a larger --max_seq_len would keep them whole")
        if self.gone:
            report(f"left out {self.gone:,} pairs whose prompt leaves no room for an answer in {limit:,} tokens")
        if self.alike:
            report(f"left out {self.alike:,} pairs whose answers are the same in their first {limit:,} tokens")


def _fit(whole: Documents, limit: int) -> tuple[Documents, _Fit]:
    """Cut documents to `limit` tokens and leave out pairs that this makes useless."""
    store = whole.truncate(limit)
    was_cut = np.any((whole.length > limit).reshape(-1, 2), axis=1)
    empty = np.any((store.trained_tokens() == 0).reshape(-1, 2), axis=1)
    same = np.zeros(len(was_cut), bool)
    for pair in np.flatnonzero(was_cut & ~empty).tolist():
        same[pair] = np.array_equal(_side(store, 2 * pair)[0], _side(store, 2 * pair + 1)[0])
    keep = ~(empty | same)
    fit = _Fit(int((was_cut & keep).sum()), int(empty.sum()), int(same.sum()))
    return store.take(np.repeat(keep, 2)), fit


def _usable(
    sources: Sequence[Source], stores: Sequence[Documents], max_seq_len: int, report: Report
) -> list[Documents]:
    """Fit the pairs of each source to the row length."""
    total, usable = _Fit(), []
    for source, whole in zip(sources, stores, strict=True):
        if not len(whole):
            raise DataError(f"{source.path}: every row was skipped; there is nothing to learn from")
        store, fit = _fit(whole, max_seq_len + 1)
        if not len(store):
            raise DataError(f"{source.path}: {_nothing_fits(len(whole) // 2, max_seq_len)}")
        total += fit
        usable.append(store)
    total.tell(max_seq_len + 1, report)
    return usable


def _side(documents: Documents, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and loss mask of one document."""
    if documents.masks is None:
        raise ValueError("documents of preference rows have a loss mask")
    chunk, piece = documents.chunk[i], slice(documents.start[i], documents.start[i] + documents.length[i])
    return documents.tokens[chunk][piece], documents.masks[chunk][piece]


def _set_aside(
    sources: Sequence[Source], stores: Sequence[Documents], fraction: float, seed: int
) -> tuple[list[Documents], Documents]:
    """Split off pairs for validation; returns what remains of each store, and what was taken."""
    counts = [len(store) // 2 for store in stores]
    if sum(counts) < 2:
        raise DataError("one pair cannot be split into training and validation; give --valid_fraction 0")
    masks = np.split(held_out_mask(sum(counts), fraction, seed), np.cumsum(counts)[:-1])
    for source, mask in zip(sources, masks, strict=True):
        if mask.all():
            raise DataError(f"{source.path}: every pair was set aside for validation; give --valid_fraction 0")
    taken = [store.take(np.repeat(mask, 2)) for store, mask in zip(stores, masks, strict=True)]
    rest = [store.take(np.repeat(~mask, 2)) for store, mask in zip(stores, masks, strict=True)]
    return rest, concatenate_documents(taken)
