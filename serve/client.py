"""The engine for callers that wait: a request goes in, and its events are iterated over. No jax."""

from __future__ import annotations

from collections.abc import Generator
from queue import SimpleQueue

from serve.protocol import EngineLike, Event, Finished, Request


def generate(engine: EngineLike, request: Request) -> Generator[Event, None, None]:
    """Submit a request and yield its events, the last one included; closing the generator cancels it.

    Args:
        engine: an engine that is ready, or will be.
        request: what to complete.

    Raises:
        ValueError, EngineBusyError, EngineStoppedError: see `EngineLike.submit`.
    """
    events: SimpleQueue[Event] = SimpleQueue()
    number = engine.submit(request, events.put)
    ended = False
    try:
        while not ended:
            event = events.get()
            ended = isinstance(event, Finished)
            yield event
    finally:
        if not ended:
            engine.cancel(number)
