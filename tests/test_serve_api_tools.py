"""Thoughts, calls of tools and enforced forms: taken apart in any pieces, and obeyed by a random model."""

import json
import re

import numpy as np
import openai
import pytest
from api_server import Server
from example_tokenizers import CORPUS, TOKENIZER, spaced_tokenizer
from fake_engine import FakeEngine
from hypothesis import given
from hypothesis import strategies as st

from minillm_jax.chat import render
from minillm_jax.tokenizer import Tokenizer, train_tokenizer
from serve.grammar import GrammarError, Grammars, build, json_rule, regex_rule
from serve.parsing import Call, ReplyParser, Text
from serve.text import StopStrings

QUESTION = [{"role": "user", "content": "hello"}]


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": sorted(properties)}
    return {"type": "function", "function": {"name": name, "description": f"does {name}", "parameters": parameters}}


WEATHER = tool("weather", city={"enum": ["Oslo", "Rome"]}, days={"type": "integer", "minimum": 1, "maximum": 9})
SEARCH = tool("search", query={"type": "string", "maxLength": 12})
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>'


def parsed(pieces, tools=(), thinking=False):
    """Reasoning, content and calls of a reply that arrives in pieces."""
    parser = ReplyParser(frozenset(tools), thinking)
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
    joined = {
        kind: "".join(part.text for part in parts if isinstance(part, Text) and part.kind == kind)
        for kind in ("reasoning", "content")
    }
    return joined["reasoning"], joined["content"], [(p.name, p.arguments) for p in parts if isinstance(p, Call)]


# --- Parsing ------------------------------------------------------------------------------------------------------

OSLO = ("weather", '{"city": "Oslo", "days": 3}')
REPLIES = [
    ("plain text\n", ("", "plain text\n", [])),
    ("\n\nplain", ("", "\n\nplain", [])),
    ("a < b <b> </thin", ("", "a < b <b> </thin", [])),
    ("<think>\nhm\n</think>\n\nyes", ("hm", "yes", [])),
    ("\n<think>\nhm\n\nhm\n</think>\n\nyes\n\nno", ("hm\n\nhm", "yes\n\nno", [])),
    ("<think>\n\n</think>\n\nyes", ("", "yes", [])),
    ("<think>\nnever done\n", ("never done", "", [])),
    ("<think>a</think><answer>\n42\n</answer>", ("a", "42", [])),
    (CALL, ("", "", [OSLO])),
    (f"wait\n{CALL}\n{CALL}", ("", "wait", [OSLO, OSLO])),
    (f"<think>\nhm\n</think>\n\nok\n{CALL}", ("hm", "ok", [OSLO])),
    (CALL.replace("weather", "unknown"), ("", '{"name": "unknown", "arguments": {"city": "Oslo", "days": 3}}', [])),
    (f"<tool_call>\nnot json\n</tool_call>\n{CALL}", ("", "not json", [OSLO])),
    ('<tool_call>\n{"name": ["weather"]}\n</tool_call>', ("", '{"name": ["weather"]}', [])),
    ("<tool_call>\n" + "[" * 9999 + "\n</tool_call>!", ("", "[" * 9999 + "!", [])),
    ('<tool_call>\n{"name": "weather", "argu', ("", '{"name": "weather", "argu', [])),
    ('<tool_call>\n{"name": "weather"}\n</tool_call>', ("", "", [("weather", "{}")])),
    (
        '<tool_call>\n{"name": "search", "arguments": {"query": "</tool_call>"}}\n</tool_call>',
        ("", "", [("search", '{"query": "</tool_call>"}')]),
    ),
]


@pytest.mark.parametrize(("reply", "expected"), REPLIES, ids=range(len(REPLIES)))
@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
def test_a_reply_is_taken_apart_the_same_in_pieces_of_any_size(reply, expected, size):
    pieces = [reply[i : i + size] for i in range(0, len(reply), size)]
    assert parsed(pieces, {"weather", "search"}) == expected


def test_without_tools_the_tags_of_calls_vanish_and_their_text_stays():
    assert parsed([f"a{CALL}"])[1:] == ('a\n{"name": "weather", "arguments": {"city": "Oslo", "days": 3}}\n', [])


