"""Chat and completions through OpenAI's own client: whole, streamed and asynchronous, against a scripted engine."""

import asyncio
import json

import openai
import pytest
from api_server import Server, events, unchunked
from example_tokenizers import TOKENIZER
from fake_engine import FakeEngine
from pydantic import TypeAdapter

from minillm_jax.tokenizer_files import byte_alphabet
from serve.replies import ChatChunk

REPLY = "话说天下大势，it was the best of times."
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server():
    with Server(FakeEngine(TOKENIZER, lambda request: REPLY, chunk=3)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def last_request(server):
    return server.engine.requests[-1]


def test_a_chat_completion_has_the_reply_and_counts_its_tokens(server, client):
    completion = client.chat.completions.create(model="tiny", messages=HELLO)
    (choice,) = completion.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", REPLY, "stop")
    usage, prompt = completion.usage, last_request(server).token_ids
    assert TOKENIZER.decode(prompt).endswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    assert usage.prompt_tokens == len(prompt)
    assert usage.completion_tokens == len(TOKENIZER.encode(REPLY)) + 1
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 1
    assert completion.model == "tiny" and completion.id.startswith("chatcmpl-")


def test_a_stream_adds_up_to_the_whole_reply(client):
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(deltas) == REPLY and len([delta for delta in deltas if delta]) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(TOKENIZER.encode(REPLY)) + 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_asynchronous_client_streams_many_at_once(server):
    async def one(client, text):
        stream = await client.completions.create(model="tiny", prompt=text, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def run():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, f"text {i}") for i in range(20)))

    assert asyncio.run(run()) == [REPLY] * 20


@pytest.mark.parametrize(
    ("field", "value", "engine_field", "expected"),
    [
        ("temperature", 0, "temperature", 0.0),
        ("temperature", 1.5, "temperature", 1.5),
        ("top_p", 0.25, "top_p", 0.25),
        ("top_k", 7, "top_k", 7),
        ("top_k", -1, "top_k", 0),
        ("min_p", 0.1, "min_p", 0.1),
        ("presence_penalty", -0.5, "presence_penalty", -0.5),
        ("frequency_penalty", 0.75, "frequency_penalty", 0.75),
        ("repetition_penalty", 1.25, "repetition_penalty", 1.25),
        ("logit_bias", {"17": -100, "20": 0}, "logit_bias", {17: -100.0}),
        ("seed", 1234, "seed", 1234),
        ("max_tokens", 9, "max_new_tokens", 9),
        ("model", "pirate", "adapter", "pirate"),
        ("ignore_eos", True, "ignore_eos", True),
    ],
)
def test_a_field_reaches_the_engine_from_both_endpoints(server, client, field, value, engine_field, expected):
    for path, body in (("/chat/completions", {"messages": HELLO}), ("/completions", {"prompt": "hello"})):
        client.post(path, body={"max_tokens": 12, **body, field: value}, cast_to=object)
        assert getattr(last_request(server), engine_field) == expected


def test_null_is_the_default_of_every_optional_field(server, client):
    names = "temperature top_p top_k min_p max_tokens max_completion_tokens stop seed n logprobs top_logprobs tools "
    names += "presence_penalty frequency_penalty repetition_penalty logit_bias stream stream_options tool_choice user "
    names += "response_format chat_template_kwargs truncation parallel_tool_calls model ignore_eos"
    body = {"messages": HELLO} | dict.fromkeys(names.split())
    client.post("/chat/completions", body=body, cast_to=object)
    request = last_request(server)
    assert (request.temperature, request.top_p, request.top_k, request.logprobs) == (1.0, 1.0, 0, None)
    assert request.max_new_tokens == 512 - len(request.token_ids)


def test_max_completion_tokens_wins_and_cuts_the_reply(client):
    completion = client.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=5, max_tokens=3)
    (choice,) = completion.choices
    assert choice.finish_reason == "length" and completion.usage.completion_tokens == 5
    assert choice.message.content == TOKENIZER.decode(TOKENIZER.encode(REPLY)[:5])


@pytest.mark.parametrize("stop", ["best", ["of", "，it was"], ["nowhere", "势"]])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it_and_frees_the_slot(server, client, stop, stream):
    expected = min((REPLY.partition(s)[0] for s in ([stop] if isinstance(stop, str) else stop)), key=len)
    for create, body in (
        (client.completions.create, {"prompt": "x"}),
        (client.chat.completions.create, {"messages": HELLO}),
    ):
        answer = create(model="tiny", stop=stop, stream=stream, **body)
        chunks = list(answer) if stream else [answer]
        choices = [chunk.choices[0] for chunk in chunks]
        texts = [
            c.text if hasattr(c, "text") else (c.delta.content if stream else c.message.content) or "" for c in choices
        ]
        assert "".join(texts) == expected and choices[-1].finish_reason == "stop"
    assert server.engine.idle()


