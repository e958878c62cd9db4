"""Holds completions to a form: JSON, a JSON schema, a regular expression, tool calls. llguidance has the automata.

A form becomes a grammar, the grammar a `Constraint` that tells the engine before each token which ones may come.
Compiled grammars are kept, since clients send the same few over and over; compiling releases the interpreter lock.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper, regex_to_lark

from minillm_jax.tokenizer import Tokenizer
from serve.parsing import CALL, END_CALL, END_THINK

_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as `json.dumps` and chat templates write it. Free spacing would let a weak model write spaces for ever."""


_COMPOSED = {"$ref", "allOf", "anyOf", "oneOf", "patternProperties"}
"""Keywords by which a schema gets properties that it does not list itself."""


class GrammarError(ValueError):
    """A form that cannot be followed; the message says why."""


class _Vocabulary:
    """The tokenizer as llguidance wants to see it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        tags = (tokenizer.token_to_id(tag) for tag in (CALL, END_CALL, END_THINK))
        # Tags must not turn up inside strings; as special tokens they only come where a grammar names them.
        self.special_token_ids = sorted(tokenizer.control_ids | {tag for tag in tags if tag is not None})
        self._encode = tokenizer.encode if tokenizer.joins_pieces else self._longest_matches
        self._ids = {data: i for i, data in enumerate(self.tokens) if data and i not in self.special_token_ids}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)

    def _longest_matches(self, text: str) -> list[int]:
        """Encode a piece from the middle of a text, where the tokenizer would put a space before it."""
        data, ids, at = text.encode(), [], 0
        while at < len(data):
            sizes = range(min(self._longest, len(data) - at), 0, -1)
            size = next((size for size in sizes if data[at : at + size] in self._ids), None)
            if size is None:
                break
            ids.append(self._ids[data[at : at + size]])
            at += size
        return ids


class TokenConstraint:
    """One completion's place in a grammar; a `protocol.Constraint`.

    Attributes:
        error: why the grammar could not be followed to its end; the completion then stops early.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._matcher, self._vocab_size, self._ends = matcher, vocab_size, list(eos_token_ids)
        self.error: str | None = None

    def mask(self) -> np.ndarray:
        """Return `[V]` bool, the tokens that may come next; the end alone once the grammar is complete or failed."""
        bits = None if self.ended else self._matcher.compute_bitmask()
        if bits is None or self._failed():
            only_end = np.zeros(self._vocab_size, bool)
            only_end[self._ends] = True
            return only_end
        return np.unpackbits(np.frombuffer(bits, np.uint8), count=self._vocab_size, bitorder="little").view(bool)

    def push(self, token: int) -> None:
        """Take the token that was drawn."""
        if token not in self._ends and not self.ended:
            self._matcher.consume_token(token)
            self._failed()

    @property
    def ended(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._matcher.is_stopped()

    def _failed(self) -> bool:
        if self._matcher.is_error():
            self.error = self.error or _reason(self._matcher.get_error())
        return self.error is not None


class Grammars:
    """Compiles grammars for one tokenizer.

    Args:
        tokenizer: of the model.
        vocab_size: V of the model's logits, which may be larger than the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        wrapped = TokenizerWrapper(_Vocabulary(tokenizer, vocab_size))
        self._engine = LLTokenizer(wrapped, n_vocab=vocab_size, eos_token=list(tokenizer.eos_token_ids))
        self._compile = lru_cache(maxsize=64)(self._compile_new)

    def constraint(self, grammar: str) -> TokenConstraint:
        """Start at the beginning of a grammar.

        Raises:
            GrammarError: the grammar is malformed, too large, or uses what is not implemented.
        """
        matcher = self._compile(grammar).deep_copy()
        return TokenConstraint(matcher, self._vocab_size, self._tokenizer.eos_token_ids)

    def _compile_new(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._engine, grammar, log_level=0)
        if matcher.is_error():
            raise GrammarError(_reason(matcher.get_error()))
        return matcher

    def tag(self, spelling: str) -> str:
        """Return what matches a tag: its own token, or its letters where the vocabulary has none."""
        token = self._tokenizer.token_to_id(spelling)
        return json.dumps(spelling) if token is None else f"<[{token}]>"


def json_rule(schema: Mapping[str, Any]) -> str:
    """Return the right side of a rule that matches JSON by a schema."""
    return "%json " + json.dumps({**schema, "x-guidance": _SPACING})


def regex_rule(regex: str) -> str:
    """Return the right side of a rule that matches a regular expression as a whole, anchored or not."""
    body = regex.removeprefix("^")
    if body.endswith("$") and not body.endswith("\\$"):
        body = body[:-1]
    return f"/{regex_to_lark(body, use_ascii='dws')}/"


def call_schema(name: str, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the schema of a call of one tool, as it is written between the tags.

    Arguments that the tool does not name are left out, even where its schema would put up with them.
    """
    arguments = {"type": "object", **({"properties": {}} if parameters is None else parameters)}
    if "properties" in arguments and not _COMPOSED & set(arguments):
        arguments.setdefault("additionalProperties", False)
    # References start at the root.
    shared: dict[str, Any] = {key: arguments[key] for key in ("$defs", "definitions") if key in arguments}
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
        **shared,
    }


def build(
    grammars: Grammars,
    *,
    answer: str | None,
    tools: Mapping[str, Mapping[str, Any] | None],
    several: bool = False,
    thinking: bool = False,
) -> str:
    """Write the grammar of a reply: an answer, or calls of tools, or either of the two.

    Args:
        grammars: of the tokenizer.
        answer: a rule by `json_rule` or `regex_rule`; None if only calls will do.
        tools: parameters of the tools that may be called, by name.
        several: whether more than one call may follow another.
        thinking: whether the prompt ended inside a thought, which is finished first, freely.
    """
    rules = []
    if tools:
        names = [f"call_{i}" for i in range(len(tools))]
        opening, closing = grammars.tag(CALL), grammars.tag(END_CALL)
        rules += ['calls: call ("\\n" call)*' if several else "calls: call"]
        rules += [f'call: {opening} "\\n" ({" | ".join(names)}) "\\n" {closing}']
        schemas = [json_rule(call_schema(*tool)) for tool in tools.items()]
        rules += [f"{name}: {schema}" for name, schema in zip(names, schemas, strict=True)]
    if answer is not None:
        # A terminal's name is in capitals: a regular expression is one, JSON is a rule.
        rules += [f"{_answer_name(answer)}: {answer}"]
    body = " | ".join(part for part in ("calls" if tools else None, answer and _answer_name(answer)) if part)
    if thinking:
        end = grammars.tag(END_THINK)
        rules += ["THOUGHT: /(?s:.*)/"] if end.startswith("<[") else [f"thought[suffix={end}]: /(?s:.*)/"]
        opening = f"THOUGHT {end}" if end.startswith("<[") else "thought"
        return f'start: {opening} "\\n\\n" ({body})\n' + "\n".join(rules)
    return f"start: {body}\n" + "\n".join(rules)


def _answer_name(answer: str) -> str:
    return "answer" if answer.startswith("%json") else "ANSWER"


def _reason(error: str) -> str:
    """Cut a message of llguidance down to its first line, without the place in a grammar that nobody wrote."""
    line = error.strip().partition("\n")[0]
    place, separator, rest = line.partition(": ")
    return rest if separator and place.startswith("at ") else line