def test_a_thought_that_the_prompt_opened_is_a_thought():
    assert parsed(["\nhm\n</thi", "nk>\n\nyes"], thinking=True) == ("hm", "yes", [])


@given(st.text("ab<>/\n think", max_size=40), st.text("xy <", min_size=1, max_size=20), st.integers(0, 2))
def test_a_rendered_turn_parses_back_to_itself(thought, content, calls):
    thought, content = thought.strip("\n"), content.strip("\n")
    if any(tag in thought + content for tag in ("<think>", "</think>")):
        return
    turn = {"role": "assistant", "content": content}
    if thought:
        turn["reasoning_content"] = thought
    if calls:
        function = {"name": "search", "arguments": {"query": "势 <think>"}}
        turn["tool_calls"] = [{"type": "function", "function": function}] * calls
    prompt = render(TOKENIZER, QUESTION, add_generation_prompt=True).token_ids
    reply = render(TOKENIZER, [*QUESTION, turn]).token_ids[len(prompt) :]
    text = TOKENIZER.decode(reply).removesuffix("<|im_end|>\n")
    expected = [("search", '{"query": "势 <think>"}')] * calls
    assert parsed(list(text), {"search"}) == (thought, content, expected)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 5))
def test_stop_strings_cut_pieces_where_they_would_cut_the_whole(text, stops, size):
    finder = StopStrings(stops)
    sent = "".join(finder.push(text[i : i + size]) for i in range(0, len(text), size)) + finder.flush()
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert sent == text and not finder.hit
    else:
        assert finder.hit and text.startswith(sent) and not any(stop in sent for stop in stops)
        assert any(text[len(sent) :].startswith(stop) for stop in stops)


# --- Over HTTP ----------------------------------------------------------------------------------------------------


def ask(client, stream, **options):
    """One answer's message as (reasoning, content, [(id, name, arguments)], finish_reason), whole or from deltas."""
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, stream=stream, **options)
    if not stream:
        (choice,) = answer.choices
        message = choice.message
        calls = [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or []]
        return getattr(message, "reasoning_content", ""), message.content or "", calls, choice.finish_reason
    reasoning, content, calls, finish = "", "", {}, None
    for chunk in answer:
        (choice,) = chunk.choices
        delta, finish = choice.delta, choice.finish_reason
        reasoning += getattr(delta, "reasoning_content", None) or ""
        content += delta.content or ""
        for call in delta.tool_calls or []:
            if call.index not in calls:
                assert call.id and call.type == "function" and call.function.name
                calls[call.index] = [call.id, call.function.name, ""]
            calls[call.index][2] += call.function.arguments
    assert list(calls) == list(range(len(calls)))
    return reasoning, content, [tuple(call) for call in calls.values()], finish


def serving(reply, context=4096):
    return Server(FakeEngine(TOKENIZER, None if reply is None else lambda request: reply, context=context))


