"""Which slot of the cache holds what: the host's books of slots, and the search for a beginning that was read before.

A slot keeps its tokens when its request has ended, until another needs the room. A prompt that begins like them takes
the slot over and goes on from there; one that begins like a slot in use, or like a small part of an idle one, has the
slot copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Slot:
    """One row of the cache.

    Attributes:
        number: its row.
        tokens: what has been read into it, in order.
        adapter: number of the adapter that it was read with.
        used: whether a request has it.
        last_used: turn in which it was last given away or back; the smallest is evicted first.
    """

    number: int
    tokens: list[int] = field(default_factory=list)
    adapter: int = 0
    used: bool = False
    last_used: int = 0


@dataclass(frozen=True)
class Place:
    """Where a prompt goes.

    Attributes:
        slot: the slot, now in use, whose `tokens` are the beginning that need not be read again.
        source: number of another slot that must be copied to it first, or None.
    """

    slot: Slot
    source: int | None


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Count the tokens that two sequences have in common at their beginning."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


class Slots:
    """All slots of the cache.

    Args:
        count: how many.
        worth_reuse: shortest beginning that is not read anew, if it is less than half of the prompt. A shorter one
            costs more than it saves: only prompts of which nothing was read before share a piece.
    """

    def __init__(self, count: int, worth_reuse: int) -> None:
        self.slots = [Slot(i) for i in range(count)]
        self._worth_reuse = worth_reuse
        self._turn = 0

    @property
    def used(self) -> int:
        """Slots in use."""
        return sum(slot.used for slot in self.slots)

    @property
    def used_tokens(self) -> int:
        """Tokens that slots in use hold."""
        return sum(len(slot.tokens) for slot in self.slots if slot.used)

    def take(self, prompt: Sequence[int], adapter: int, *, reuse: bool = True) -> Place | None:
        """Give a prompt a slot; None when all are in use.

        At least the prompt's last token is left to read, because its logits begin the completion.

        Args:
            prompt: token ids.
            adapter: number of the adapter; what another one read is of no use.
            reuse: whether a beginning may be left unread.
        """
        idle = [slot for slot in self.slots if not slot.used]
        if not idle:
            return None
        oldest = min(idle, key=lambda slot: (bool(slot.tokens), slot.last_used))
        shared, best = 0, oldest
        if reuse:
            wanted = prompt[:-1]
            alike = [slot for slot in self.slots if slot.adapter == adapter]
            found = [(common_prefix(slot.tokens, wanted), not slot.used, slot) for slot in alike]
            shared, _, best = max(found, key=lambda entry: entry[:2], default=(0, True, oldest))
        enough = shared >= self._worth_reuse
        little_lost = best is oldest or 2 * shared >= len(best.tokens)
        if not best.used and little_lost and (enough or 2 * shared >= len(prompt)):
            chosen, source = best, None
        elif enough:
            chosen, source = oldest, best.number
        else:
            chosen, source, shared = oldest, None, 0
        chosen.tokens = list(prompt[:shared])
        chosen.adapter = adapter
        chosen.used = True
        self._touch(chosen)
        return Place(chosen, source)

    def give_back(self, slot: Slot) -> None:
        """End the use of a slot; what it holds stays until the room is needed."""
        slot.used = False
        self._touch(slot)

    def _touch(self, slot: Slot) -> None:
        self._turn += 1
        slot.last_used = self._turn
