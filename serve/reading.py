"""Bodies of requests, read strictly: bounded in size and time, JSON without extensions, text that is Unicode.

Whatever passes here can be written back into JSON, and walked by recursive code, without a surprise.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute

from serve.errors import ApiError, invalid
from serve.service import service_of

MAX_DEPTH = 64
"""Deepest nesting of lists and objects."""


class StrictRequest(Request):
    """A request whose body is read by `read_json`."""

    async def body(self) -> bytes:
        """Read the body.

        Raises:
            ApiError: 413 if it is too large, told as soon as it is; 408 if it does not arrive in time.
        """
        if not hasattr(self, "_body"):
            limits = service_of(self).limits
            chunks, size = [], 0
            try:
                async with asyncio.timeout(limits.body_timeout):
                    async for chunk in self.stream():
                        size += len(chunk)
                        if size > limits.max_body_bytes:
                            raise too_large(limits.max_body_bytes)
                        chunks.append(chunk)
            except TimeoutError as error:
                raise ApiError(408, "The request's body did not arrive in time", code="timeout") from error
            self._body = b"".join(chunks)
        return self._body

    async def json(self) -> Any:
        """Read the body as JSON."""
        return read_json(await self.body())


class StrictRoute(APIRoute):
    """A route whose bodies are read by `StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap FastAPI's handler."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strict


def too_large(limit: int) -> ApiError:
    """Make the error of a body that is too large."""
    return ApiError(413, f"The request is larger than the {limit} bytes that this server reads", code="body_too_large")


def read_json(data: bytes) -> Any:
    """Read JSON as the standard has it.

    Raises:
        ApiError: the bytes are not UTF-8, not JSON, hold NaN, infinity or a lone surrogate, or are nested too deeply.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid(f"The body is not UTF-8: byte {error.start} makes no character") from error
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise invalid(f"The body is not JSON: {error.msg}, line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:  # of the functions below, and of integers with thousands of digits
        raise invalid(f"The body holds a number that cannot be used: {str(error)[:100]}") from error
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise invalid("The body holds half a surrogate pair, which is not Unicode") from error
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is too large")
    return number


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for outer in level if isinstance(outer, list | dict) for inner in _items(outer)]
        if not level:
            return
    raise _too_deep()


def _items(value: list[Any] | dict[str, Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def _too_deep() -> ApiError:
    return invalid(f"The body is nested more than {MAX_DEPTH} levels deep")
