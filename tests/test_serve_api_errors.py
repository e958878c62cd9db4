"""What the API refuses and how: each status, the field's name, and nothing that a client should not see."""

import json
import re
import time

import openai
import pytest
from api_server import Server, events, unchunked
from example_tokenizers import TOKENIZER
from fake_engine import FakeEngine

from serve.auth import KeyFileError, read_keys
from serve.config import Limits, ServeConfig

HELLO = [{"role": "user", "content": "hello"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LIMITS = Limits(
    max_body_bytes=20_000,
    body_timeout=0.3,
    max_messages=10,
    max_batch=3,
    max_choices=4,
    max_stop=2,
    max_logit_bias=2,
    max_tools=2,
    max_grammar_bytes=3000,
)
CONFIG = ServeConfig("runs/tiny", limits=LIMITS)


@pytest.fixture(scope="module")
def server():
    with Server(FakeEngine(TOKENIZER, lambda request: "fine"), CONFIG) as running:
        yield running


def answer(raw):
    """Status, headers and JSON of an answer."""
    head, _, body = raw.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return int(status.split()[1]), headers, json.loads(body)


def refused(server, method, path, body=b"", **options):
    """An error in OpenAI's shape, checked to be one."""
    status, headers, reply = answer(server.raw(method, path, body, **options))
    assert status >= 400 and set(reply) == {"error"} and set(reply["error"]) == {"message", "type", "param", "code"}
    text = json.dumps(reply)
    assert not re.search(r"pydantic|Traceback|\.py|errors\.|input_value|/secret", text), text
    assert headers["content-type"] == "application/json" and headers["x-content-type-options"] == "nosniff"
    return status, headers, reply["error"]


@pytest.mark.parametrize(
    ("path", "change", "param", "says"),
    [
        (CHAT, {"messages": None}, "messages", "must be a list"),
        (CHAT, {"messages": []}, "messages", "at least 1"),
        (CHAT, {"messages": "hello"}, "messages", "must be a list"),
        (CHAT, {"messages": ["hello"]}, "messages[0]", "must be an object"),
        (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role", "is missing"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'assistant' or 'tool'"),
        (CHAT, {"messages": [*HELLO, {"role": "user"}]}, "messages[1].content", "is missing"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "text parts"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "image_url",
        ),
        (
            CHAT,
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]},
            "messages[0].tool_calls[0].name",
            "",
        ),
        (CHAT, {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls", "only"),
        (CHAT, {"messages": HELLO * 11}, "messages", "up to 10"),
        (CHAT, {"temperature": "warm"}, "temperature", "must be a number"),
        (CHAT, {"temperature": True}, "temperature", "must be a number"),
        (CHAT, {"temperature": -0.1}, "temperature", "at least 0"),
        (CHAT, {"temperature": 1e300}, "temperature", "at most 2"),
        (CHAT, {"top_p": 0}, "top_p", "above 0"),
        (CHAT, {"top_k": 1.5}, "top_k", "must be an integer"),
        (CHAT, {"top_k": -2}, "top_k", "at least -1"),
        (CHAT, {"min_p": 1.1}, "min_p", "at most 1"),
        (CHAT, {"max_tokens": 0}, "max_tokens", "at least 1"),
        (CHAT, {"max_tokens": 10**20}, "max_tokens", ""),
        (CHAT, {"max_completion_tokens": "9"}, "max_completion_tokens", "must be an integer"),
        (CHAT, {"n": 0}, "n", "at least 1"),
        (CHAT, {"n": 5}, "n", "more than the 4"),
        (CHAT, {"seed": 2**63}, "seed", ""),
        (CHAT, {"stop": ["a", "b", "c"]}, "stop", "up to 2"),
        (CHAT, {"stop": ""}, "stop", "empty"),
        (CHAT, {"stop": [1]}, "stop", "string"),
        (CHAT, {"stream": "yes"}, "stream", "true or false"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        (CHAT, {"presence_penalty": 2.5}, "presence_penalty", "at most 2"),
        (CHAT, {"frequency_penalty": -2.5}, "frequency_penalty", "at least -2"),
        (CHAT, {"repetition_penalty": 0}, "repetition_penalty", "above 0"),
        (CHAT, {"logit_bias": {"x": 1}}, "logit_bias", "not a token id"),
        (CHAT, {"logit_bias": {"-1": 1}}, "logit_bias", "not a token id"),
        (CHAT, {"logit_bias": {"5": 101}}, "logit_bias", "between -100 and 100"),
        (CHAT, {"logit_bias": {"99999": 1}}, "logit_bias", "outside the vocabulary"),
        (CHAT, {"logit_bias": {"5": 1, "6": 1, "7": 1}}, "logit_bias", "more than 2"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
        (CHAT, {"tools": [{"type": "function"}]}, "tools[0].function", "is missing"),
        (CHAT, {"tools": [{"type": "browser", "function": {"name": "f"}}]}, "tools[0].type", "'function'"),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "match"),
        (CHAT, {"tool_choice": "required"}, "tool_choice", "no tools"),
        (CHAT, {"tool_choice": "sometimes"}, "tool_choice", "auto"),
        (CHAT, {"response_format": {"type": "xml"}}, "response_format.type", "'json_object'"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
        (CHAT, {"response_format": {"type": "regex", "regex": "[0-9"}}, "response_format", "regex"),
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}},
            "response_format",
            "strin",
        ),
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 4000]}}}},
            "response_format",
            "too large",
        ),
        (CHAT, {"functions": [{"name": "f"}]}, "functions", "as tools"),
        (CHAT, {"truncation": "letters"}, "truncation", "'turns'"),
        (CHAT, {"user": 5}, "user", "must be a string"),
        (TEXT, {"prompt": None}, "prompt", "must be a string, a list"),
        (TEXT, {"prompt": []}, "prompt", "empty"),
        (TEXT, {"prompt": [[]]}, "prompt", "must be"),
        (TEXT, {"prompt": [1, "x"]}, "prompt", "must be"),
        (TEXT, {"prompt": [1, True]}, "prompt", "must be"),
        (TEXT, {"prompt": [-1]}, "prompt", "outside the vocabulary"),
        (TEXT, {"prompt": [10**9]}, "prompt", "outside the vocabulary"),
        (TEXT, {"prompt": ["a"] * 4}, "prompt", "up to 3"),
        (TEXT, {"suffix": "end"}, "suffix", "fill gaps"),
        (TEXT, {"best_of": 3}, "best_of", "leave best_of out"),
        (TEXT, {"logprobs": 21}, "logprobs", "at most 20"),
        (TEXT, {"logprobs": True}, "logprobs", "must be an integer"),
        ("/v1/embeddings", {"input": []}, "input", "empty"),
        ("/v1/embeddings", {"input": "x", "dimensions": 3}, "dimensions", "one size"),
        ("/v1/embeddings", {"input": "x", "encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ("/v1/embeddings", {"input": "x", "model": "pirate"}, "model", "base model"),
        ("/tokenize", {}, "prompt", "either"),
        ("/detokenize", {"tokens": [10**8]}, "tokens", "outside"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]", "must be an integer"),
    ],
)
def test_a_wrong_field_is_named_with_its_rule(server, path, change, param, says):
    whole = {CHAT: {"messages": HELLO}, TEXT: {"prompt": "hello"}}.get(path, {})
    status, _, error = refused(server, "POST", path, whole | change)
    assert (status, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert says in error["message"] and error["message"].startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "JSON object"),
        (b"{", "not JSON"),
        (b"[1]", "JSON object"),
        (b'"x"', "JSON object"),
        (b"null", "JSON object"),
        (b'{"messages": NaN}', "NaN"),
        (b'{"temperature": Infinity}', "Infinity"),
        (b'{"temperature": 1e999}', "too large"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "number"),
        (b'{"messages": "\xff"}', "UTF-8"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        (b'{"model": "\\udfff", "messages": []}', "surrogate"),
        (b'{"messages": ' + b"[" * 70 + b"]" * 70 + b"}", "nested"),
        (b'{"messages": ' + b"[" * 9000 + b"]" * 9000 + b"}", "nested"),
        (b'{"a": ' * 1500 + b"1" + b"}" * 1500, "nested"),
    ],
)
def test_a_broken_body_is_told_so(server, body, says):
    status, _, error = refused(server, "POST", CHAT, body)
    assert status == 400 and says in error["message"]


