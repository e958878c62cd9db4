"""Plan once which documents share a row, then build any row by gathering.

Document lengths go in; flat arrays that say what every row holds come out. The plan is best-fit decreasing, run on
whole groups of equally long pieces at a time, so that a million documents take well under a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minillm_jax.data.documents import Documents

Batch = dict[str, np.ndarray]
"""`tokens targets segment_ids positions` int32 and `weights` float32, each [B, T]."""
_NAMES = ("tokens", "targets", "weights", "segment_ids", "positions")


@dataclass(frozen=True)
class PackPlan:
    """What every row holds: row r is made of pieces `row_splits[r]` to `row_splits[r + 1]`.

    Piece p is tokens `start[p]` to `stop[p]` of document `document[p]`. Its n tokens give n - 1 (input, target) pairs,
    which fill the row from `offset[p]` on.
    """

    seq_len: int
    row_splits: np.ndarray  # [rows + 1] int64
    document: np.ndarray  # [pieces] int32
    start: np.ndarray  # [pieces] int32
    stop: np.ndarray  # [pieces] int32
    offset: np.ndarray  # [pieces] int32

    def __len__(self) -> int:
        """Rows."""
        return len(self.row_splits) - 1

    @property
    def tokens(self) -> int:
        """(input, target) pairs in all rows."""
        return int((self.stop - self.start - 1).sum(dtype=np.int64))

    @property
    def fill(self) -> float:
        """Share of the rows' slots that hold a pair."""
        return self.tokens / max(1, len(self) * self.seq_len)


