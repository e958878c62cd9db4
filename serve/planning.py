"""From a checked body to requests for the engine: which model, which tokens, how long, in which form.

Everything that costs time before the engine sees a request is here (templates, tokenising, compiling grammars), free of
the event loop, so that endpoints run it on a thread.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minillm_jax.chat import ChatError, Turn, render
from minillm_jax.tokenizer import TokenizerError, encode_prompt
from serve.errors import ApiError, invalid
from serve.grammar import GrammarError, build, json_rule, regex_rule
from serve.parsing import CALL, THINK
from serve.protocol import Request
from serve.schemas import ChatRequest, CompletionRequest, Message, ResponseFormat, Sampling, Tool
from serve.service import Service

SEED_BITS = 31


@dataclass(frozen=True)
class Plan:
    """What an endpoint does for one body.

    Attributes:
        model: name of the model in the answer.
        requests: for the engine, those of one prompt beside each other.
        prompts: token ids of the prompts, each once.
        tools: names of the tools that may be called.
        thinking: whether the prompt ends inside a thought.
    """

    model: str
    requests: list[Request]
    prompts: list[list[int]]
    tools: frozenset[str] = frozenset()
    thinking: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))


def plan_chat(service: Service, body: ChatRequest) -> Plan:
    """Plan the answers to a conversation.

    Raises:
        ApiError: something that the body asks for cannot be had; the error says which field.
    """
    model, adapter = service.resolve(body.model)
    _check_sampling(service, body, prompts=1)
    tools = _declared_tools(service, body)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("needs logprobs: true", "top_logprobs")
    wanted = body.max_completion_tokens or body.max_tokens
    prompt = _fit_conversation(service, body, wanted)
    max_new_tokens = _max_new_tokens(service, len(prompt), wanted, "messages")
    thinking = service.tokenizer.decode(prompt[-8:]).rstrip().endswith(THINK)
    grammar = _reply_grammar(service, body, tools, thinking)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    common = _settings(service, body, adapter) | {"logprobs": logprobs, "max_new_tokens": max_new_tokens}
    if body.tool_choice and body.tool_choice.mode == "none":
        tools = {}
        if (tag := service.tokenizer.token_to_id(CALL)) is not None:
            common["logit_bias"] = {**body.logit_bias, tag: -100.0}
    requests = _multiply(service, body, [prompt], common, grammar)
    return Plan(model, requests, [prompt], frozenset(tools), thinking)


def plan_completion(service: Service, body: CompletionRequest) -> Plan:
    """Plan the completions of prompts.

    Raises:
        ApiError: something that the body asks for cannot be had; the error says which field.
    """
    model, adapter = service.resolve(body.model)
    if body.suffix:
        raise invalid("this model only continues texts and cannot fill gaps; leave suffix out", "suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise invalid("choosing among more completions than n is not offered; leave best_of out", "best_of")
    _check_sampling(service, body, prompts=len(body.prompt))
    prompts = tokenise_prompts(service, body.prompt, "prompt")
    longest = max(map(len, prompts))
    common = _settings(service, body, adapter) | {
        "max_new_tokens": _max_new_tokens(service, longest, body.max_tokens, "prompt"),
        "logprobs": body.logprobs,
        "prompt_logprobs": bool(body.echo) and body.logprobs is not None,
    }
    grammar = _reply_grammar(service, body, {}, thinking=False)
    return Plan(model, _multiply(service, body, prompts, common, grammar), prompts)


def tokenise_prompts(service: Service, prompts: Sequence[str | list[int]], param: str) -> list[list[int]]:
    """Bring prompts to token ids.

    Raises:
        ApiError: too many of them, an empty one, or an id outside the vocabulary.
    """
    if len(prompts) > service.limits.max_batch:
        raise invalid(f"has {len(prompts)} entries; this server takes up to {service.limits.max_batch}", param)
    vocab_size = service.engine.vocab_size
    for prompt in prompts:
        if isinstance(prompt, list) and not all(0 <= token < vocab_size for token in prompt):
            raise invalid(f"holds a token id outside the vocabulary of {vocab_size}", param)
    try:
        tokens = [encode_prompt(service.tokenizer, prompt) for prompt in prompts]
    except TokenizerError as error:
        raise invalid(str(error), param) from error
    return [_check_length(service, ids, param) for ids in tokens]


def render_prompt(service: Service, body: Any, turns: list[Turn], tools: Sequence[Tool] | None) -> list[int]:
    """Render turns to the prompt of the next one; `body` supplies the template's switches.

    Raises:
        ApiError: the turns make no sense, or the chat template cannot render them.
    """
    options = body.chat_template_kwargs
    try:
        return render(
            service.tokenizer,
            turns,
            tools=[tool.model_dump(exclude_unset=True) for tool in tools] if tools else None,
            add_generation_prompt=True,
            enable_thinking=None if options is None else options.enable_thinking,
            field="messages",
        ).token_ids
    except (ChatError, TokenizerError) as error:
        found = re.match(r"((?:messages|tools)[\w.\[\]]*): (.*)", str(error), re.DOTALL)
        raise (invalid(found[2], found[1]) if found else invalid(str(error), "messages")) from error


def turns_of(service: Service, messages: Sequence[Message]) -> list[Turn]:
    """Bring messages to turns of a chat template.

    Raises:
        ApiError: there are more than the server takes.
    """
    if len(messages) > service.limits.max_messages:
        most = service.limits.max_messages
        raise invalid(f"has {len(messages)} entries; this server takes up to {most}", "messages")
    return [message.turn() for message in messages]


# --- Length -------------------------------------------------------------------------------------------------------


def _fit_conversation(service: Service, body: ChatRequest, wanted: int | None) -> list[int]:
    """Render the conversation, without its oldest turns if it is too long and may be cut.

    A system prompt stays, and so does everything from the last user's turn on; what goes are whole exchanges.
    """
    turns, tools = turns_of(service, body.messages), body.tools
    prompt = render_prompt(service, body, turns, tools)
    context = service.engine.context
    reserve = min(service.limits.default_max_tokens, context // 2) if wanted is None else wanted
    room = min(context - reserve, service.limits.max_prompt_tokens or context)
    if len(prompt) <= room or (body.truncation or service.config.truncation) == "error":
        return _check_length(service, prompt, "messages")
    head = next((i for i, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
    starts = [i for i, turn in enumerate(turns) if i > head and turn["role"] == "user"]

    def from_turn(start: int) -> list[int]:
        return render_prompt(service, body, [*turns[:head], *turns[start:]], tools)

    enough = bisect_left(starts, True, key=lambda start: len(from_turn(start)) <= room)
    if enough < len(starts):
        return from_turn(starts[enough])
    shortest = from_turn(starts[-1]) if starts else prompt
    raise _too_long(service, len(shortest), reserve, "messages")


def _check_length(service: Service, prompt: list[int], param: str) -> list[int]:
    most = service.limits.max_prompt_tokens
    if most and len(prompt) > most:
        message = f"has {len(prompt)} tokens; this server reads up to {most}"
        raise invalid(message, param, code="context_length_exceeded")
    return prompt


def _max_new_tokens(service: Service, prompt_tokens: int, wanted: int | None, param: str) -> int:
    left = service.engine.context - prompt_tokens
    if left < (1 if wanted is None else wanted):
        raise _too_long(service, prompt_tokens, wanted or 1, param)
    return min(left, service.limits.default_max_tokens) if wanted is None else wanted


def _too_long(service: Service, prompt_tokens: int, wanted: int, param: str) -> ApiError:
    message = (
        f"the prompt has {prompt_tokens} tokens and the completion {wanted}, but the model's context is "
        f"{service.engine.context}; shorten the prompt, or ask for fewer tokens"
    )
    return invalid(message, param, code="context_length_exceeded")


# --- Settings -----------------------------------------------------------------------------------------------------


def _check_sampling(service: Service, body: Sampling, prompts: int) -> None:
    """Hold a body to the server's limits and the model's vocabulary."""
    limits, choices = service.limits, (body.n or 1) * prompts
    if choices > limits.max_choices:
        raise invalid(f"{choices} completions are more than the {limits.max_choices} of one request", "n")
    if len(body.stop) > limits.max_stop:
        raise invalid(f"has {len(body.stop)} strings; this server takes up to {limits.max_stop}", "stop")
    if len(body.logit_bias) > limits.max_logit_bias:
        raise invalid(f"has more than {limits.max_logit_bias} entries", "logit_bias")
    if any(token >= service.engine.vocab_size for token in body.logit_bias):
        raise invalid(f"names a token outside the vocabulary of {service.engine.vocab_size}", "logit_bias")
    if body.stream_options is not None and not body.stream:
        raise invalid("is for streams; set stream: true, or leave it out", "stream_options")


def _settings(service: Service, body: Sampling, adapter: str | None) -> dict[str, Any]:
    """Return what all engine requests of a body share; a missing field leaves the engine's default."""
    names = "temperature top_p min_p presence_penalty frequency_penalty repetition_penalty ignore_eos"
    given = {name: value for name in names.split() if (value := getattr(body, name)) is not None}
    if body.top_k is not None:
        given["top_k"] = max(body.top_k, 0)  # some clients write -1 for all
    deadline = time.monotonic() + service.limits.request_timeout
    return given | {"logit_bias": body.logit_bias, "adapter": adapter, "deadline": deadline}