def test_a_surrogate_pair_is_a_character_and_unknown_fields_are_ignored(server):
    body = b'{"messages": [{"role": "user", "content": "\\ud83d\\ude00", "mood": 1}], "future": {"x": []}}'
    status, _, reply = answer(server.raw("POST", CHAT, body))
    assert status == 200 and reply["choices"][0]["message"]["content"] == "fine"
    assert "😀" in TOKENIZER.decode(server.engine.requests[-1].token_ids)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", CHAT, 405), ("POST", "/v1/models", 405), ("GET", "/v1/models/gpt", 404)],
)
def test_an_unknown_address_and_a_wrong_method_are_told_apart(server, method, path, status):
    got, headers, _ = refused(server, method, path)
    assert got == status and (status != 405 or headers["allow"])


def test_an_unknown_model_is_not_found(server):
    status, _, error = refused(server, "POST", CHAT, {"model": "gpt-5", "messages": HELLO})
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")


def test_another_content_type_is_refused_so_that_no_web_form_can_post(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        status, _, error = refused(server, "POST", CHAT, {"messages": HELLO}, headers=[f"Content-Type: {kind}"])
        assert status == 400 and "application/json" in error["message"]


def test_a_large_body_is_refused_before_it_is_read(server):
    status, _, error = refused(server, "POST", CHAT, {"messages": [{"role": "user", "content": "x" * 21_000}]})
    assert (status, error["code"]) == (413, "body_too_large")
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with server.connection() as connection:
        connection.sendall(head.encode())
        for _ in range(6):
            connection.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")
        assert b" 413 " in connection.recv(65536)


def test_a_body_that_does_not_arrive_times_out(server):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n"
    with server.connection() as connection:
        connection.sendall(head.encode())
        assert b" 408 " in connection.recv(65536)


def test_context_overflow_is_refused_with_its_code(server):
    long = [{"role": "user", "content": "it was " * 600}]
    for path, body in (
        (CHAT, {"messages": long}),
        (CHAT, {"messages": HELLO, "max_tokens": 500}),
        (TEXT, {"prompt": "it was " * 600}),
        (TEXT, {"prompt": "x", "max_tokens": 600}),
        ("/v1/embeddings", {"input": ["x", "it was " * 600]}),
    ):
        status, _, error = refused(server, "POST", path, body)
        assert (status, error["code"]) == (400, "context_length_exceeded") and "512" in error["message"]


def test_truncation_drops_whole_oldest_exchanges_and_keeps_the_system_prompt(server):
    past = [
        {"role": role, "content": f"{role} {number} " + "again " * 5}
        for number in range(3)
        for role in ("user", "assistant")
    ]
    messages = [{"role": "system", "content": "stay"}, *past, {"role": "user", "content": "now"}]
    whole = {"messages": messages, "max_tokens": 300}
    assert refused(server, "POST", CHAT, whole)[0] == 400
    assert answer(server.raw("POST", CHAT, whole | {"truncation": "turns"}))[0] == 200
    prompt = TOKENIZER.decode(server.engine.requests[-1].token_ids)
    assert prompt.startswith("<|im_start|>system\nstay<|im_end|>\n<|im_start|>user\nuser 2 again")
    assert "user 1" not in prompt and "assistant 2" in prompt and "user\nnow<|im_end|>" in prompt
    hopeless = {"messages": [{"role": "user", "content": "it was " * 600}], "truncation": "turns"}
    assert refused(server, "POST", CHAT, hopeless)[2]["code"] == "context_length_exceeded"


def test_a_full_queue_says_when_to_come_back():
    with Server(FakeEngine(TOKENIZER, queue=0)) as server:
        status, headers, error = refused(server, "POST", CHAT, {"messages": HELLO})
        assert (status, headers["retry-after"], error["type"]) == (429, "8", "rate_limit_error")
        status, headers, _ = refused(server, "POST", TEXT, {"prompt": ["a", "b"], "stream": True})
        assert status == 429 and server.engine.requests == []


def test_nothing_is_served_before_ready_nor_while_stopping():
    engine = FakeEngine(TOKENIZER, lambda request: "fine")
    with Server(engine) as server:
        engine.ready = False
        for _ in ("starting", "stopping"):
            for method, path, body in (("GET", "/ready", b""), ("POST", CHAT, {"messages": HELLO})):
                status, headers, _ = refused(server, method, path, body)
                assert status == 503 and int(headers["retry-after"]) > 0
            engine.ready, server.service.draining = True, True
        assert answer(server.raw("GET", "/health"))[0] == 200
        server.service.draining = False
        assert answer(server.raw("GET", "/ready"))[0] == answer(server.raw("POST", CHAT, {"messages": HELLO}))[0] == 200


def test_a_failure_of_the_engine_is_an_error_without_its_reasons():
    with Server(FakeEngine(TOKENIZER, fail_after=6)) as server:
        status, _, error = refused(server, "POST", CHAT, {"messages": HELLO})
        assert (status, error["code"], error["type"]) == (500, "engine_failed", "server_error")
        for path, body in ((CHAT, {"messages": HELLO}), (TEXT, {"prompt": "x"})):
            _, stream = unchunked(server.raw("POST", path, body | {"stream": True}))
            *chunks, last = events(stream)
            assert len(chunks) > 1 and last["error"]["code"] == "engine_failed"
            assert b"/secret" not in stream and b"[DONE]" not in stream
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="could not go on"):
            list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))


