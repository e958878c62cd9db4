"""What requests look like: OpenAI's fields, and those that other servers of open models have added to them.

A body becomes one of these models or an error that names a field. Limits that depend on the server's settings or the
model are checked later, in `planning`; here are those that hold anywhere. Unknown fields are accepted and ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from serve.errors import wrong

Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
SEED_LIMIT = 2**63


class Body(BaseModel):
    """A JSON object of a request: no type is bent to fit, no number is infinite or not one."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


# --- Fields that may have several forms ---------------------------------------------------------------------------


def _one_or_many(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "array", "items": schema, "minItems": 1}]}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [*schema.get("anyOf", [schema]), {"type": "null"}]}


TEXT = {"type": "string"}
TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _read_prompts(value: Any) -> list[str | list[int]]:
    """Bring the four forms of a prompt to a list of strings and lists of token ids."""
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if not isinstance(value, list) or not all(isinstance(item, str) or _is_ids(item) for item in value):
        raise wrong("must be a string, a list of strings, a list of token ids, or a list of such lists")
    if not value:
        raise wrong("is empty; give at least one")
    return value


Prompts = Annotated[
    list[str | list[int]],
    BeforeValidator(_read_prompts),
    WithJsonSchema({"anyOf": [*_one_or_many(TEXT)["anyOf"], *_one_or_many(TOKEN_IDS)["anyOf"]]}),
]


def _read_stop(value: Any) -> list[str]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise wrong("must be a string or a list of strings")
    if "" in stops:
        raise wrong("must not hold an empty string")
    return stops


Stop = Annotated[
    list[str],
    BeforeValidator(_read_stop),
    WithJsonSchema(_nullable(_one_or_many({"type": "string", "minLength": 1}))),
]


def _read_logit_bias(value: Any) -> dict[int, float]:
    """Turn the string keys of JSON into token ids; a bias of 0 is none."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise wrong("must be an object from token ids to numbers")
    biases = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise wrong(f"{key[:20]!r} is not a token id")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise wrong(f"the bias of token {key} must lie between -100 and 100")
        if bias:
            biases[int(key)] = float(bias)
    return biases


LogitBias = Annotated[
    dict[int, float],
    BeforeValidator(_read_logit_bias),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
                    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                },
                {"type": "null"},
            ]
        }
    ),
]


def _read_content(value: Any) -> str | None:
    """Join the text parts of a message; a part of another type is refused rather than left out."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong("must be a string or a list of text parts")
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise wrong(f'part {i} must be an object such as {{"type": "text", "text": "…"}}')
        if part["type"] != "text":
            raise wrong(f"part {i} is of type {part['type'][:40]!r}; this model reads only text")
        if not isinstance(part.get("text"), str):
            raise wrong(f"part {i}: text must be a string")
        texts.append(part["text"])
    return "\n".join(texts)


_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": TEXT},
    "required": ["type", "text"],
}
Content = Annotated[
    str | None,
    BeforeValidator(_read_content),
    WithJsonSchema({"anyOf": [TEXT, {"type": "array", "items": _TEXT_PART}, {"type": "null"}]}),
]


@dataclass(frozen=True)
class ToolChoice:
    """Whether a tool may or must be called, and which: `function` names the one of mode `named`."""

    mode: Literal["none", "auto", "required", "named"]
    function: str | None = None


def _read_tool_choice(value: Any) -> ToolChoice | None:
    if value is None or isinstance(value, ToolChoice):
        return value
    if value in ("none", "auto", "required"):
        return ToolChoice(value)
    if isinstance(value, Mapping) and value.get("type") == "function":
        function = value.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            return ToolChoice("named", function["name"])
    raise wrong('must be none, auto, required or {"type": "function", "function": {"name": "…"}}')


_NAMED = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {"type": "object", "properties": {"name": TEXT}, "required": ["name"]},
    },
    "required": ["type", "function"],
}
ToolChoiceField = Annotated[
    ToolChoice | None,
    BeforeValidator(_read_tool_choice),
    WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, _NAMED, {"type": "null"}]}),
]


# --- Parts of requests --------------------------------------------------------------------------------------------


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    def turn(self) -> dict[str, Any]:
        """Return the turn as chat templates know it."""
        turn = {key: value for key, value in self.model_dump().items() if value is not None}
        return turn | {"role": "system" if self.role == "developer" else self.role}


class Function(Body):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class SchemaFormat(Body):
    """A JSON schema that the answer must follow; it always does, whatever `strict` says."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What the answer must look like; `regex` is this server's own addition."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: SchemaFormat | None = None
    regex: str | None = None


class StreamOptions(Body):
    """How a stream ends: with `include_usage` its last chunk counts tokens."""

    include_usage: bool | None = None


class TemplateOptions(Body):
    """Switches of chat templates."""

    enable_thinking: bool | None = None


class Sampling(Body):
    """What all completions have in common; a field that is missing or null has its default."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    logit_bias: LogitBias = Field(default_factory=dict)
    seed: int | None = Field(None, ge=-SEED_LIMIT, lt=SEED_LIMIT)
    stop: Stop = Field(default_factory=list)
    ignore_eos: bool | None = None
    n: int | None = Field(None, ge=1, lt=2**31)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str | None = Field(None, max_length=512)

    @property
    def include_usage(self) -> bool:
        """Whether a stream counts tokens at its end."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: ToolChoiceField = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    truncation: Literal["error", "turns"] | None = None


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    suffix: str | None = None
    best_of: int | None = Field(None, ge=1, lt=2**31)


class EmbeddingRequest(Body):
    """POST /v1/embeddings."""

    input: Prompts
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = Field(None, max_length=512)


class TokenizeRequest(Body):
    """POST /tokenize: the tokens of a prompt as /v1/completions reads it, or of messages as chat completions do."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None


class DetokenizeRequest(Body):
    """POST /detokenize: the text of tokens."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]
