"""The speaker of a terminal chat whose model is served elsewhere, by our server or any other with OpenAI's API.

Questions go to /v1/chat/completions and answers come back as server-sent events, over the standard library's HTTP
client and nothing else: no jax, and no package of its own. What a server says is shown, so it is made harmless first.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from minillm_jax.config import ConfigError
from serve.conversation import END_THINK, THINK, Conversation, Ended, SpeakerError, Speech
from serve.protocol import Request
from serve.terminal import printable

CONNECT_SECONDS = 10.0
"""How long a server may take to accept a connection, and to list its models."""
MAX_ERROR_BYTES = 65536
MAX_ERROR_CHARACTERS = 400
TOO_LONG = "context_length_exceeded"
"""OpenAI's code for a conversation that does not fit."""


class RefusedError(SpeakerError):
    """An answer that is no success; `code` is OpenAI's, for programs."""

    def __init__(self, status: int, message: str, code: str | None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


# --- HTTP --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """Where a server listens; `path` is what comes before /v1, and `key` None where no key is needed."""

    url: str
    secure: bool
    host: str
    port: int | None
    path: str
    key: str | None

    @contextmanager
    def request(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout: float | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a request; the connection is closed with the block.

        Args:
            method: GET or POST.
            path: below /v1, such as `/models`.
            body: sent as JSON.
            timeout: seconds between two signs of life of the answer; None waits for as long as it takes.

        Raises:
            RefusedError: the status is no success.
            SpeakerError: there is no such server, or the connection broke off.
        """
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=CONNECT_SECONDS)
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            self._connect(connection)
            connection.sock.settimeout(timeout)
            connection.request(method, f"{self.path}/v1{path}", None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise _refusal(self.url, response)
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise SpeakerError(f"--url {self.url}: the connection broke off ({_reason(error)}); ask again") from error
        finally:
            connection.close()

    def _connect(self, connection: http.client.HTTPConnection) -> None:
        try:
            connection.connect()
        except OSError as error:
            hint = "is a server running there?"
            raise SpeakerError(f"--url {self.url}: cannot be reached: {_reason(error)}; {hint}") from error


def parse_server(url: str, key: str | None) -> Server:
    """Read an address such as `http://127.0.0.1:6006`, with or without `/v1` at its end.

    Raises:
        ConfigError: it is none.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"--url {url}: {error}") from error
    plain = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or not plain:
        raise ConfigError(f"--url {url}: must look like http://127.0.0.1:6006")
    path = parts.path.rstrip("/").removesuffix("/v1")
    return Server(url, parts.scheme == "https", parts.hostname, port, path, key)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__


def _refusal(url: str, response: http.client.HTTPResponse) -> RefusedError:
    """Say in one line what a server has against a request, and what to do."""
    status = response.status
    message, code = _error_of(response.read(MAX_ERROR_BYTES))
    message = message or response.reason.lower() or "no reason given"
    hint = ""
    if status in (401, 403):
        hint = "; give its key by --api_key_file or the environment's MINILLM_API_KEY"
    elif status in (404, 405):
        hint = "; check --url and --model"
    elif status in (429, 503):
        wait = response.getheader("Retry-After", "")
        hint = f" (ask again in {wait} s)" if wait.isdigit() else " (ask again later)"
    elif 300 <= status < 400:
        hint = f"; give --url the address that it points to: {response.getheader('Location', 'none')}"
    return RefusedError(status, f"--url {url}: answers {status}: {_one_line(message)}{printable(hint)}", code)


def _error_of(body: bytes) -> tuple[str, str | None]:
    """Find the message and the code in the body of an error: OpenAI's form, or one of the looser ones."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return "", None
    error = found.get("error", found) if isinstance(found, dict) else found
    if not isinstance(error, dict):
        return str(error), None
    message = error.get("message") or error.get("detail") or ""
    code = error.get("code")
    return str(message), code if isinstance(code, str) else None


def _one_line(text: str) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= MAX_ERROR_CHARACTERS else line[:MAX_ERROR_CHARACTERS] + "…"


# --- Server-sent events ------------------------------------------------------------------------------------------


def read_events(lines: Iterable[bytes]) -> Iterator[str]:
    """Yield the data of server-sent events (WHATWG HTML, section 9.2); comments and other fields are left out.

    An event at the very end counts although no empty line follows it.

    Args:
        lines: each with its line end.
    """
    data: list[str] = []
    for line in lines:
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        if not text:
            if data:
                yield "\n".join(data)
            data = []
        elif text == "data" or text.startswith("data:"):
            data.append(text[5:].removeprefix(" "))
    if data:
        yield "\n".join(data)


def read_chunks(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a stream up to `[DONE]`, or to its end where it has none.

    Raises:
        SpeakerError: an event is no JSON object, or tells of an error.
    """
    for data in read_events(lines):
        if data.strip() == "[DONE]":
            return
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            chunk = None
        if not isinstance(chunk, dict):
            raise SpeakerError("the server's stream holds something else than OpenAI's events; check --url")
        if chunk.get("error"):
            message, _ = _error_of(data.encode())
            raise SpeakerError(f"the server gave the answer up: {_one_line(message or 'no reason given')}")
        yield chunk


def read_reply(chunks: Iterable[dict[str, Any]]) -> Speech:
    """Turn the chunks of one answer into text, its thought between tags.

    Raises:
        SpeakerError: the stream ended before the answer did.
    """
    thinking, finish_reason, tokens = False, None, None
    for chunk in chunks:
        tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        for choice in (chunk.get("choices") or [])[:1]:
            delta = choice.get("delta") or {}
            finish_reason = choice.get("finish_reason") or finish_reason
            if thought := delta.get("reasoning_content") or delta.get("reasoning"):  # servers differ in its name
                yield thought if thinking else f"{THINK}\n{thought}"
                thinking = True
            if content := delta.get("content"):
                yield f"\n{END_THINK}\n\n{content}" if thinking else content
                thinking = False
    if finish_reason is None:
        raise SpeakerError("the server's answer broke off; ask again")
    if thinking:
        yield f"\n{END_THINK}"
    return Ended(finish_reason, tokens)


# --- The speaker -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RemoteSpeaker:
    """A served model with the settings of its replies; see `conversation.Speaker`.

    Attributes:
        server: where it is.
        model: its name there.
        context: most tokens of a conversation and its reply, if the server tells.
        settings: of every reply; prompt and seed are not read.
        thinking: the chat template's switch; None leaves it alone.
    """

    server: Server
    model: str
    context: int | None
    settings: Request
    thinking: bool | None

    @property
    def title(self) -> str:
        """Who it is, in a few words."""
        return f"{self.model} at {self.server.url}"

    def reply(self, conversation: Conversation, question: str, seed: int) -> Speech:
        """Answer a question; a conversation that the server finds too long loses its oldest exchanges.

        Raises:
            SpeakerError: the server is not there, refuses, or breaks off.
        """
        kept = conversation
        while True:
            try:
                with self.server.request("POST", "/chat/completions", self.body(kept, question, seed)) as response:
                    if kept is not conversation:
                        yield kept
                    return (yield from read_reply(read_chunks(response)))
            except RefusedError as error:
                if error.code != TOO_LONG or not kept.exchanges:
                    raise
            kept = kept.without_oldest()

    def body(self, conversation: Conversation, question: str, seed: int) -> dict[str, Any]:
        """Write the request; what OpenAI's API lacks is left out where it says nothing."""
        wanted = self.settings.max_new_tokens
        body: dict[str, Any] = {
            "model": self.model,
            "messages": conversation.messages(question),
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": wanted if self.context is None else min(wanted, max(self.context // 2, 1)),
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            "seed": seed,
        }
        neutral = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        body |= {name: value for name in neutral if (value := getattr(self.settings, name)) != neutral[name]}
        if self.thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": self.thinking}
        return body


def remote_speaker(server: Server, model: str | None, settings: Request, thinking: str) -> RemoteSpeaker:
    """Ask a server for its models, and choose one.

    Args:
        server: where it is.
        model: name of the model; None takes the server's first.
        settings: of every reply.
        thinking: `auto`, `on` or `off`.

    Raises:
        SpeakerError: the server is not there, refuses, or names no model.
    """
    switch = None if thinking == "auto" else thinking == "on"
    models = _models(server, required=model is None)
    if model is None:
        model = next(iter(models), None)
        if model is None:
            raise SpeakerError(f"--url {server.url}: lists no models; name one with --model")
    return RemoteSpeaker(server, model, models.get(model), settings, switch)


def _models(server: Server, required: bool) -> dict[str, int | None]:
    """Return the context of each model that a server lists, None where it does not tell."""
    try:
        with server.request("GET", "/models", timeout=CONNECT_SECONDS) as response:
            listed = json.loads(response.read())["data"]
            return {str(entry["id"]): entry.get("max_model_len") for entry in listed}
    except RefusedError as error:
        if required or error.status not in (404, 405):
            raise
        return {}  # a server without such a list may well know the model
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise SpeakerError(f"--url {server.url}: is no OpenAI-compatible server; its /v1/models is no list") from error
