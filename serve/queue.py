"""Requests on their way to the engine's thread: a bounded queue that any thread may fill, and its books.

Requests are counted, and so are the tokens that they may cost, because a few long ones keep the device as busy as many
short ones. Whoever finds the queue full is told when there is probably room, from the speed of late.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from serve.protocol import EngineBusyError, EngineStoppedError, Request, Sink


@dataclass(frozen=True)
class Entry:
    """One request with its number and whom to tell.

    Attributes:
        number: unique in the engine.
        request: what is asked for.
        sink: takes its events.
        cost: tokens of the prompt and of the longest completion.
        pooled: takes the sum `[D]` of the prompt's hidden states, for embeddings.
    """

    number: int
    request: Request
    sink: Sink
    cost: int
    pooled: Callable[[np.ndarray], None] | None = None


class Throughput:
    """Tokens per second of work, a mean that forgets what is older than about half a minute of work."""

    def __init__(self, guess: float = 100.0, memory: float = 30.0) -> None:
        self._tokens, self._seconds, self._memory = guess, 1.0, memory

    def add(self, tokens: int, seconds: float) -> None:
        """Count tokens that took so long."""
        kept = math.exp(-seconds / self._memory)
        self._tokens, self._seconds = self._tokens * kept + tokens, self._seconds * kept + seconds

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return max(self._tokens / self._seconds, 1.0)


class RequestQueue:
    """First come, first served; bounded by requests and by tokens.

    Args:
        max_requests: most requests that wait.
        max_tokens: most tokens that they may cost; a request alone in the queue may cost more.
        context: most tokens that one request can cost, whatever it asks for.
    """

    def __init__(self, max_requests: int, max_tokens: int, context: int) -> None:
        self._changed = threading.Condition()
        self._entries: deque[Entry] = deque()
        self._cancelled: set[int] = set()
        self._max_requests, self._max_tokens, self._context = max_requests, max_tokens, context
        self._tokens = 0
        self._closed: str | None = None
        self._next = 0
        self.throughput = Throughput()

    def put(self, request: Request, sink: Sink, pooled: Callable[[np.ndarray], None] | None = None) -> int:
        """Queue a request and return its number.

        Raises:
            EngineBusyError: there is no room.
            EngineStoppedError: the queue was closed.
        """
        cost = min(len(request.token_ids) + request.max_new_tokens, self._context)
        with self._changed:
            if self._closed is not None:
                raise EngineStoppedError(self._closed)
            over = len(self._entries) >= self._max_requests
            if over or (self._entries and self._tokens + cost > self._max_tokens):
                raise EngineBusyError(self._retry_after(cost))
            self._next += 1
            self._entries.append(Entry(self._next, request, sink, cost, pooled))
            self._tokens += cost
            self._changed.notify_all()
            return self._next

    def pop(self) -> Entry | None:
        """Take the oldest request."""
        with self._changed:
            if not self._entries:
                return None
            entry = self._entries.popleft()
            self._tokens -= entry.cost
            return entry

    def pop_where(self, unwanted: Callable[[Entry], bool]) -> list[Entry]:
        """Take all requests for which `unwanted` holds."""
        with self._changed:
            taken = [entry for entry in self._entries if unwanted(entry)]
            if taken:
                self._entries = deque(entry for entry in self._entries if entry not in taken)
                self._tokens -= sum(entry.cost for entry in taken)
            return taken

    def cancel(self, number: int) -> None:
        """Note that a request is to be given up."""
        with self._changed:
            self._cancelled.add(number)
            self._changed.notify_all()

    def pop_cancelled(self) -> set[int]:
        """Take the numbers of requests to be given up."""
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()
            return cancelled

    def close(self, why: str) -> None:
        """Refuse further requests, saying why."""
        with self._changed:
            self._closed = why
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        """Whether requests are refused."""
        return self._closed is not None

    def wake(self) -> None:
        """End a `wait` of another thread."""
        with self._changed:
            self._changed.notify_all()

    def wait(self, timeout: float | None) -> None:
        """Wait until something changes, at most `timeout` seconds."""
        with self._changed:
            if not self._entries and not self._cancelled:
                self._changed.wait(timeout)

    def waiting(self) -> tuple[int, int]:
        """Count the requests that wait, and their tokens."""
        with self._changed:
            return len(self._entries), self._tokens

    def _retry_after(self, cost: int) -> float:
        """Seconds until the queue has probably shrunk by a request's share."""
        share = max(cost, self._tokens / max(len(self._entries), 1))
        excess = max(share, self._tokens + cost - self._max_tokens)
        return min(max(excess / self.throughput.rate, 1.0), 60.0)
