"""A request while it is served: how far it has come, and the events it has been sent. Host only, no jax.

Tokens are counted twice, when their drawing is dispatched and when they have been read, because the device is always a
chunk ahead of the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from serve.protocol import Event, Finished, FinishReason, PromptRead, TokenLogprobs, Tokens
from serve.queue import Entry
from serve.slots import Slot


@dataclass(frozen=True)
class HostLogprobs:
    """Log-probabilities as numpy arrays: `[n]` of tokens, `[n, m]` of the likeliest and their ids."""

    own: np.ndarray
    top: np.ndarray
    ids: np.ndarray

    def cut(self, first: int, last: int) -> HostLogprobs:
        """Take those of a range."""
        return HostLogprobs(self.own[first:last], self.top[first:last], self.ids[first:last])

    def tokens(self, token_ids: list[int], alternatives: int) -> list[TokenLogprobs]:
        """Describe the first `len(token_ids)` tokens, with so many alternatives each."""
        tops = zip(self.ids[:, :alternatives].tolist(), self.top[:, :alternatives].tolist(), strict=True)
        pairs = [tuple(zip(ids, values, strict=True)) for ids, values in tops]
        return [
            TokenLogprobs(token, logprob, top)
            for token, logprob, top in zip(token_ids, self.own.tolist(), pairs, strict=False)
        ]


@dataclass
class Live:
    """A request in a slot.

    Attributes:
        entry: the request, its number and its sink.
        slot: its place in the cache.
        budget: tokens that may be drawn.
        adapter: number of its adapter.
        cached: tokens of the prompt that were found read already.
        read: tokens of the prompt whose reading has been dispatched, those found included.
        drawn: tokens whose drawing has been dispatched.
        emitted: tokens that were sent.
        finished: whether the last event was sent.
        prompt_logprobs: of the prompt's tokens read so far.
        hidden: sum of the prompt's hidden states so far, for embeddings.
    """

    entry: Entry
    slot: Slot
    budget: int
    adapter: int
    cached: int
    read: int
    drawn: int = 0
    emitted: int = 0
    finished: bool = False
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    hidden: np.ndarray | float = 0.0

    @property
    def prompt(self) -> Sequence[int]:
        """The prompt's tokens."""
        return self.entry.request.token_ids

    @property
    def decoding(self) -> bool:
        """Whether there are tokens left to dispatch."""
        return not self.finished and self.read == len(self.entry.request.token_ids) and self.drawn < self.budget

    @property
    def length(self) -> int:
        """Tokens that the slot holds once everything dispatched has run."""
        return self.read + self.drawn

    def send(self, event: Event) -> None:
        """Send an event; none follows the last."""
        if self.finished:
            return
        self.finished = isinstance(event, Finished)
        self.entry.sink(event)

    def take_piece(self, start: int, end: int, logprobs: HostLogprobs | None, hidden: np.ndarray | None) -> None:
        """Note that the prompt's tokens `start` to `end` have been read, and send what follows from it."""
        request = self.entry.request
        if hidden is not None:
            self.hidden = self.hidden + hidden
        if logprobs is not None:
            if not self.prompt_logprobs:
                self.prompt_logprobs.append(TokenLogprobs(request.token_ids[0], None))
            following = list(request.token_ids[start + 1 : end + 1])
            self.prompt_logprobs += logprobs.tokens(following, request.logprobs or 0)
        if end < len(request.token_ids):
            return
        if self.entry.pooled is not None and not self.finished:
            self.entry.pooled(np.asarray(self.hidden))
        self.send(PromptRead(self.cached, tuple(self.prompt_logprobs)))
        if self.budget == 0:
            self.send(Finished("length"))

    def take_tokens(self, drawn: list[int], logprobs: HostLogprobs | None, ends: frozenset[int]) -> int:
        """Send what a chunk drew, up to the end of the completion; returns how many tokens that was."""
        if self.finished:
            return 0
        request = self.entry.request
        tokens = drawn[: self.budget - self.emitted]
        reason: FinishReason | None = None
        if not request.ignore_eos:
            stop = next((i for i, token in enumerate(tokens) if token in ends), None)
            if stop is not None:
                tokens, reason = tokens[: stop + 1], "stop"
        detail = ""
        if request.constraint is not None and reason is None:
            try:
                for token in tokens:
                    request.constraint.push(token)
                reason = "stop" if request.constraint.ended else None
            except Exception as error:  # the caller's code: it ends this request alone
                reason, detail = "error", f"the constraint failed: {error}"
        self.emitted += len(tokens)
        self.slot.tokens += tokens
        beside = (
            logprobs.tokens(tokens, request.logprobs) if request.logprobs is not None and logprobs is not None else []
        )
        if tokens:
            self.send(Tokens(tuple(tokens), tuple(beside)))
        if reason is None and self.emitted == self.budget:
            reason = "length"
        if reason is not None:
            self.finish(reason, detail)
        return len(tokens)

    def finish(self, reason: FinishReason, detail: str = "") -> None:
        """Send the last event, once."""
        self.send(Finished(reason, detail))