def test_a_defect_of_the_server_shows_no_trace(server, monkeypatch):
    monkeypatch.setattr(server.engine, "submit", lambda request, sink: 1 / 0)
    status, headers, error = refused(server, "POST", CHAT, {"messages": HELLO})
    assert status == 500 and headers["x-request-id"] in error["message"] and "division" not in error["message"]


def test_a_request_past_its_deadline_is_given_up():
    config = ServeConfig("runs/tiny", limits=Limits(request_timeout=0.2))
    with Server(FakeEngine(TOKENIZER, delay=0.02), config) as server:
        begun = time.monotonic()
        status, _, error = refused(server, "POST", CHAT, {"messages": HELLO, "ignore_eos": True})
        assert (status, error["code"]) == (504, "timeout") and time.monotonic() - begun < 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_client_that_leaves_frees_the_engine_at_once(path, stream):
    with Server(FakeEngine(TOKENIZER, delay=0.05, chunk=1, slots=2)) as server:
        body = {"messages": HELLO} if path == CHAT else {"prompt": "x"}
        body |= {"ignore_eos": True, "max_tokens": 400, "n": 3, "stream": stream}
        with server.raw("POST", path, body, read=False) as connection:
            while server.engine.stats().slots_used < 2:
                time.sleep(0.01)
            if stream:
                assert b"200 OK" in connection.recv(100)
        assert server.engine.idle(1.0)
        assert sorted(server.engine.cancelled) == [1, 2, 3]