def derive_seed(seed: int, index: int) -> int:
    """Return the seed of a request's completion: the first has the request's own, where it fits the engine's range."""
    if index == 0 and 0 <= seed < 2**SEED_BITS:
        return seed
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2**SEED_BITS


def _multiply(
    service: Service, body: Sampling, prompts: list[list[int]], common: dict[str, Any], grammar: str | None
) -> list[Request]:
    """Make n requests of each prompt, with seeds and constraints of their own."""
    seed = secrets.randbits(SEED_BITS) if body.seed is None else body.seed
    requests = []
    for prompt in prompts:
        for index in range(body.n or 1):
            constraint = None
            if grammar is not None:
                try:
                    constraint = service.grammars.constraint(grammar)
                except GrammarError as error:
                    param = "response_format" if body.response_format else "tools"
                    raise invalid(f"cannot be followed: {error}", param) from error
            own_seed = derive_seed(seed, index)
            requests.append(Request(token_ids=prompt, **common, seed=own_seed, constraint=constraint))
    return requests


# --- Form ---------------------------------------------------------------------------------------------------------


def _declared_tools(service: Service, body: ChatRequest) -> dict[str, dict[str, Any] | None]:
    """Return the parameters of the tools by name."""
    if body.functions:
        raise invalid("is OpenAI's older form and not read; write the functions as tools", "functions")
    declared = body.tools or []
    if len(declared) > service.limits.max_tools:
        raise invalid(f"has {len(declared)} entries; this server takes up to {service.limits.max_tools}", "tools")
    tools = {tool.function.name: tool.function.parameters for tool in declared}
    if len(tools) < len(declared):
        raise invalid("two tools have the same name", "tools")
    choice = body.tool_choice
    if choice and choice.mode in ("required", "named") and not tools:
        raise invalid("asks for a call, but there are no tools to call", "tool_choice")
    if choice and choice.function is not None and choice.function not in tools:
        raise invalid(f"names {choice.function[:64]!r}, which is not among the tools", "tool_choice")
    return tools


