"""The form of a reasoning reply: a thought in `<think>` tags, then an answer in `<answer>` tags, and nothing else.

A reply's text goes in; its two parts come out, or nothing when it has another form. Training reports and rewards judge
by this one function.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

REASONING_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
"""In the order in which a well-formed reply holds them, each once."""
_TAG = re.compile("(" + "|".join(map(re.escape, REASONING_TAGS)) + ")")


@dataclass(frozen=True)
class Reasoning:
    """The parts of a well-formed reply, without the whitespace around them; either may be empty."""

    thought: str
    answer: str


def read_reasoning(reply: str) -> Reasoning | None:
    """Read a reply, without its end token.

    It is well formed when it holds each tag once, in order, and nothing but whitespace before, between and after the
    two blocks; anything else gives None.
    """
    pieces = _TAG.split(reply)  # text and tags in turn
    if tuple(pieces[1::2]) != REASONING_TAGS:
        return None
    before, thought, between, answer, after = pieces[::2]
    if before.strip() or between.strip() or after.strip():
        return None
    return Reasoning(thought.strip(), answer.strip())
