"""Streams: server-sent events as OpenAI writes them, and work that stops when its client is gone.

A chunk's unchanging parts are written once per stream; per event only what is new goes through `json`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.errors import ApiError
from serve.generation import Generation

DONE = b"data: [DONE]\n\n"
T = TypeVar("T")


class ClientGoneError(Exception):
    """The client closed its connection; nobody is left to answer."""


async def until_disconnected(receive: Receive, work: Awaitable[T]) -> T:
    """Await work, but give it up as soon as the client disconnects.

    Raises:
        ClientGoneError: the client disconnected first.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for started in (task, watcher):
            started.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response that is written while the engine works, and whose end, however it comes, frees the engine.

    An error after the start cannot change the status any more: it is sent as an event, and the stream ends without
    `[DONE]`.

    Args:
        pieces: encoded events.
        generation: closed at the end.
    """

    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncIterator[bytes], generation: Generation) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._pieces, self._generation = pieces, generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, or stop when the client disconnects."""
        with self._generation:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await until_disconnected(receive, self._write(send))

    async def _write(self, send: Send) -> None:
        try:
            async for piece in self._pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except ApiError as error:
            await send({"type": "http.response.body", "body": encode(error.body()), "more_body": True})
        except Exception:
            logging.getLogger("serve").exception("a stream failed")
            body = ApiError(500, "The server failed on this request").body()
            await send({"type": "http.response.body", "body": encode(body), "more_body": True})
        with suppress(OSError):
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def encode(value: Mapping[str, Any]) -> bytes:
    """Write one event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class ChunkWriter:
    """Writes the chunks of one stream.

    Args:
        head: the fields before `choices`, the same in all chunks.
        include_usage: whether chunks have the field `usage`, null until the last.
    """

    def __init__(self, head: Mapping[str, Any], include_usage: bool) -> None:
        opening = encode(head).strip()[:-1].decode()  # without the closing brace
        self._before, self._after = opening + ',"choices":[', '],"usage":null}\n\n' if include_usage else "]}\n\n"
        self._opening = opening

    def chunk(self, choice: Mapping[str, Any]) -> bytes:
        """Write a chunk of one choice."""
        body = json.dumps(choice, ensure_ascii=False, separators=(",", ":"))
        return f"{self._before}{body}{self._after}".encode()

    def usage(self, usage: Mapping[str, Any]) -> bytes:
        """Write the last chunk, which has no choices."""
        return f'{self._opening},"choices":[],"usage":{json.dumps(usage)}}}\n\n'.encode()
