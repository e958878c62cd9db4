"""The one rendering of a conversation: turns flow in, token ids and the loss mask flow out together.

A jinja2 template writes the text and says, with `{% generation %}` tags, which parts of it an assistant wrote; nothing
is ever searched for in text. The decision worth knowing: control tokens spelled inside a conversation are replaced by
stand-in characters before rendering and restored as plain text after it, so a template only ever writes its own.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minillm_jax.errors import UserError
from minillm_jax.tokenizer import IM_END, IM_START, Tokenizer, default_chat_template

ROLES = ("system", "user", "assistant", "tool")
Turn = dict[str, Any]
Span = tuple[str, bool]
"""Rendered text, and whether it is trained."""


class ChatError(UserError, ValueError):
    """A conversation that makes no sense, or a chat template that cannot render it."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens."""

    token_ids: list[int]
    """Ids of the whole conversation, length T."""
    mask: list[int]
    """1 where an assistant's token is trained, 0 elsewhere, length T."""


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | str | None = None,
    add_generation_prompt: bool = False,
    enable_thinking: bool | None = None,
    field: str = "conversations",
) -> Rendered:
    """Render a conversation by the tokenizer's chat template, or by the default one if it has none.

    Trained and untrained text are tokenised apart, as they are when a model is prompted: with a template that has
    `{% generation %}` tags, the ids of `messages[:k]` with a generation prompt begin those of `messages[:k + 1]`.
    Without tags the trained parts are found by rendering each prefix of the conversation; a prompt then has an empty
    mask and is tokenised in one go, exactly as `transformers` does.

    The ids are those of `transformers` but for two cases: control tokens that people spell stay text here, and text
    that an imported tokenizer would split otherwise in one go (most join an answer's first line end to the one of its
    prompt) stays apart. With the default template and a tokenizer trained here, the second never occurs.

    Args:
        tokenizer: supplies vocabulary and template.
        messages: turns with `role` and `content`; an assistant turn may have `reasoning_content` and `tool_calls`,
            the first system turn `tools`. Lists of tools and calls may be JSON strings, in OpenAI's wrapper or bare.
        tools: functions that the assistant may call; takes precedence over those of the system turn.
        add_generation_prompt: end with the opening of an assistant turn.
        enable_thinking: opens that turn with a thought (True), with an empty thought (False), or with nothing (None).
        field: what an error calls the list of messages.

    Raises:
        ChatError: `FIELD[TURN].KEY: what is wrong`, or why the template cannot render these turns.
    """
    turns, functions = _read_conversation(messages, tools, field)
    source = tokenizer.tool_template if functions else tokenizer.chat_template
    template = _compile(source or _default_template(tokenizer))
    disguise = _disguise_for(tokenizer, [turns, functions])
    if disguise is not None:
        turns, functions = disguise.hide([turns, functions])
    options: dict[str, Any] = dict(tokenizer.named_tokens, tools=functions or None, documents=None)
    if enable_thinking is not None:
        options |= _thinking(enable_thinking)
    if template.marks_generation:
        spans = template.marked_spans(turns, options, add_generation_prompt)
    elif add_generation_prompt:
        spans = [(template.text(turns, options, add_generation_prompt), False)]
    else:
        spans = _prefix_spans(template, turns, options, field)
    return _tokenise(tokenizer, spans, disguise)


def check_conversation(
    messages: Any, tools: Sequence[Mapping[str, Any]] | str | None = None, field: str = "conversations"
) -> None:
    """Check that `render` can read these turns, without rendering them.

    Raises:
        ChatError: `FIELD[TURN].KEY: what is wrong`.
    """
    _read_conversation(messages, tools, field)


# --- Reading turns -----------------------------------------------------------------------------------------------


