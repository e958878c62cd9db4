"""Everything between the socket and the endpoints: keys, readiness, headers, the last catch of errors, the access log.

One plain ASGI middleware, so that a stream's chunks pass through a single function call. The log has one JSON object a
request and, unless the server was told otherwise, nothing of what was said.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError, unavailable
from serve.reading import too_large
from serve.service import Service
from serve.sse import ClientGoneError
from serve.tally import Tally

OPEN_PATHS = ("/", "/health", "/ready", "/openapi.json", "/web/")
"""What needs no key: the page, and what says nothing about anybody; those that end in a slash cover what lies below."""
PROBES = ("/health", "/ready", "/metrics")
"""What machines ask every few seconds, and nobody wants to read about."""
WORK_METHOD = "POST"
"""Only these requests make work, and wait until the server is ready."""
CLIENT_GONE = 499
"""Status in the log of a request whose client did not wait for the answer."""
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-site",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Gate:
    """Middleware around the whole application."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it here; either way, log it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        request_id = f"req_{secrets.token_hex(8)}"
        tally = scope["minillm_tally"] = Tally()
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
            await send(message)

        try:
            if (refusal := self._refusal(scope)) is not None:
                await refusal.response()(scope, receive, send_with_headers)
            else:
                await self._app(scope, receive, send_with_headers)
        except ClientGoneError:
            status = CLIENT_GONE
        except Exception:
            logging.getLogger("serve").exception("request %s failed", request_id)
            if not status:
                failure = ApiError(500, f"The server failed on this request; its log has the reason, at {request_id}")
                await failure.response()(scope, receive, send_with_headers)
        finally:
            self._log(scope, request_id, status or CLIENT_GONE, time.monotonic() - start, tally)

    def _refusal(self, scope: Scope) -> ApiError | None:
        """Return why a request goes no further than here."""
        headers, path = Headers(scope=scope), scope["path"]
        if self._service.keys and not _is_open(path) and not self._service.keys.accept(headers.get("authorization")):
            message = "This server needs an API key; send it as Authorization: Bearer KEY"
            return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if scope["method"] == WORK_METHOD and not self._service.ready:
            why = "stopping" if self._service.draining else "still starting"
            return unavailable(f"The server is {why}; try again soon")
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length) > self._service.limits.max_body_bytes:
            return too_large(self._service.limits.max_body_bytes)
        return None

    def _log(self, scope: Scope, request_id: str, status: int, seconds: float, tally: Tally) -> None:
        endpoint = getattr(scope.get("route"), "path", "other")
        self._service.metrics.requests.labels(endpoint, str(status)).inc()
        self._service.metrics.request_seconds.labels(endpoint).observe(seconds)
        if endpoint in PROBES:
            return
        line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": request_id,
            "client": (scope.get("client") or ("",))[0],
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "ms": round(seconds * 1000),
        }
        if tally.model is not None:
            line |= {"model": tally.model, "user": tally.user, "prompt_tokens": tally.prompt_tokens}
            line |= {"completion_tokens": tally.completion_tokens(), "prompts": tally.prompts}
        kept = {key: value for key, value in line.items() if value is not None}
        logging.getLogger("serve.access").info(json.dumps(kept))


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or any(
        path.startswith(folder) for folder in OPEN_PATHS if len(folder) > 1 and folder.endswith("/")
    )
