"""Takes a reply apart while it is written: thoughts, calls of tools, and what is said to the user.

Text goes in by pieces; parts come out as soon as they are certain, so the parts of a stream add up to those of the
whole. The tags are those of `chat_template.jinja`; a rendered assistant turn parses back to itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, NoReturn

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
ANSWER, END_ANSWER = "<answer>", "</answer>"
State = Literal["content", "reasoning", "call"]
_TAGS: dict[State, tuple[str, ...]] = {
    "content": (THINK, END_THINK, CALL, END_CALL, ANSWER, END_ANSWER),
    "reasoning": (THINK, END_THINK),
    "call": (END_CALL,),
}
_PATTERNS = {state: re.compile("|".join(map(re.escape, tags))) for state, tags in _TAGS.items()}


@dataclass(frozen=True, slots=True)
class Text:
    """More of what is said or thought."""

    kind: Literal["content", "reasoning"]
    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A whole call of a declared tool; `arguments` is a JSON object, as text."""

    name: str
    arguments: str


Part = Text | Call


class ReplyParser:
    """State of one reply.

    Only calls of declared tools with a JSON object of arguments count as calls; what else stands between the tags of a
    call, or remains of one that was cut off, is handed on as content, without the tags.

    Args:
        tools: names of the tools that may be called; none turns the tags of calls into nothing.
        thinking: whether the prompt ended inside a thought.
    """

    def __init__(self, tools: Collection[str] = (), thinking: bool = False) -> None:
        self._tools = tools
        self._state: State = "reasoning" if thinking else "content"
        self._buffer = ""  # not looked at, or may begin a tag
        self._newlines = ""  # line ends that are dropped if a tag follows
        self._trim = thinking  # whether line ends that open this part are dropped
        self._searched = 0  # of a call's buffer: no closing tag before here
        self._holding = True  # whether a tag may still follow that drops line ends before it
        self._in_answer = False

    def push(self, piece: str) -> list[Part]:
        """Take more of the reply; return the parts that are certain now."""
        self._buffer += piece
        parts: list[Part] = []
        while match := _PATTERNS[self._state].search(self._buffer, self._searched):
            if self._state == "call":
                self._close_call(match.start(), match.end(), parts)
            else:
                self._say(self._buffer[: match.start()], parts)
                self._buffer = self._buffer[match.end() :]
                self._switch(match[0])
        if self._state != "call":
            kept = _begun_tag(self._buffer, _TAGS[self._state])
            self._say(self._buffer[: len(self._buffer) - kept], parts)
            self._buffer = self._buffer[len(self._buffer) - kept :]
        return parts

    def finish(self) -> list[Part]:
        """Return what is left when the reply has ended."""
        parts: list[Part] = []
        if self._state == "call":
            self._state, self._buffer = "content", self._buffer.strip("\n")
        self._say(self._buffer, parts)
        if self._newlines and self._state == "content":
            parts.append(Text("content", self._newlines))
        self._buffer = self._newlines = ""
        return parts

    def _switch(self, tag: str) -> None:
        """Go where a tag leads."""
        if tag in (THINK, END_THINK):
            self._state = "reasoning" if tag == THINK else "content"
            self._newlines, self._trim = "", True
        elif tag == CALL and self._tools:
            self._state, self._newlines, self._searched = "call", "", 0
        elif tag in (ANSWER, END_ANSWER):
            self._in_answer = self._holding = tag == ANSWER
            self._newlines = "" if tag == END_ANSWER else self._newlines
            self._trim = tag == ANSWER

    def _say(self, text: str, parts: list[Part]) -> None:
        """Add text to the part that is being written, line ends at its end held back."""
        if self._trim:
            text = text.lstrip("\n")
        kind: Literal["content", "reasoning"] = "reasoning" if self._state == "reasoning" else "content"
        body = text.rstrip("\n") if self._holding or kind == "reasoning" else text
        if not body:
            self._newlines += text
            return
        parts.append(Text(kind, self._newlines + body))
        self._newlines, self._trim = text[len(body) :], False
        if kind == "content" and not self._tools and not self._in_answer:
            self._holding = False

    def _close_call(self, start: int, end: int, parts: list[Part]) -> None:
        """Read the call that ends at `start`, unless the closing tag stands inside one of its strings."""
        text = self._buffer[:start]
        try:
            call = json.loads(text, strict=False, parse_constant=_refuse)
        except RecursionError:
            call = None
        except ValueError as error:
            if str(error).startswith("Unterminated string"):
                self._searched = end
                return
            call = None
        self._state, self._searched, self._buffer = "content", 0, self._buffer[end:]
        if (read := self._read_call(call)) is not None:
            parts.append(read)
        else:
            self._say(text.strip("\n"), parts)
        self._trim = True

    def _read_call(self, call: object) -> Call | None:
        if not isinstance(call, dict):
            return None
        name, arguments = call.get("name"), call.get("arguments", {})
        if not isinstance(name, str) or name not in self._tools or not isinstance(arguments, dict):
            return None
        return Call(name, json.dumps(arguments, ensure_ascii=False))


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _begun_tag(text: str, tags: tuple[str, ...]) -> int:
    """Length of the end of a text that may turn out to begin a tag."""
    at = text.rfind("<")
    return len(text) - at if at >= 0 and any(tag.startswith(text[at:]) for tag in tags) else 0