def split_documents(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split documents into pieces of at most `seq_len` (input, target) pairs.

    Neighbouring pieces share one token, the target of the one and the first input of the other, so that each pair of a
    document occurs exactly once. A document of fewer than two tokens has no pairs and gives no piece.

    Args:
        lengths: tokens of each document, [documents] integers.
        seq_len: slots T of a row.

    Returns:
        document, start and stop of each piece, [pieces] int32 each, in document order.
    """
    lengths = lengths.astype(np.int64)
    counts = -(-np.maximum(lengths - 1, 0) // seq_len)
    document = np.repeat(np.arange(len(lengths)), counts)
    first_piece = np.cumsum(counts) - counts
    start = (np.arange(len(document)) - first_piece[document]) * seq_len
    stop = np.minimum(start + seq_len + 1, lengths[document])
    return document.astype(np.int32), start.astype(np.int32), stop.astype(np.int32)


class _Bins:
    """Open rows by the space that is left in them, with the tightest fit found by bit tricks on one integer."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len = seq_len
        self.rows = 0
        self._groups: list[list[np.ndarray]] = [[] for _ in range(seq_len + 1)]
        self._occupied = 0

    def _push(self, space: int, bins: np.ndarray) -> None:
        if space and len(bins):
            self._groups[space].append(bins)
            self._occupied |= 1 << space

    def _take(self, size: int, wanted: int) -> tuple[int, np.ndarray]:
        """Return rows with the least space that fits `size`, as many as `wanted` pieces need, and that space."""
        fitting = self._occupied >> size
        if not fitting:
            count = -(-wanted // (self.seq_len // size))
            self.rows += count
            return self.seq_len, np.arange(self.rows - count, self.rows)
        space = size + (fitting & -fitting).bit_length() - 1
        group = self._groups[space].pop()
        if not self._groups[space]:
            self._occupied ^= 1 << space
        count = min(len(group), -(-wanted // (space // size)))
        self._push(space, group[count:])
        return space, group[:count]

    def place(self, size: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        """Place up to `wanted` pieces of `size` slots into equally full rows.

        Returns:
            Row and offset of each piece placed. The tightest row takes pieces until none fits, as it would one by one.
        """
        space, bins = self._take(size, wanted)
        each = space // size
        placed = min(wanted, each * len(bins))
        index = np.arange(placed)
        row, offset = bins[index // each], self.seq_len - space + index % each * size
        full, rest = divmod(placed, each)
        self._push(space - each * size, bins[:full])
        if rest:
            self._push(space - rest * size, bins[full : full + 1])
        return row, offset


def plan_packing(lengths: np.ndarray, seq_len: int) -> PackPlan:
    """Plan rows of `seq_len` slots that hold every pair of every document once, with little padding.

    Best-fit decreasing: the longest piece first, into the row with the least space that still takes it. Deterministic.

    Args:
        lengths: tokens of each document, [documents] integers.
        seq_len: slots T of a row, at least 1.

    Returns:
        The plan; its `document` indexes `lengths`.
    """
    document, start, stop = split_documents(lengths, seq_len)
    sizes = stop - start - 1
    order = np.argsort(-sizes, kind="stable")
    counts = np.bincount(sizes, minlength=seq_len + 1)
    bins, done = _Bins(seq_len), 0
    row, offset = np.empty(len(order), np.int64), np.empty(len(order), np.int32)
    for size in np.flatnonzero(counts)[::-1].tolist():
        end = done + int(counts[size])
        while done < end:
            rows, offsets = bins.place(size, end - done)
            row[done : done + len(rows)] = rows
            offset[done : done + len(rows)] = offsets
            done += len(rows)
    # Offsets of a row grow in placing order, which a stable sort keeps.
    by_row = np.argsort(row, kind="stable")
    pieces = order[by_row]
    row_splits = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=bins.rows))])
    return PackPlan(seq_len, row_splits, document[pieces], start[pieces], stop[pieces], offset[by_row])


def concatenate_plans(plans: Sequence[PackPlan], documents: Sequence[int]) -> PackPlan:
    """Put the rows of several plans one after another.

    Args:
        plans: plans of equal `seq_len`, each over a store of its own.
        documents: how many documents each of these stores holds; the result indexes them end to end.
    """
    first_piece = np.cumsum([0, *(len(plan.document) for plan in plans)])
    first_document = np.cumsum([0, *documents])
    splits = [plan.row_splits[1:] + first for plan, first in zip(plans, first_piece, strict=False)]
    ids = [plan.document + first for plan, first in zip(plans, first_document, strict=False)]
    return PackPlan(
        plans[0].seq_len,
        np.concatenate([[0], *splits]),
        np.concatenate(ids).astype(np.int32),
        np.concatenate([plan.start for plan in plans]),
        np.concatenate([plan.stop for plan in plans]),
        np.concatenate([plan.offset for plan in plans]),
    )


def empty_batch(rows: int, seq_len: int) -> Batch:
    """Make a batch of nothing but padding: every array is zero."""
    return {name: np.zeros((rows, seq_len), np.float32 if name == "weights" else np.int32) for name in _NAMES}


def gather_rows(documents: Documents, plan: PackPlan, rows: Sequence[int]) -> Batch:
    """Build some rows of a plan.

    Args:
        documents: the store that `plan.document` indexes.
        plan: which pieces make which row.
        rows: row numbers, [B].

    Returns:
        A batch [B, T]. Segments count from 1 in each row; positions restart with each; padding is 0 everywhere.
    """
    batch = empty_batch(len(rows), plan.seq_len)
    count = np.arange(plan.seq_len, dtype=np.int32)
    for b, row in enumerate(rows):
        tokens, targets, weights, segment_ids, positions = (batch[name][b] for name in _NAMES)
        pieces = slice(plan.row_splits[row], plan.row_splits[row + 1])
        ids = plan.document[pieces]
        chunk, base = documents.chunk[ids].tolist(), documents.start[ids]
        start, stop = (base + plan.start[pieces]).tolist(), (base + plan.stop[pieces]).tolist()
        for segment, begin in enumerate(plan.offset[pieces].tolist()):
            c, first, last = chunk[segment], start[segment], stop[segment]
            end = begin + last - first - 1
            tokens[begin:end] = documents.tokens[c][first : last - 1]
            targets[begin:end] = documents.tokens[c][first + 1 : last]
            weights[begin:end] = 1 if documents.masks is None else documents.masks[c][first + 1 : last]
            segment_ids[begin:end] = segment + 1
            positions[begin:end] = count[: end - begin]
    return batch
