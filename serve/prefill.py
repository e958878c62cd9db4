"""How prompts are cut into pieces: which can be read together, and what size is read next. Host only, no jax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serve.live import Live

PADDING = 32
"""Tokens whose reading takes as long as reading the weights (measured on two cores, with 26 M parameters: 35)."""


@dataclass(frozen=True)
class Part:
    """Tokens `start` to `end` of a prompt, which follow what its slot holds."""

    live: Live
    start: int
    end: int

    def __len__(self) -> int:
        """Count the tokens."""
        return self.end - self.start

    @property
    def targets(self) -> list[int]:
        """The tokens that follow each of them; any token behind the last of a prompt."""
        return [*self.live.prompt[self.start + 1 : self.end + 1], 0][: len(self)]


def joins(parts: Sequence[Part], live: Live, most: int) -> bool:
    """Whether a prompt can be read in one piece with these parts, of which a piece holds at most so many.

    Only the first part of a piece may follow tokens that were read before, and all have one adapter.
    """
    return not parts or (live.read == 0 and live.adapter == parts[0].live.adapter and len(parts) < most)


def piece_size(remaining: int, sizes: Sequence[int]) -> int:
    """Choose the size of the next piece, when so many tokens remain to be read.

    A piece reads all weights once, which takes as long as `PADDING` tokens of it: up to so many are filled in rather
    than to read another, smaller piece.
    """
    fitting = next((size for size in sizes if size >= remaining), None)
    if fitting is not None and fitting - remaining <= PADDING:
        return fitting
    return max((size for size in sizes if size <= remaining), default=sizes[0])


def cut(parts: Sequence[Part], sizes: Sequence[int]) -> list[tuple[int, list[Part]]]:
    """Cut parts, which may follow each other, into pieces; returns the size and the parts of each.

    A part that does not fit into its piece goes on in the next.
    """
    pieces, left = [], list(parts)
    while left:
        size = piece_size(sum(map(len, left)), sizes)
        room, piece = size, []
        while left and room > 0:
            part = left.pop(0)
            end = min(part.end, part.start + room)
            piece.append(Part(part.live, part.start, end))
            room -= end - part.start
            if end < part.end:
                left.insert(0, Part(part.live, end, part.end))
        pieces.append((size, piece))
    return pieces