def client_of(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_calls_and_content_come_in_fields_of_their_own(stream):
    reply = f"<think>\nThe weather, 势.\n</think>\n\nLet me look.\n{CALL}\n{CALL.replace('Oslo', 'Rome')}"
    with serving(reply) as server, client_of(server) as client:
        reasoning, content, calls, finish = ask(client, stream, tools=[WEATHER])
        assert (reasoning, content, finish) == ("The weather, 势.", "Let me look.", "tool_calls")
        assert [call[1:] for call in calls] == [OSLO, ("weather", '{"city": "Rome", "days": 3}')]
        assert len({call[0] for call in calls}) == 2 and all(call[0].startswith("call_") for call in calls)
        _, _, calls, finish = ask(client, stream, tools=[WEATHER], parallel_tool_calls=False)
        assert ([call[1:] for call in calls], finish) == ([OSLO], "tool_calls")
        assert server.engine.idle()
        _, content, calls, finish = ask(client, stream, tools=[WEATHER], tool_choice="none")
        assert (calls, finish) == ([], "stop") and "tool_call>" not in content
        bias = server.engine.requests[-1].logit_bias
        assert bias == {TOKENIZER.token_to_id("<tool_call>"): -100.0}


def test_a_stop_string_is_looked_for_in_what_is_said_not_in_what_is_thought():
    with serving("<think>\nend\n</think>\n\nthe end.") as server, client_of(server) as client:
        for stream in (False, True):
            assert ask(client, stream, stop=["end"]) == ("end", "the ", [], "stop")


def test_a_conversation_with_calls_and_results_is_rendered_as_in_training():
    with serving("ok") as server, client_of(server) as client:
        call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
        messages = [
            {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
            *QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
            {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        ]
        client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER])
        prompt = TOKENIZER.decode(server.engine.requests[-1].token_ids)
        turns = [{"role": "system", "content": "be\nbrief"}, *QUESTION]
        turns += [{"role": "assistant", "reasoning_content": "hm", "tool_calls": [call]}]
        turns += [{"role": "tool", "content": "rain"}]
        expected = render(TOKENIZER, turns, tools=[WEATHER], add_generation_prompt=True)
        assert prompt == TOKENIZER.decode(expected.token_ids)


def test_thinking_is_switched_by_the_template():
    with serving("hm\n</think>\n\nyes") as server, client_of(server) as client:
        switch = {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}
        assert ask(client, False, **switch) == ("hm", "yes", [], "stop")
        assert TOKENIZER.decode(server.engine.requests[-1].token_ids).endswith("assistant\n<think>\n")
        switch["extra_body"]["chat_template_kwargs"]["enable_thinking"] = False
        ask(client, True, **switch)
        assert TOKENIZER.decode(server.engine.requests[-1].token_ids).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "search"}}])
def test_a_required_call_is_well_formed_even_from_a_random_model(stream, choice):
    with serving(None) as server, client_of(server) as client:
        for seed in range(8):
            options = {"tools": [WEATHER, SEARCH], "tool_choice": choice, "seed": seed, "max_tokens": 1500}
            _, content, calls, finish = ask(client, stream, **options)
            assert (content, finish) == ("", "tool_calls") and calls
            for _, name, text in calls:
                arguments = json.loads(text)
                if name == "weather":
                    assert choice == "required" and arguments["city"] in ("Oslo", "Rome")
                    assert type(arguments["days"]) is int and 1 <= arguments["days"] <= 9
                else:
                    assert name == "search" and set(arguments) == {"query"} and len(arguments["query"]) <= 12
            assert choice == "required" or len(calls) == 1


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "next": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]},
    },
    "required": ["name", "tags", "next"],
    "additionalProperties": False,
    "$defs": {"leaf": {"type": "boolean"}},
}


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_and_a_regular_expression_are_followed_by_a_random_model(stream):
    with serving(None) as server, client_of(server) as client:
        form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
        for seed in range(5):
            _, content, _, finish = ask(client, stream, response_format=form, seed=seed)
            thing = json.loads(content)
            assert finish == "stop" and list(thing) == ["name", "tags", "next"] and len(thing["name"]) <= 8
            assert set(thing["tags"]) <= {"a", "b"} and thing["next"] in (True, False, None)
            regex = {"response_format": {"type": "regex", "regex": r"^\d{4}-(0[1-9]|1[0-2])/势\.$"}}
            _, content, _, finish = ask(client, stream, extra_body=regex, seed=seed)
            assert finish == "stop" and re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])/势\.", content)
            _, content, _, _ = ask(client, stream, response_format={"type": "json_object"}, max_tokens=60, seed=seed)
            assert content.startswith("{")


def test_a_form_is_followed_after_the_thought_and_beside_tools():
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    thinking = {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}
    with serving(None, context=20_000) as server, client_of(server) as client:
        reasoning, content, _, finish = ask(client, False, response_format=form, seed=1, max_tokens=9000, **thinking)
        assert reasoning and content in ('"yes"', '"no"') and finish == "stop"
        answers = [ask(client, False, response_format=form, tools=[SEARCH], seed=seed)[1:3] for seed in range(12)]
        assert {bool(calls) for _, calls in answers} == {True, False}
        assert all(bool(calls) or content in ('"yes"', '"no"') for content, calls in answers)


