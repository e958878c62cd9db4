"""Errors of the API: one exception that carries a status, and its one form on the wire, which is OpenAI's.

Whatever goes wrong while a request is answered ends here; what the client reads says which field was wrong and what
would be right, and never holds a stack trace, a library's words or the request itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException

from serve.protocol import EngineBusyError, EngineStoppedError

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
RETRY_SECONDS = 5.0
"""What clients are told to wait when nobody knows better."""


class ApiError(HTTPException):
    """A request that cannot be answered.

    Args:
        status: HTTP status.
        message: for the person who sent the request.
        param: field that is wrong, such as `messages[0].role`.
        code: for programs, such as `context_length_exceeded`.
        retry_after: seconds after which another try may succeed.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        retry = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
        super().__init__(status, message, {**retry, **(headers or {})})
        self.message, self.param, self.code = message, param, code

    def body(self) -> dict[str, Any]:
        """Return the error as OpenAI writes it."""
        kind = TYPES.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the HTTP response."""
        return JSONResponse(self.body(), self.status_code, dict(self.headers or {}))


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Make the error of a request that must be written differently; `param` opens the message."""
    return ApiError(400, f"{param}: {message}" if param else message, param=param, code=code)


def unavailable(why: str, retry_after: float = RETRY_SECONDS) -> ApiError:
    """Make the error of a server that takes no requests just now."""
    return ApiError(503, why, code="unavailable", retry_after=retry_after)


def from_engine(error: Exception) -> ApiError:
    """Say what the engine's refusal of a request means to the client."""
    if isinstance(error, EngineBusyError):
        return ApiError(429, f"The server is busy: {error}", code="engine_busy", retry_after=error.retry_after)
    if isinstance(error, EngineStoppedError):
        return unavailable("The server takes no more requests; try another one, or again later")
    return invalid(str(error))


def from_http(error: HTTPException) -> ApiError:
    """Put the framework's own errors, an unknown path and a wrong method, into words."""
    if isinstance(error, ApiError):
        return error
    messages = {
        404: "There is nothing at this address; /openapi.json lists what there is",
        405: "This address does not take this method",
    }
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=error.headers)


# --- Fields that are wrong ---------------------------------------------------------------------------------------


def wrong(message: str) -> PydanticCustomError:
    """Make the error that a validator of `schemas` raises; the message is shown as it is."""
    return PydanticCustomError("wrong", "{message}", {"message": message})


_RULES = {
    "missing": "is missing",
    "string_type": "must be a string",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "finite_number": "must be a finite number",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    "wrong": "{message}",
}
"""What each of pydantic's errors means to a person who has never heard of pydantic."""


def from_validation(error: RequestValidationError) -> ApiError:
    """Name the first field that is wrong, and the rule that it breaks."""
    first = error.errors()[0]
    param = _path(first["loc"][1:]) or None
    if param is None:
        return invalid("The body must be a JSON object, sent with Content-Type: application/json")
    rule = _RULES.get(first["type"], "is not valid").format(**first.get("ctx", {}))
    return invalid(rule, param)


def _path(location: Sequence[str | int]) -> str:
    """Spell a place in a body: `("messages", 0, "role")` is `messages[0].role`."""
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path
