"""What a request may ask for: the ranges of its settings are checked before it is queued. This file needs no jax."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from serve.protocol import EngineLike, Request

MAX_LOGPROBS = 20
MAX_BIASES = 1024

_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "max_new_tokens": (lambda value: value >= 0, "not be negative"),
    "temperature": (lambda value: 0 <= value < float("inf"), "be a number that is not negative"),
    "top_k": (lambda value: 0 <= value < 2**31, "not be negative"),
    "top_p": (lambda value: 0 < value <= 1, "lie in (0, 1]"),
    "min_p": (lambda value: 0 <= value <= 1, "lie in [0, 1]"),
    "repetition_penalty": (lambda value: 0 < value < float("inf"), "be positive"),
    "presence_penalty": (lambda value: abs(value) < float("inf"), "be a number"),
    "frequency_penalty": (lambda value: abs(value) < float("inf"), "be a number"),
}


def check_request(request: Request, engine: EngineLike) -> None:
    """Refuse what cannot be served.

    Raises:
        ValueError: an empty or too long prompt, a token outside the vocabulary, an unknown adapter, a setting outside
            its range; the message names the field.
    """
    ids = np.asarray(request.token_ids)
    if ids.ndim != 1 or not ids.size:
        raise ValueError("token_ids is empty; give at least one token")
    if not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0 or ids.max() >= engine.vocab_size:
        raise ValueError(f"token_ids holds something that is no token: ids lie in 0 … {engine.vocab_size - 1}")
    room = engine.context - (1 if request.max_new_tokens else 0)
    if ids.size > room:
        why = " and leave no room for an answer" if ids.size <= engine.context else ""
        raise ValueError(f"the prompt's {ids.size} tokens exceed the context of {engine.context}{why}; shorten it")
    check_settings(request)
    if request.logprobs is not None and not 0 <= request.logprobs <= MAX_LOGPROBS:
        raise ValueError(f"logprobs must lie in [0, {MAX_LOGPROBS}]; it is {request.logprobs!r}")
    if len(request.logit_bias) > MAX_BIASES:
        raise ValueError(f"logit_bias has {len(request.logit_bias)} entries; at most {MAX_BIASES} are possible")
    if strange := [token for token in request.logit_bias if not 0 <= token < engine.vocab_size]:
        raise ValueError(f"logit_bias: {strange[0]} is no token: ids lie in 0 … {engine.vocab_size - 1}")
    if infinite := [token for token, value in request.logit_bias.items() if not abs(value) < float("inf")]:
        raise ValueError(f"logit_bias: the bias of token {infinite[0]} must be a finite number")
    if request.adapter is not None and request.adapter not in engine.adapters:
        known = ", ".join(engine.adapters) or "none"
        raise ValueError(f"adapter {request.adapter!r} is unknown; there are: {known}")


def check_settings(request: Request) -> None:
    """Refuse settings of sampling outside their ranges, whatever model they are for.

    Raises:
        ValueError: the message begins with the field's name.
    """
    for name, (holds, rule) in _RANGES.items():
        if not holds(value := getattr(request, name)):
            raise ValueError(f"{name} must {rule}; it is {value!r}")


def seed_words(seed: int) -> tuple[int, int]:
    """Cut a seed of any size into the two 32-bit words of a random key."""
    return seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