# --- Grammars -----------------------------------------------------------------------------------------------------


def drawn(constraint, tokenizer, seed, most=400):
    """Text and length of a random walk through a grammar."""
    draw, tokens = np.random.default_rng(seed), []
    while not constraint.ended and len(tokens) < most:
        token = int(draw.choice(np.flatnonzero(constraint.mask())))
        if token in tokenizer.eos_token_ids:
            break
        constraint.push(token)
        tokens.append(token)
    return b"".join(map(tokenizer.token_bytes, tokens)).decode(), len(tokens)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, spaced_tokenizer()], ids=["byte-level", "spaces and byte fallback"])
def test_masks_allow_what_continues_the_grammar_and_nothing_else(tokenizer):
    grammars = Grammars(tokenizer, tokenizer.vocab_size + 5)
    grammar = build(grammars, answer=regex_rule("(it was|势) the"), tools={})
    first = grammars.constraint(grammar).mask()
    assert first.shape == (tokenizer.vocab_size + 5,) and first.dtype == bool
    begins = {token for token in range(tokenizer.vocab_size) if fits(tokenizer.token_bytes(token))}
    assert set(np.flatnonzero(first)) == begins - set(tokenizer.control_ids)
    assert {drawn(grammars.constraint(grammar), tokenizer, seed)[0] for seed in range(9)} == {"it was the", "势 the"}


def fits(data):
    return bool(data) and any(text.encode().startswith(data) for text in ("it was the", "势 the"))


def test_a_grammar_ends_by_itself_and_then_allows_the_end_alone():
    grammars = Grammars(TOKENIZER, TOKENIZER.vocab_size)
    constraint = grammars.constraint(build(grammars, answer=json_rule({"const": "a"}), tools={}))
    for token in TOKENIZER.encode('"a"'):
        assert not constraint.ended and constraint.mask()[token]
        constraint.push(token)
    assert constraint.ended and np.flatnonzero(constraint.mask()).tolist() == list(TOKENIZER.eos_token_ids)
    constraint.push(TOKENIZER.eos_token_id)
    assert constraint.error is None


def test_two_completions_walk_one_grammar_apart():
    grammars = Grammars(TOKENIZER, TOKENIZER.vocab_size)
    grammar = build(grammars, answer=regex_rule("ab|cd"), tools={})
    one, other = grammars.constraint(grammar), grammars.constraint(grammar)
    before = other.mask()
    one.push(TOKENIZER.encode("a")[0])
    assert (other.mask() == before).all() and not (one.mask() == before).all()


def test_a_form_that_grows_without_bound_is_an_error_and_not_a_hang():
    regex = {"extra_body": {"response_format": {"type": "regex", "regex": "(?:(?:a?a){500}){500}b"}}}
    with serving(None) as server, client_of(server) as client:
        with pytest.raises(openai.BadRequestError, match="too complex"):
            ask(client, False, **regex)
        with pytest.raises(openai.APIError, match="too complex"):
            ask(client, True, **regex)


def test_what_is_no_grammar_is_told_so():
    grammars = Grammars(TOKENIZER, TOKENIZER.vocab_size)
    for rule in (regex_rule("(a"), json_rule({"type": "strin"}), json_rule({"minimum": "x"})):
        with pytest.raises(GrammarError) as caught:
            grammars.constraint(build(grammars, answer=rule, tools={}))
        assert "\n" not in str(caught.value)


def test_a_tokenizer_without_tags_spells_them_out():
    definition = json.loads(train_tokenizer(CORPUS, 380).tokenizer_json)
    tags = {"<tool_call>", "</tool_call>"}
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] not in tags]
    for token in tags:
        definition["model"]["vocab"]["Ġ" + token] = definition["model"]["vocab"].pop(token)
    tokenizer = Tokenizer.from_files({"tokenizer.json": json.dumps(definition)})
    assert tokenizer.token_to_id("<tool_call>") is None
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    grammar = build(grammars, answer=None, tools={"f": None}, several=False)
    text, _ = drawn(grammars.constraint(grammar), tokenizer, 0)
    assert text == '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