# --- Keys and headers ---------------------------------------------------------------------------------------------


def test_keys_open_everything_and_their_absence_only_the_page_and_health():
    with Server(FakeEngine(TOKENIZER, lambda request: "fine"), keys=["first-key", "second-key"]) as server:
        for authorization in ([], ["Authorization: Bearer wrong"], ["Authorization: first-key"], ["Authorization: ü"]):
            for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/nowhere")):
                status, headers, error = refused(server, method, path, headers=authorization)
                assert (status, headers["www-authenticate"]) == (401, "Bearer")
                assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        for key in ("first-key", "second-key"):
            assert answer(server.raw("GET", "/v1/models", headers=[f"Authorization: Bearer {key}"]))[0] == 200
        assert [answer(server.raw("GET", path))[0] for path in ("/health", "/ready", "/openapi.json")] == [200] * 3
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="needs an API key"):
            client.models.list()


def test_keys_come_from_the_file_and_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# people\nalice\n\n bob \n")
    keys = read_keys(str(file), {"MINILLM_API_KEYS": "carol, dave"})
    assert [keys.accept(f"Bearer {name}") for name in ("alice", "bob", "carol", "dave", "eve", "")] == [True] * 4 + [
        False
    ] * 2
    assert not keys.accept(None) and not keys.accept("Basic alice")
    assert not read_keys(None, {}) and not read_keys(None, {"MINILLM_API_KEYS": " , "})


@pytest.mark.parametrize("content", [None, "# nobody\n", "two words\n", "schlüssel\n", b"\xff\xfe"])
def test_a_bad_key_file_is_an_error_of_one_line(tmp_path, content):
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(KeyFileError) as caught:
        read_keys(str(file), {})
    assert "\n" not in str(caught.value) and "words" not in str(caught.value)


def test_every_answer_has_the_security_headers(server):
    for path in ("/health", "/nowhere", "/"):
        head = server.raw("GET", path).partition(b"\r\n\r\n")[0].decode().lower()
        assert "content-security-policy: default-src 'self'" in head and "unsafe-inline" not in head
        assert all(f"{name}: " in head for name in ("x-frame-options", "referrer-policy", "x-request-id"))
        assert "access-control-allow-origin" not in head


def test_other_origins_are_let_in_only_by_name():
    config = ServeConfig("runs/tiny", cors_origins=("https://good.example",))
    with Server(FakeEngine(TOKENIZER), config, keys=["k"]) as server:
        preflight = ["Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization"]
        for origin, allowed in (("https://good.example", True), ("https://bad.example", False)):
            for method, more in (("OPTIONS", preflight), ("POST", [])):
                head = server.raw(method, CHAT, headers=[f"Origin: {origin}", *more]).partition(b"\r\n\r\n")[0].lower()
                assert (b"access-control-allow-origin: https://good.example" in head) == allowed


def test_the_log_has_a_line_a_request_and_no_prompt(server, caplog):
    with caplog.at_level("INFO", logger="serve.access"):
        body = {"messages": [{"role": "user", "content": "a secret wish"}], "user": "u-1", "max_tokens": 2}
        server.raw("POST", CHAT, body)
        server.raw("GET", "/health")
        refused(server, "POST", CHAT, {"messages": []})
    first, second = (json.loads(record.message) for record in caplog.records)
    assert (
        first.items() >= {"status": 200, "path": CHAT, "model": "tiny", "user": "u-1", "completion_tokens": 2}.items()
    )
    assert second["status"] == 400 and "secret" not in caplog.text
