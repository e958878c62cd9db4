"""What passes between the API and the engine: a request goes in, events come out. Plain data, no jax.

The API speaks text and HTTP and never sees an array; the engine speaks token ids and never sees text. Either can be
tested with a stand-in for the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

FinishReason = Literal["stop", "length", "cancelled", "deadline", "shutdown", "error"]
"""`stop` at an end token or the end of a grammar, `length` at max_new_tokens or the end of the context."""


class Constraint(Protocol):
    """Which tokens may come next, for one completion; stateful, used by the engine's thread alone."""

    def mask(self) -> np.ndarray:
        """Return `[V]` bool, the tokens that may come next."""

    def push(self, token: int) -> None:
        """Take the token that was drawn."""

    @property
    def ended(self) -> bool:
        """Whether nothing but the end may follow."""


@dataclass(frozen=True)
class Request:
    """One completion to draw.

    Attributes:
        token_ids: the prompt, at least one token.
        max_new_tokens: longest completion; 0 only reads the prompt, for `prompt_logprobs`.
        temperature, top_k, top_p, min_p, repetition_penalty, ignore_eos: see `sampling.SamplingParams`.
        presence_penalty, frequency_penalty: taken off the logits of tokens that the completion holds, once and for each
            occurrence, as OpenAI defines them.
        logit_bias: added to logits, by token id.
        seed: with the rest of the request it determines the completion, whatever else is decoded beside it.
        logprobs: how many of the likeliest alternatives to report beside each token's own log-probability; None for
            neither. They are of the model itself, before temperature, penalties and filters.
        prompt_logprobs: report those of the prompt's tokens as well.
        constraint: restricts the tokens that may come next.
        adapter: name of the adapter to use; None for the base.
        deadline: `time.monotonic()` after which the request is given up.
    """

    token_ids: Sequence[int]
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    ignore_eos: bool = False
    seed: int = 0
    logprobs: int | None = None
    prompt_logprobs: bool = False
    constraint: Constraint | None = None
    adapter: str | None = None
    deadline: float | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """One token's log-probability, None for the first of a prompt, and the likeliest tokens' in falling order."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Tokens:
    """Tokens drawn by one chunk of decoding, an end token included; `logprobs` is as long, or empty if not asked."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class PromptRead:
    """The prompt has been read; the completion begins.

    Attributes:
        cached_tokens: tokens of the prompt that had been read before, by another request.
        logprobs: of the prompt's tokens, if asked.
    """

    cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The last event of a request; `detail` says more of an error."""

    reason: FinishReason
    detail: str = ""


Event = PromptRead | Tokens | Finished
Sink = Callable[[Event], None]
"""Takes events, in order, on the engine's thread; must return at once and must not raise."""


class EngineBusyError(Exception):
    """The queue is full.

    Attributes:
        retry_after: seconds after which there is probably room.
    """

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class EngineStoppedError(Exception):
    """The engine is draining or has failed; it takes no more requests."""


@dataclass(frozen=True)
class EngineStats:
    """A moment of the engine; the counts grow from its start.

    Attributes:
        slots, slots_used: completions that can be, and are, decoded at once.
        queued, queued_tokens: requests that wait, and the tokens of their prompts and longest completions.
        cache_tokens, cache_tokens_used: tokens that the cache can hold, and those that it holds for live requests.
        requests, prompt_tokens, cached_tokens, generated_tokens: that were taken, read, found read already, drawn.
        compilations: programs compiled since the engine reported ready; anything but 0 is a defect.
    """

    slots: int
    slots_used: int
    queued: int
    queued_tokens: int
    cache_tokens: int
    cache_tokens_used: int
    requests: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    compilations: int


class EngineLike(Protocol):
    """What the API needs of an engine. Every method may be called from any thread."""

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its completion together."""

    @property
    def vocab_size(self) -> int:
        """Tokens V of the model."""

    @property
    def adapters(self) -> Sequence[str]:
        """Names of the adapters that requests may ask for."""

    @property
    def ready(self) -> bool:
        """Whether everything is compiled and requests are taken."""

    def submit(self, request: Request, sink: Sink) -> int:
        """Queue a request; returns its number, for `cancel`.

        Raises:
            ValueError: the request cannot be served: an empty or too long prompt, a token outside the vocabulary, an
                unknown adapter, a setting outside its range.
            EngineBusyError: the queue is full.
            EngineStoppedError: no more requests are taken.
        """

    def cancel(self, number: int) -> None:
        """Give a request up; its slot is free within a chunk. Nothing happens when it has ended."""

    def embed(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the mean-pooled final hidden states `[n, D]` of prompts; blocks until the device got to it.

        Raises: as `submit`.
        """

    def stats(self) -> EngineStats:
        """Describe this moment."""

    def drain(self, timeout: float) -> bool:
        """Take no more requests, let those taken end, and stop; False if some had to be given up at the timeout."""
