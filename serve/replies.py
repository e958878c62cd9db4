"""What answers look like: the JSON objects of OpenAI's API as typed dicts, from which the OpenAPI document is made.

Plain dicts, because a stream writes thousands a second; mypy holds their builders to these types, and a test holds
what the server sends to the document.
"""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

FinishReason = Literal["stop", "length", "tool_calls"]


class ErrorDetail(TypedDict):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(TypedDict):
    """Any answer that is not a success."""

    error: ErrorDetail


class PromptDetails(TypedDict):
    """How much of a prompt had been read before."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


# --- Chat ---------------------------------------------------------------------------------------------------------


class FunctionCall(TypedDict):
    """A function and its arguments, as a JSON string."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(TypedDict):
    """An assistant's turn."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]


class TopLogprob(TypedDict):
    """One likely token; `bytes` are exact where `token` may be part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """One token of an answer, and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Log-probabilities of an answer's tokens, its end aside."""

    content: list[ChatLogprob]
    refusal: None


class ChatChoice(TypedDict):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(TypedDict, total=False):
    """More of a function call."""

    name: str
    arguments: str


class ToolCallDelta(TypedDict):
    """More of a tool call; the first carries id, type and name."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class Delta(TypedDict, total=False):
    """More of an assistant's turn."""

    role: Literal["assistant"]
    content: str
    reasoning_content: str
    tool_calls: list[ToolCallDelta]


class ChatChunkChoice(TypedDict):
    """More of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(TypedDict):
    """One event of a stream; `usage` is there when it was asked for, and null before the end."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


# --- Completions --------------------------------------------------------------------------------------------------


class TextLogprobs(TypedDict):
    """Log-probabilities as the older API writes them: four lists as long as the tokens."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(TypedDict):
    """One completion, or in a stream more of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextCompletion(TypedDict):
    """Answer of /v1/completions, or one event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: NotRequired[Usage | None]


# --- The rest -----------------------------------------------------------------------------------------------------


class Embedding(TypedDict):
    """One input's vector: numbers, or little-endian float32 in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(TypedDict):
    """Answer of /v1/embeddings."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class Model(TypedDict):
    """A model that requests may name; an adapter's `parent` is its base."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None
    max_model_len: int


class Models(TypedDict):
    """Answer of /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Tokenized(TypedDict):
    """Answer of /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(TypedDict):
    """Answer of /detokenize."""

    prompt: str


class Status(TypedDict):
    """Answer of /health and /ready."""

    status: str
