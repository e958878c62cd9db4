"""What one HTTP request came to, for the access log and the answer's usage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastapi import Request

from serve.replies import Usage


def _nothing() -> int:
    return 0


@dataclass
class Tally:
    """Filled in by the endpoint while the request is answered.

    Attributes:
        model, user: as in the request.
        prompt_tokens: tokens of all prompts.
        completion_tokens, cached_tokens: return the tokens drawn so far, and those of prompts found in the cache.
        prompts: the prompts' text, if the log is to hold it.
    """

    model: str | None = None
    user: str | None = None
    prompt_tokens: int = 0
    completion_tokens: Callable[[], int] = _nothing
    cached_tokens: Callable[[], int] = _nothing
    prompts: str | None = None

    def usage(self) -> Usage:
        """Return the answer's account of tokens."""
        drawn = self.completion_tokens()
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": drawn,
            "total_tokens": self.prompt_tokens + drawn,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens()},
        }


def tally_of(request: Request) -> Tally:
    """Return the tally that the gate has put into a request's scope."""
    tally = request.scope["minillm_tally"]
    assert isinstance(tally, Tally)
    return tally