def _read_conversation(messages: Any, tools: Any, field: str) -> tuple[list[Turn], list[Turn]]:
    """Check turns and bring them to one form; also return the tools, from the argument or the system turn."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ChatError(f"{field}: must be a list of turns, not {_kind(messages)}")
    if not messages:
        raise ChatError(f"{field}: is empty; give at least one turn")
    functions = _read_json_list(tools, "tools")
    turns = []
    for i, message in enumerate(messages):
        turn = _read_turn(message, f"{field}[{i}]")
        if own := _read_json_list(turn.pop("tools", None), f"{field}[{i}].tools"):
            if i or turn["role"] != "system":
                raise ChatError(f"{field}[{i}].tools: only a system turn at the start can offer tools")
            functions = functions or own
        turns.append(turn)
    return turns, functions


def _read_turn(message: Any, where: str) -> Turn:
    if not isinstance(message, Mapping):
        raise ChatError(f"{where}: must be an object with role and content, not {_kind(message)}")
    turn = {key: value for key, value in message.items() if value is not None}  # templates may ask what is defined
    role = turn.get("role")
    if role not in ROLES:
        problem = (
            f"unknown role {json.dumps(role, ensure_ascii=False)}" if isinstance(role, str) else "must be a string"
        )
        raise ChatError(f"{where}.role: {problem}; use system, user, assistant or tool")
    for key in ("content", "reasoning_content"):
        if not isinstance(turn.get(key), str | None):
            raise ChatError(f"{where}.{key}: must be a string or null, not {_kind(turn[key])}")
    calls = _read_json_list(turn.pop("tool_calls", None), f"{where}.tool_calls")
    if role != "assistant" and (calls or turn.get("reasoning_content")):
        raise ChatError(f"{where}.{'tool_calls' if calls else 'reasoning_content'}: only an assistant turn can have it")
    if calls:
        turn["tool_calls"] = [_read_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    elif turn.get("content") is None and not turn.get("reasoning_content") and not turn.get("tools"):
        raise ChatError(f"{where}.content: is missing")
    turn["content"] = turn.get("content") or ""
    return turn


def _read_call(call: Turn, where: str) -> Turn:
    """Bring a tool call, bare or in OpenAI's wrapper, to that wrapper with its arguments as an object."""
    wrapper = {key: value for key, value in call.items() if key not in ("name", "arguments")}
    if isinstance(call.get("function"), Mapping):
        call, where = call["function"], f"{where}.function"
    if not isinstance(call.get("name"), str):
        raise ChatError(f"{where}.name: must be a string, not {_kind(call.get('name'))}")
    arguments = call.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _parse_json(arguments, f"{where}.arguments")
    if not isinstance(arguments, Mapping):
        raise ChatError(f"{where}.arguments: must be an object, not {_kind(arguments)}")
    return {"type": "function", **wrapper, "function": {"name": call["name"], "arguments": arguments}}


def _read_json_list(value: Any, where: str) -> list[Turn]:
    """Read a list of objects that may be written as a JSON string; null and an empty string are an empty list."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        value = _parse_json(value, where)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ChatError(f"{where}: must be a list, not {_kind(value)}")
    for i, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise ChatError(f"{where}[{i}]: must be an object, not {_kind(item)}")
    return list(value)


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ChatError(f"{where}: is a string but not JSON: {error}") from error


def _kind(value: Any) -> str:
    names = {type(None): "null", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "an object" if isinstance(value, Mapping) else "a list")


# --- Control tokens that people write ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Disguise:
    """Stand-in characters, unused in a conversation, for the control tokens that it spells out."""

    pattern: re.Pattern[str]
    stand_ins: dict[str, str]  # spelling -> character

    def hide(self, value: Any) -> Any:
        """Replace every spelling in the strings of a nested value."""
        if isinstance(value, str):
            return self.pattern.sub(lambda match: self.stand_ins[match[0]], value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        return value

    def encode(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Encode rendered text: spellings left in it are the template's, stand-ins become plain text again."""
        spellings = {ord(char): spelling for spelling, char in self.stand_ins.items()}
        ids, done = [], 0
        for match in self.pattern.finditer(text):
            ids += tokenizer.encode(text[done : match.start()].translate(spellings))
            ids += tokenizer.encode_control(match[0])
            done = match.end()
        return ids + tokenizer.encode(text[done:].translate(spellings))


def _disguise_for(tokenizer: Tokenizer, value: Any) -> _Disguise | None:
    """Return the disguise that a conversation needs, or None for nearly all: those that spell no control token."""
    pattern = tokenizer.control_pattern
    if pattern is None or not any(pattern.search(text) for text in _strings(value)):
        return None
    texts = list(_strings(value))
    spelled = sorted({spelling for text in texts for spelling in pattern.findall(text)})
    return _Disguise(pattern, dict(zip(spelled, _unused_characters(texts), strict=False)))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _unused_characters(texts: Iterable[str]) -> Iterator[str]:
    """Yield characters of the private use areas that occur in none of the texts."""
    used = set().union(*texts)
    return (chr(code) for code in range(0xE000, 0x110000) if chr(code) not in used)


# --- Templates ---------------------------------------------------------------------------------------------------


class _Trained(str):
    """Output of a `{% generation %}` block; being a type, the mark can neither be forged nor get lost in text."""

    __slots__ = ()


class _GenerationTag(Extension):
    """Adds `{% generation %} … {% endgeneration %}`, which marks its output as written by the assistant."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> str:
        return _Trained(caller())


@dataclass(frozen=True)
class _Template:
    compiled: jinja2.Template
    marks_generation: bool

    def text(self, turns: list[Turn], options: dict[str, Any], add_generation_prompt: bool = False) -> str:
        """Render turns to text."""
        return "".join(self._pieces(turns, options, add_generation_prompt))

    def marked_spans(self, turns: list[Turn], options: dict[str, Any], add_generation_prompt: bool) -> list[Span]:
        """Render turns to spans, trained as the template's own tags say."""
        pieces = self._pieces(turns, options, add_generation_prompt)
        grouped = groupby(pieces, key=lambda piece: isinstance(piece, _Trained))
        spans = [("".join(group), trained) for trained, group in grouped]
        # jinja2 joins what a macro or a set block writes into one plain string.
        if not any(trained for _, trained in spans) and any(turn["role"] == "assistant" for turn in turns):
            raise ChatError("chat template: its generation tags mark nothing; move them out of macros and set blocks")
        return spans

    def _pieces(self, turns: list[Turn], options: dict[str, Any], add_generation_prompt: bool) -> list[str]:
        try:
            variables = options | {"messages": turns, "add_generation_prompt": add_generation_prompt}
            return list(self.compiled.generate(variables))
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise ChatError(f"the chat template cannot render these turns: {error}") from error


