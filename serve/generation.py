"""The engine requests behind one HTTP request: submitted together, read as one sequence of events, given up together.

Events come on the engine's thread and cross over with one `call_soon_threadsafe` each; whatever has arrived when the
reader wakes is handed over at once, so that a busy loop sends fewer, larger pieces instead of falling behind.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from types import TracebackType

from serve.errors import ApiError, from_engine, invalid, unavailable
from serve.grammar import TokenConstraint
from serve.metrics import Metrics
from serve.protocol import (
    Constraint,
    EngineBusyError,
    EngineLike,
    EngineStoppedError,
    Event,
    Finished,
    PromptRead,
    Request,
    Tokens,
)


class Generation:
    """Several completions in the engine; a context manager that cancels what is still running when it is left.

    Attributes:
        cached_tokens: tokens of prompts that the engine did not have to read again.
    """

    def __init__(self, engine: EngineLike, metrics: Metrics) -> None:
        self._engine, self._metrics = engine, metrics
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._numbers: dict[int, int] = {}  # engine's numbers of completions that have not ended, by ours
        self._requests: Sequence[Request] = ()
        self._last: list[float] = []
        self._started: list[bool] = []
        self.cached_tokens = 0

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue all requests, or none.

        Raises:
            ApiError: the engine refuses one of them.
        """
        now = time.monotonic()
        self._requests = requests
        self._last, self._started = [now] * len(requests), [False] * len(requests)
        for index, request in enumerate(requests):
            try:
                self._numbers[index] = self._engine.submit(request, partial(self._receive, index))
            except (ValueError, EngineBusyError, EngineStoppedError) as error:
                self.close()
                raise from_engine(error) from error

    def end(self, index: int) -> None:
        """Give one completion up; nothing more of it arrives."""
        if (number := self._numbers.pop(index, None)) is not None:
            self._engine.cancel(number)

    def close(self) -> None:
        """Give up all that is still running."""
        for index in list(self._numbers):
            self.end(index)

    async def events(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """Yield what has arrived, as pairs of a completion's index and its event, until all have ended.

        Raises:
            ApiError: a completion ended by a deadline, a shutdown or a failure.
        """
        while self._numbers:
            batch = [await self._arrived.get()]
            while not self._arrived.empty():
                batch.append(self._arrived.get_nowait())
            live, failure = [], None
            for index, event in batch:
                if index in self._numbers and failure is None:
                    live.append((index, event))
                    failure = self._note(index, event)
            if failure is not None:
                live.pop()
            if live:
                yield live
            if failure is not None:
                raise failure

    def __enter__(self) -> Generation:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give up all that is still running."""
        self.close()

    def _receive(self, index: int, event: Event) -> None:
        """Take an event on the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, (index, event))
        except RuntimeError:  # the loop is closed, and with it everybody who waited
            return

    def _note(self, index: int, event: Event) -> ApiError | None:
        """Measure and count; return what went wrong, for the client."""
        if isinstance(event, Tokens):
            now = time.monotonic()
            histogram = self._metrics.chunk_seconds if self._started[index] else self._metrics.first_token_seconds
            histogram.observe(now - self._last[index])
            self._last[index], self._started[index] = now, True
        elif isinstance(event, PromptRead):
            self.cached_tokens += event.cached_tokens
        elif isinstance(event, Finished):
            del self._numbers[index]
            if event.reason == "error":
                logging.getLogger("serve").error("a request failed in the engine: %s", event.detail)
            return _failure(event, self._requests[index].constraint)
        return None


def _failure(event: Finished, constraint: Constraint | None) -> ApiError | None:
    if isinstance(constraint, TokenConstraint) and constraint.error is not None:
        return invalid(f"The form that the answer must have became too complex: {constraint.error}")
    if event.reason in ("stop", "length"):
        return None
    if event.reason == "deadline":
        return ApiError(504, "The request took longer than this server allows; ask for fewer tokens", code="timeout")
    if event.reason in ("cancelled", "shutdown"):
        return unavailable("The server is shutting down; this answer was cut off")
    return ApiError(500, "The engine could not go on with this request", code="engine_failed")
