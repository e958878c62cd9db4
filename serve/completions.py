"""POST /v1/completions: texts or token ids in, their continuations out, whole or as a stream.

With `echo` the prompt comes first, and with `logprobs` its tokens are scored too: what evaluation harnesses ask for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from serve.planning import Plan, plan_completion
from serve.protocol import Event, Finished, PromptRead, TokenLogprobs, Tokens
from serve.replies import FinishReason, TextChoice, TextCompletion, TextLogprobs
from serve.running import start
from serve.schemas import CompletionRequest
from serve.service import Service, service_of
from serve.sse import EventStream, until_disconnected
from serve.text import StopStrings, TokenDecoder


async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue prompts."""
    service = service_of(request)
    plan = await asyncio.to_thread(plan_completion, service, body)
    writers = [TextWriter(index, service, body, plan) for index in range(len(plan.requests))]
    running = start(service, request, plan, writers.__getitem__, "cmpl", body.user)
    if body.stream:
        return EventStream(running.chunks("text_completion", body.include_usage), running.generation)
    with running.generation:
        await until_disconnected(request.receive, running.finished())
    completion: TextCompletion = {
        **running.head,  # type: ignore[typeddict-item]
        "object": "text_completion",
        "choices": [writer.choice() for writer in writers],
        "usage": running.tally.usage(),
    }
    return JSONResponse(completion)


class TextWriter:
    """One completion: a `running.Writer` of text."""

    def __init__(self, index: int, service: Service, body: CompletionRequest, plan: Plan) -> None:
        self.tokens = 0
        self.finish_reason: FinishReason | None = None
        self._index = index
        self._ends = frozenset() if body.ignore_eos else frozenset(service.tokenizer.eos_token_ids)
        self._decoder = TokenDecoder(service.tokenizer)
        self._prompt_decoder = TokenDecoder(service.tokenizer)
        self._stops = StopStrings(body.stop)
        self._echo = self._prompt_text(service, body, index) if body.echo else ""
        self._spelling = None if body.logprobs is None else service.token_text
        self._top = body.logprobs or 0
        self._offset = 0  # characters of the text before the next token
        self._text = ""
        self._unsent: list[tuple[TokenLogprobs, int]] = []
        self._scored: list[tuple[TokenLogprobs, int]] = []

    @property
    def ended(self) -> bool:
        """Whether the completion is complete."""
        return self.finish_reason is not None

    def opening(self) -> list[dict[str, Any]]:
        """Return the echoed prompt, unless it has to wait for its log-probabilities."""
        return [self._piece(self._echo)] if self._echo and self._spelling is None else []

    def take(self, event: Event) -> list[dict[str, Any]]:
        """Turn an event into choices of a chunk."""
        text = ""
        if isinstance(event, PromptRead) and event.logprobs:
            self._score(event.logprobs, self._prompt_decoder)
            text, self._offset = self._echo, len(self._echo)
        elif isinstance(event, Tokens):
            text = self._take_tokens(event)
        elif isinstance(event, Finished):
            text = self._stops.push(self._decoder.flush()) + self._stops.flush()
            self.finish_reason = "stop" if event.reason == "stop" or self._stops.hit else "length"
        return [self._piece(text)] if text or self._unsent or self.finish_reason else []

    def choice(self) -> TextChoice:
        """Return the whole completion."""
        logprobs = self._logprobs(self._scored) if self._spelling is not None else None
        return {"index": self._index, "text": self._text, "logprobs": logprobs, "finish_reason": self.finish_reason}

    def _take_tokens(self, event: Tokens) -> str:
        """Take tokens, one by one where something depends on each of them."""
        if self._spelling is None and not self._stops.any:
            self.tokens += len(event.token_ids)
            return self._decoder.push([token for token in event.token_ids if token not in self._ends])
        text = ""
        for i, token in enumerate(event.token_ids):
            self.tokens += 1
            if self._spelling is not None:
                self._unsent.append((event.logprobs[i], self._offset))
            piece = "" if token in self._ends else self._decoder.push([token])
            self._offset += len(piece)
            text += self._stops.push(piece)
            if self._stops.hit:
                self.finish_reason = "stop"
                break
        return text

    def _score(self, entries: Sequence[TokenLogprobs], decoder: TokenDecoder) -> None:
        """Note the log-probabilities of the prompt's tokens, with the place of each in the text."""
        for entry in entries:
            self._unsent.append((entry, self._offset))
            self._offset += len(decoder.push([entry.token]))

    def _piece(self, text: str) -> dict[str, Any]:
        """Wrap text; it carries the log-probabilities of all tokens since the last."""
        self._text += text
        logprobs = self._logprobs(self._unsent) if self._spelling is not None else None
        self._scored += self._unsent
        self._unsent = []
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": self.finish_reason}

    def _logprobs(self, scored: Sequence[tuple[TokenLogprobs, int]]) -> TextLogprobs:
        assert self._spelling is not None
        spell = self._spelling.spell
        top = [
            {spell(token): max(logprob, -9999.0) for token, logprob in entry.top}
            if entry.logprob is not None
            else None
            for entry, _ in scored
        ]  # fmt: skip
        return {
            "tokens": [spell(entry.token) for entry, _ in scored],
            "token_logprobs": [None if e.logprob is None else max(e.logprob, -9999.0) for e, _ in scored],
            "top_logprobs": top if self._top else None,
            "text_offset": [offset for _, offset in scored],
        }

    @staticmethod
    def _prompt_text(service: Service, body: CompletionRequest, index: int) -> str:
        prompt = body.prompt[index // (body.n or 1)]
        return prompt if isinstance(prompt, str) else service.tokenizer.decode(prompt, skip_special_tokens=True)
