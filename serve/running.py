"""What both completion endpoints do around their own part: submit, count, answer whole or in a stream.

An endpoint supplies writers, one a completion, which turn the engine's events into pieces of its own format.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import Request

from serve.generation import Generation
from serve.planning import Plan
from serve.protocol import Event
from serve.service import Service
from serve.sse import DONE, ChunkWriter
from serve.tally import Tally, tally_of


class Writer(Protocol):
    """One completion on its way to the client."""

    tokens: int
    """Tokens drawn so far."""

    @property
    def ended(self) -> bool:
        """Whether nothing more will be taken."""

    def opening(self) -> list[dict[str, Any]]:
        """Return the choices to send before anything has been drawn."""

    def take(self, event: Event) -> list[dict[str, Any]]:
        """Take an event; return the choices to send for it, the last of all with its reason to finish."""


@dataclass(frozen=True)
class Running:
    """Completions that the engine is working on."""

    generation: Generation
    writers: Sequence[Writer]
    head: dict[str, Any]
    tally: Tally

    async def choices(self) -> AsyncIterator[list[dict[str, Any]]]:
        """Yield choices to send, as many at a time as there are, until all completions have ended."""
        yield [choice for writer in self.writers for choice in writer.opening()]
        async for batch in self.generation.events():
            fresh: list[dict[str, Any]] = []
            for index, event in batch:
                writer = self.writers[index]
                if not writer.ended:
                    fresh += writer.take(event)
                    if writer.ended:
                        self.generation.end(index)
            if fresh:
                yield fresh

    async def finished(self) -> None:
        """Run to the end; what was written is left with the writers."""
        async for _ in self.choices():
            pass

    async def chunks(self, object_name: str, include_usage: bool) -> AsyncIterator[bytes]:
        """Yield the events of a stream."""
        writer = ChunkWriter({**self.head, "object": object_name}, include_usage)
        async for fresh in self.choices():
            yield b"".join([writer.chunk(choice) for choice in fresh])
        if include_usage:
            yield writer.usage(self.tally.usage())
        yield DONE


def start(
    service: Service, request: Request, plan: Plan, writer: Callable[[int], Writer], prefix: str, user: str | None
) -> Running:
    """Hand a plan to the engine.

    Args:
        service: the model that is served.
        request: HTTP request that the plan is for.
        plan: what to draw.
        writer: makes the writer of the completion with an index.
        prefix: of the answer's id.
        user: end user that the client names.

    Raises:
        ApiError: the engine refuses.
    """
    generation = Generation(service.engine, service.metrics)
    writers = [writer(index) for index in range(len(plan.requests))]
    tally = tally_of(request)
    tally.model, tally.user, tally.prompt_tokens = plan.model, user, plan.prompt_tokens
    tally.completion_tokens = lambda: sum(writer.tokens for writer in writers)
    tally.cached_tokens = lambda: generation.cached_tokens
    if service.config.log_prompts:
        tally.prompts = "\n".join(service.tokenizer.decode(prompt) for prompt in plan.prompts)
    generation.submit(plan.requests)
    head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": plan.model}
    return Running(generation, writers, head, tally)