def _reply_grammar(
    service: Service, body: Sampling, tools: dict[str, dict[str, Any] | None], thinking: bool
) -> str | None:
    """Write the grammar that the body asks for; None if the reply is free."""
    answer = _answer_rule(body.response_format)
    mode, several = "none", False
    if isinstance(body, ChatRequest) and tools:
        choice = body.tool_choice
        mode, several = choice.mode if choice else "auto", body.parallel_tool_calls is not False and len(tools) > 0
        if choice and choice.function is not None:
            tools, several = {choice.function: tools[choice.function]}, False
    forced = mode in ("required", "named")
    if answer is None and not forced:
        return None
    grammar = build(
        service.grammars,
        answer=None if forced else answer,
        tools=tools if mode != "none" else {},
        several=several,
        thinking=thinking,
    )
    if len(grammar) > service.limits.max_grammar_bytes:
        message = f"is too large: {len(grammar)} bytes as a grammar, of {service.limits.max_grammar_bytes}"
        raise invalid(message, "response_format" if answer else "tools")
    return grammar


def _answer_rule(form: ResponseFormat | None) -> str | None:
    """Return the rule of a response format; None for plain text."""
    if form is None or form.type == "text":
        return None
    if form.type == "regex":
        if form.regex is None:
            raise invalid("is missing", "response_format.regex")
        return regex_rule(form.regex)
    if form.type == "json_object":
        return json_rule({"type": "object"})
    if form.json_schema is None:
        raise invalid("is missing", "response_format.json_schema")
    return json_rule(form.json_schema.schema_)