def test_completions_of_one_seed_differ_from_one_another_and_repeat_exactly():
    with (
        Server(FakeEngine(TOKENIZER)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client,
    ):

        def texts(**options):
            return [
                choice.text
                for choice in client.completions.create(model="tiny", prompt="x", max_tokens=12, **options).choices
            ]

        first = texts(n=3, seed=5)
        assert len(set(first)) == 3 and texts(n=3, seed=5) == first
        assert texts(seed=5) == first[:1]
        assert texts(seed=-1) != texts(seed=2**62)
        assert texts() != texts()


def test_prompts_of_all_four_forms_are_completed_in_order(server, client):
    ids = TOKENIZER.encode("it was")
    for prompt, expected in (
        ("it was", [[TOKENIZER.bos_token_id, *ids]]),
        (["it was", "we"], [[TOKENIZER.bos_token_id, *ids], [TOKENIZER.bos_token_id, *TOKENIZER.encode("we")]]),
        (ids, [ids]),
        ([ids, ids[:1]], [ids, ids[:1]]),
    ):
        before = len(server.engine.requests)
        completion = client.completions.create(model="tiny", prompt=prompt, n=2)
        sent = [list(request.token_ids) for request in server.engine.requests[before:]]
        assert sent == [prompt for prompt in expected for _ in range(2)]
        assert [choice.index for choice in completion.choices] == list(range(2 * len(expected)))
        assert completion.usage.prompt_tokens == sum(map(len, expected))


def test_an_echo_comes_first_and_its_tokens_are_scored(client):
    ids = TOKENIZER.encode("曹操 we")
    for stream in (False, True):
        answer = client.completions.create(model="tiny", prompt=ids, echo=True, logprobs=2, max_tokens=4, stream=stream)
        choices = [chunk.choices[0] for chunk in (answer if stream else [answer])]
        text = "".join(choice.text for choice in choices)
        assert text == TOKENIZER.decode(ids + TOKENIZER.encode(REPLY)[:4])
        lists = [choice.logprobs for choice in choices if choice.logprobs]
        tokens, scores, tops, offsets = (
            [item for entry in lists for item in getattr(entry, name)]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        )
        assert len(tokens) == len(scores) == len(tops) == len(offsets) == len(ids) + 4
        assert scores[0] is None and tops[0] is None and set(scores[1:]) == {-0.5}
        assert all(len(top) == 2 and max(top.values()) == -0.5 for top in tops[1:])
        data = [TOKENIZER.token_bytes(token) for token in ids + TOKENIZER.encode(REPLY)[:4]]
        assert offsets == [len(b"".join(data[:i]).decode("utf-8", "ignore")) for i in range(len(tokens))]
        assert tokens[-2:] == [token.decode() for token in data[-2:]]


def test_an_echo_without_logprobs_only_needs_the_text(client):
    assert client.completions.create(model="tiny", prompt="hello ", echo=True).choices[0].text == "hello " + REPLY
    scored = client.completions.create(model="tiny", prompt="we", echo=True, logprobs=1, max_tokens=0)
    assert scored.choices[0].text == "we" and scored.usage.completion_tokens == 0
    assert scored.choices[0].logprobs.token_logprobs[1:] == [-0.5] * (len(TOKENIZER.encode("we")))


def test_chat_logprobs_cover_every_token_but_the_end(client):
    for stream in (False, True):
        answer = client.chat.completions.create(
            model="tiny", messages=HELLO, logprobs=True, top_logprobs=3, stream=stream
        )
        choices = [chunk.choices[0] for chunk in (answer if stream else [answer])]
        entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
        assert b"".join(bytes(entry.bytes) for entry in entries).decode() == REPLY
        assert all(len(entry.top_logprobs) == 3 and entry.logprob == -0.5 for entry in entries)


def test_the_wire_format_of_a_stream_is_exact(server):
    body = {"messages": HELLO, "stream": True, "max_tokens": 2, "stream_options": {"include_usage": True}}
    head, raw = unchunked(server.raw("POST", "/v1/chat/completions", body))
    assert b"content-type: text/event-stream; charset=utf-8" in head and b"cache-control: no-cache" in head
    assert raw.endswith(b"data: [DONE]\n\n")
    *chunks, done = events(raw)
    assert done == b"[DONE]"
    for chunk in chunks:
        TypeAdapter(ChatChunk).validate_python(chunk)
    shared = {
        "object": "chat.completion.chunk",
        "model": "tiny",
        "id": chunks[0]["id"],
        "created": chunks[0]["created"],
    }
    assert all(chunk.items() >= shared.items() for chunk in chunks)
    content = TOKENIZER.decode(TOKENIZER.encode(REPLY)[:2])
    plain = {"index": 0, "logprobs": None, "finish_reason": None}
    assert [chunk["choices"] for chunk in chunks] == [
        [plain | {"delta": {"role": "assistant", "content": ""}}],
        [plain | {"delta": {"content": content}}],
        [plain | {"delta": {}, "finish_reason": "length"}],
        [],
    ]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 3 and chunks[-1]["usage"]["completion_tokens"] == 2


def test_characters_never_break_when_every_token_is_one_byte():
    spelling = {byte: char for char, byte in byte_alphabet().items()}
    script = [TOKENIZER.token_to_id(spelling[byte]) for byte in "势😀é".encode()] + [TOKENIZER.eos_token_id]
    with Server(FakeEngine(TOKENIZER, lambda request: script, chunk=1)) as server:
        for path, body in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", {"messages": HELLO})):
            _, raw = unchunked(server.raw("POST", path, body | {"stream": True}))
            choices = [chunk["choices"][0] for chunk in events(raw)[:-1]]
            pieces = [choice.get("text") or choice.get("delta", {}).get("content") for choice in choices]
            assert [piece for piece in pieces if piece] == ["势", "😀", "é"]
        cut = json.loads(
            server.raw("POST", "/v1/completions", {"prompt": "x", "max_tokens": 2}).partition(b"\r\n\r\n")[2]
        )
        assert cut["choices"][0]["text"] == "�"