@lru_cache(maxsize=32)
def _compile(source: str) -> _Template:
    """Compile a chat template in the environment that `transformers` gives to templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    try:
        tags = environment.parse(source).find_all(nodes.ExtensionAttribute)
        marks_generation = any(tag.identifier == _GenerationTag.identifier for tag in tags)
        return _Template(environment.from_string(source), marks_generation)
    except jinja2.TemplateSyntaxError as error:
        raise ChatError(f"chat template, line {error.lineno}: {error.message}") from error


def _default_template(tokenizer: Tokenizer) -> str:
    missing = [token for token in (IM_START, IM_END) if tokenizer.token_to_id(token) not in tokenizer.control_ids]
    if missing:
        raise ChatError(
            f"chat template: this tokenizer has none, and no {' or '.join(missing)} for the default one; "
            "add chat_template to its tokenizer_config.json"
        )
    return default_chat_template()


def _thinking(enabled: bool) -> dict[str, bool]:
    """Set the switch by each of the names that published templates give it."""
    return dict.fromkeys(("enable_thinking", "open_thinking", "thinking"), enabled)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # jinja2's own filter escapes for HTML, which would teach the model \u003c in place of <.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


# --- Masks of templates without generation tags ------------------------------------------------------------------


def _prefix_spans(template: _Template, turns: list[Turn], options: dict[str, Any], field: str) -> list[Span]:
    """Find what is trained by rendering: turn i is what follows the prompt made of the turns before it."""
    full = template.text(turns, options)
    spans: list[Span] = []
    done = 0
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        start, end = _turn_start(template, turns, i, options, full), _turn_end(template, turns, i, options, full)
        if start is None or end is None or not done <= start <= end:
            raise ChatError(
                f"{field}[{i}]: this chat template has no generation tags and renders the turns up to here differently "
                "once others follow (it may drop earlier reasoning), so what to train cannot be told exactly; put "
                "{% generation %} tags into the template, or split the conversation after each assistant turn"
            )
        spans += [(full[done:start], False), (full[start:end], True)]
        done = end
    return [*spans, (full[done:], False)]


def _turn_start(template: _Template, turns: list[Turn], i: int, options: dict[str, Any], full: str) -> int | None:
    """Return where turn i begins: the length of its prompt, whichever thinking switch it was written under."""
    for switch in ({}, _thinking(True), _thinking(False)):
        prompt = template.text(turns[:i], options | switch, add_generation_prompt=True)
        if full.startswith(prompt):
            return len(prompt)
    return None


def _turn_end(template: _Template, turns: list[Turn], i: int, options: dict[str, Any], full: str) -> int | None:
    """Return where turn i ends: where the conversation up to it does.

    If the template treats a last turn unlike earlier ones (Qwen drops earlier reasoning), a mark behind the content
    tells what closes the turn and where it stands, provided that the mark changes nothing else.
    """
    alone = template.text(turns[: i + 1], options)
    if full.startswith(alone):
        return len(alone)
    mark = next(_unused_characters([full, alone]))
    content = turns[i]["content"]
    core = content.rstrip()
    marked = turns[i] | {"content": core + mark + content[len(core) :]}
    marked_full = template.text([*turns[:i], marked, *turns[i + 1 :]], options)
    marked_alone = template.text([*turns[:i], marked], options)
    unchanged = (marked_full.replace(mark, "", 1), marked_alone.replace(mark, "", 1)) == (full, alone)
    closing = marked_alone.partition(mark)[2]
    if not unchanged or not marked_full.partition(mark)[2].startswith(closing):
        return None
    return marked_full.index(mark) + len(closing)


# --- Tokens ------------------------------------------------------------------------------------------------------


def _tokenise(tokenizer: Tokenizer, spans: list[Span], disguise: _Disguise | None) -> Rendered:
    """Encode each span by itself, so that no merge crosses from what is given into what is trained."""
    if disguise is None and not tokenizer.joins_pieces:
        return _tokenise_whole(tokenizer, spans)
    token_ids: list[int] = []
    mask: list[int] = []
    for text, trained in spans:
        ids = tokenizer.encode_control(text) if disguise is None else disguise.encode(tokenizer, text)
        token_ids += ids
        mask += [int(trained)] * len(ids)
    return Rendered(token_ids, mask)


def _tokenise_whole(tokenizer: Tokenizer, spans: list[Span]) -> Rendered:
    """Encode all spans as one text, for tokenizers that put a space before each text; a token is where it starts."""
    ids, starts = tokenizer.encode_control_offsets("".join(text for text, _ in spans))
    ends = list(accumulate(len(text) for text, _ in spans))
    return Rendered(ids, [int(spans[bisect_right(ends, start)][1]) for start in starts])
