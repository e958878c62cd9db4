"""What a terminal chat is made of, whoever answers: the conversation as a value, and what every speaker promises.

A speaker takes a conversation and a question and yields the reply's text; there is one for a model in this process and
one for a server. This file needs no jax.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from minillm_jax.errors import UserError

Turn = dict[str, Any]
THINK, END_THINK = "<think>", "</think>"


class SpeakerError(UserError):
    """A reply that cannot be had, or not to its end."""


@dataclass(frozen=True)
class Conversation:
    """What has been said: a system prompt, and exchanges of a user's turn and the assistant's."""

    system: str | None = None
    exchanges: tuple[tuple[Turn, Turn], ...] = ()

    def messages(self, question: str) -> list[Turn]:
        """Return all turns, the question last."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        past = [turn for exchange in self.exchanges for turn in exchange]
        return [*system, *past, {"role": "user", "content": question}]

    def followed_by(self, question: str, answer: Turn) -> Conversation:
        """Return the conversation with one more exchange."""
        return replace(self, exchanges=(*self.exchanges, ({"role": "user", "content": question}, answer)))

    def without_oldest(self) -> Conversation:
        """Return the conversation with its oldest exchange forgotten."""
        return replace(self, exchanges=self.exchanges[1:])


def answer_turn(reply: str) -> Turn:
    """Make the assistant's turn of a reply, its thought kept apart as chat templates expect it."""
    if not reply.lstrip().startswith(THINK):
        return {"role": "assistant", "content": reply}
    thought, _, content = reply.partition(END_THINK)
    thought = thought.strip().removeprefix(THINK).strip("\n")
    return {"role": "assistant", "reasoning_content": thought, "content": content.lstrip("\n")}


@dataclass(frozen=True)
class Ended:
    """How a reply came to its end.

    Attributes:
        finish_reason: `stop`, `length`, or a server's own word.
        tokens: how many were drawn; None if nobody counted.
    """

    finish_reason: str
    tokens: int | None


Speech = Generator[str | Conversation, None, Ended]
"""Yields the reply's text in pieces, a thought between its tags. What is left of the conversation, where it had to be
shortened, is yielded before any text. Closing it gives the reply up."""


class Speaker(Protocol):
    """Whoever answers."""

    @property
    def title(self) -> str:
        """Who it is, in a few words."""

    @property
    def context(self) -> int | None:
        """Most tokens of a conversation and its reply; None if that is not known."""

    def reply(self, conversation: Conversation, question: str, seed: int) -> Speech:
        """Answer a question.

        Args:
            conversation: what was said before.
            question: what is said now.
            seed: of the draws.

        Raises:
            UserError: the question cannot be answered; the message says why.
        """
