"""POST /v1/chat/completions: conversations in, assistant turns out, whole or as a stream.

Both go through the same `ChatWriter`, which turns the engine's events into deltas; a whole answer is its deltas added
up, so that the two can never differ.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from serve.parsing import Call, Part, ReplyParser
from serve.planning import Plan, plan_chat
from serve.protocol import Event, Finished, TokenLogprobs, Tokens
from serve.replies import AssistantMessage, ChatChoice, ChatCompletion, ChatLogprob, Delta, FinishReason, TopLogprob
from serve.running import start
from serve.schemas import ChatRequest
from serve.service import Service, service_of
from serve.sse import EventStream, until_disconnected
from serve.text import StopStrings, TokenDecoder, TokenText


async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    service = service_of(request)
    plan = await asyncio.to_thread(plan_chat, service, body)
    writers = [ChatWriter(index, service, body, plan) for index in range(len(plan.requests))]
    running = start(service, request, plan, writers.__getitem__, "chatcmpl", body.user)
    if body.stream:
        return EventStream(running.chunks("chat.completion.chunk", body.include_usage), running.generation)
    with running.generation:
        await until_disconnected(request.receive, running.finished())
    completion: ChatCompletion = {
        **running.head,  # type: ignore[typeddict-item]
        "object": "chat.completion",
        "choices": [writer.choice() for writer in writers],
        "usage": running.tally.usage(),
    }
    return JSONResponse(completion)


class ChatWriter:
    """One answer: a `running.Writer` of chat deltas."""

    def __init__(self, index: int, service: Service, body: ChatRequest, plan: Plan) -> None:
        self.tokens = 0
        self.finish_reason: FinishReason | None = None
        self._index = index
        self._ends = frozenset() if body.ignore_eos else frozenset(service.tokenizer.eos_token_ids)
        self._decoder = TokenDecoder(service.tokenizer)
        self._parser = ReplyParser(plan.tools, plan.thinking)
        self._stops = StopStrings(body.stop)
        self._one_call = body.parallel_tool_calls is False
        self._by_token = bool(body.stop) or (self._one_call and bool(plan.tools))
        self._spelling = service.token_text if body.logprobs else None
        self._unsent: list[ChatLogprob] = []
        self._message: AssistantMessage = {"role": "assistant", "content": None, "refusal": None}
        self._logprobs: list[ChatLogprob] = []

    @property
    def ended(self) -> bool:
        """Whether the answer is complete."""
        return self.finish_reason is not None

    def opening(self) -> list[dict[str, Any]]:
        """Return the delta that names the role."""
        return [self._choice({"role": "assistant", "content": ""})]

    def take(self, event: Event) -> list[dict[str, Any]]:
        """Turn an event into choices of a chunk."""
        deltas: list[Delta] = []
        if isinstance(event, Tokens):
            self._take_tokens(event, deltas)
        elif isinstance(event, Finished):
            self._add(self._parser.push(self._decoder.flush()), deltas)
            self._add(self._parser.finish(), deltas)
            self._finish("stop" if event.reason == "stop" else "length", deltas)
        choices = [self._choice(delta) for delta in deltas]
        if self.finish_reason is not None:
            choices.append(self._choice({}, self.finish_reason))
        return choices

    def choice(self) -> ChatChoice:
        """Return the whole answer."""
        assert self.finish_reason is not None
        if self._message["content"] is None and "tool_calls" not in self._message:
            self._message["content"] = ""
        return {
            "index": self._index,
            "message": self._message,
            "logprobs": None if self._spelling is None else {"content": self._logprobs, "refusal": None},
            "finish_reason": self.finish_reason,
        }

    def _take_tokens(self, event: Tokens, deltas: list[Delta]) -> None:
        """Take tokens, one by one where the answer may end between two of one chunk."""
        size = 1 if self._by_token else len(event.token_ids)
        for first in range(0, len(event.token_ids), size):
            tokens = event.token_ids[first : first + size]
            self.tokens += len(tokens)
            if self._spelling is not None:
                entries = event.logprobs[first : first + size]
                self._unsent += [_logprob(e, self._spelling) for e in entries if e.token not in self._ends]
            text = self._decoder.push([token for token in tokens if token not in self._ends])
            self._add(self._parser.push(text), deltas)
            if self.finish_reason is not None:
                return

    def _add(self, parts: list[Part], deltas: list[Delta]) -> None:
        """Turn parts of the reply into deltas, up to what ends the answer."""
        for part in parts:
            if self.finish_reason is not None:
                return
            if isinstance(part, Call):
                self._add_call(part, deltas)
            elif part.kind == "reasoning":
                self._message["reasoning_content"] = self._message.get("reasoning_content", "") + part.text
                deltas.append({"reasoning_content": part.text})
            else:
                self._add_content(self._stops.push(part.text), deltas)
                if self._stops.hit:
                    self._finish("stop", deltas)

    def _add_content(self, text: str, deltas: list[Delta]) -> None:
        if text:
            self._message["content"] = (self._message["content"] or "") + text
            deltas.append({"content": text})

    def _add_call(self, call: Call, deltas: list[Delta]) -> None:
        """Add a call: a delta with its id and name, then one with its arguments."""
        calls = self._message.setdefault("tool_calls", [])
        index, call_id = len(calls), f"call_{secrets.token_hex(12)}"
        calls.append(
            {"id": call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        )  # fmt: skip
        named = {"name": call.name, "arguments": ""}
        deltas.append({"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": named}]})  # type: ignore[typeddict-item]
        deltas.append({"tool_calls": [{"index": index, "function": {"arguments": call.arguments}}]})
        if self._one_call:
            self._finish("stop", deltas)

    def _finish(self, reason: FinishReason, deltas: list[Delta]) -> None:
        if self.finish_reason is not None:
            return
        if not self._stops.hit:
            self._add_content(self._stops.flush(), deltas)
        self.finish_reason = "tool_calls" if reason == "stop" and self._message.get("tool_calls") else reason

    def _choice(self, delta: Delta, finish_reason: FinishReason | None = None) -> dict[str, Any]:
        """Wrap a delta; it carries the log-probabilities of all tokens since the last."""
        logprobs = None
        if self._spelling is not None and self._unsent:
            logprobs = {"content": self._unsent, "refusal": None}
            self._logprobs += self._unsent
            self._unsent = []
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _logprob(entry: TokenLogprobs, spelling: TokenText) -> ChatLogprob:
    assert entry.logprob is not None
    top = [_one(token, logprob, spelling) for token, logprob in entry.top]
    return {**_one(entry.token, entry.logprob, spelling), "top_logprobs": top}


def _one(token: int, logprob: float, spelling: TokenText) -> TopLogprob:
    return {"token": spelling.spell(token), "logprob": max(logprob, -9999.0), "bytes": spelling.bytes(token)}
