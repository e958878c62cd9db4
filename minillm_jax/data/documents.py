"""A store of tokenised documents: memory-mapped Arrow chunks seen through numpy, never read into memory as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Documents:
    """Token ids and loss masks of many documents.

    Document d is the `length[d]` tokens from `start[d]` on of chunk `chunk[d]`.
    """

    tokens: tuple[np.ndarray, ...]  # for each chunk [chunk tokens], uint16 or int32
    masks: tuple[np.ndarray, ...] | None  # for each chunk [chunk tokens] uint8; None where every token is trained
    chunk: np.ndarray  # [documents] int32
    start: np.ndarray  # [documents] int64
    length: np.ndarray  # [documents] int64
    margins: np.ndarray | None = None  # [documents] float32, the margin of a document's pair; None where there are none

    def __len__(self) -> int:
        """Documents."""
        return len(self.length)

    def take(self, indices: np.ndarray) -> Documents:
        """Return the documents at `indices`, an integer or boolean array."""
        return dataclasses.replace(
            self,
            chunk=self.chunk[indices],
            start=self.start[indices],
            length=self.length[indices],
            margins=None if self.margins is None else self.margins[indices],
        )

    def truncate(self, limit: int) -> Documents:
        """Return the documents cut after `limit` tokens."""
        return dataclasses.replace(self, length=np.minimum(self.length, limit))

    def trained_tokens(self) -> np.ndarray:
        """Count the targets that carry loss in each document, [documents] int64; its first token is no target."""
        if self.masks is None:
            return np.maximum(self.length - 1, 0)
        trained = np.zeros(len(self), np.int64)
        by_chunk = np.argsort(self.chunk, kind="stable")
        ends = np.searchsorted(self.chunk[by_chunk], np.arange(1, len(self.masks)))
        for mask, here in zip(self.masks, np.split(by_chunk, ends), strict=True):
            total = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
            start, length = self.start[here], self.length[here]
            trained[here] = total[start + length] - total[start + np.minimum(length, 1)]
        return trained


def read_documents(path: Path) -> Documents:
    """Map an Arrow file into memory: lists of integers `input_ids` and possibly `loss_mask`, and possibly `margin`."""
    import datasets  # takes seconds to import, and reading records or running `--help` does not need it

    table = datasets.Dataset.from_file(str(path)).data
    chunks = table.column("input_ids").chunks
    tokens = tuple(chunk.values.to_numpy(zero_copy_only=True) for chunk in chunks)
    masks = None
    if "loss_mask" in table.column_names:
        masks = tuple(chunk.values.to_numpy(zero_copy_only=True) for chunk in table.column("loss_mask").chunks)
    margins = None
    if "margin" in table.column_names:
        margins = np.concatenate([np.zeros(0, np.float32), *(c.to_numpy() for c in table.column("margin").chunks)])
    offsets = [chunk.offsets.to_numpy(zero_copy_only=True).astype(np.int64) for chunk in chunks]
    none = np.zeros(0, np.int64)
    return Documents(
        tokens,
        masks,
        chunk=np.repeat(np.arange(len(chunks), dtype=np.int32), [len(chunk) for chunk in chunks]),
        start=np.concatenate([none, *(o[:-1] for o in offsets)]),
        length=np.concatenate([none, *(np.diff(o) for o in offsets)]),
        margins=margins,
    )


def concatenate_documents(stores: Sequence[Documents]) -> Documents:
    """Put stores of the same kind one after another, without copying tokens."""
    first_chunk = np.cumsum([0, *(len(store.tokens) for store in stores)])
    masks = None
    if all(store.masks is not None for store in stores):
        masks = tuple(mask for store in stores for mask in store.masks or ())
    margins = [store.margins for store in stores if store.margins is not None]
    return Documents(
        tuple(chunk for store in stores for chunk in store.tokens),
        masks,
        chunk=np.concatenate([store.chunk + first for store, first in zip(stores, first_chunk, strict=False)]),
        start=np.concatenate([store.start for store in stores]),
        length=np.concatenate([store.length for store in stores]),
        margins=np.concatenate(margins) if len(margins) == len(stores) else None,
    )
