"""The small endpoints: models, embeddings, tokens, metrics, the page; and many streams at once."""

import asyncio
import base64
import time

import httpx
import numpy as np
import openai
import pytest
from api_server import Server
from example_tokenizers import TOKENIZER
from fake_engine import FakeEngine
from prometheus_client.parser import text_string_to_metric_families

from minillm_jax.chat import render
from serve import api
from serve.config import Limits, ServeConfig

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server():
    with Server(FakeEngine(TOKENIZER, lambda request: "it was the best of times")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(server, path, **body):
    response = httpx.post(server.url + path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_the_base_and_its_adapters_are_listed_and_shown(client):
    models = client.models.list().data
    assert [(model.id, model.parent) for model in models] == [("tiny", None), ("pirate", "tiny")]
    assert all(client.models.retrieve(model.id) == model for model in models) and models[0].max_model_len == 512
    assert client.chat.completions.create(model="pirate", messages=HELLO).model == "pirate"
    with pytest.raises(openai.NotFoundError, match="GET /v1/models"):
        client.models.retrieve("a/b")


def test_embeddings_are_the_same_as_numbers_and_in_base64(server, client):
    ids = TOKENIZER.encode("it was")
    for given, prompts in (
        ("it was", [[TOKENIZER.bos_token_id, *ids]]),
        (["it was", "we"], [[TOKENIZER.bos_token_id, *ids], [TOKENIZER.bos_token_id, *TOKENIZER.encode("we")]]),
        (ids, [ids]),
        ([ids, ids[:1]], [ids, ids[:1]]),
    ):
        expected = server.engine.embed(prompts)
        for options in ({}, {"encoding_format": "float"}):  # the client asks for base64 by itself, and decodes it
            reply = client.embeddings.create(model="tiny", input=given, **options)
            assert np.array_equal(np.array([row.embedding for row in reply.data], np.float32), expected)
            assert [row.index for row in reply.data] == list(range(len(prompts)))
            assert reply.usage.prompt_tokens == reply.usage.total_tokens == sum(map(len, prompts))
    packed = post(server, "/v1/embeddings", input="we", encoding_format="base64")["data"][0]["embedding"]
    vector = np.frombuffer(base64.b64decode(packed), "<f4")
    assert vector.tolist() == post(server, "/v1/embeddings", input="we")["data"][0]["embedding"]


def test_tokens_are_those_that_the_model_would_read(server):
    ids = TOKENIZER.encode("it was <|im_end|> 势")
    reply = post(server, "/tokenize", prompt="it was <|im_end|> 势")
    assert reply == {"tokens": [TOKENIZER.bos_token_id, *ids], "count": len(ids) + 1, "max_model_len": 512}
    assert post(server, "/tokenize", prompt="it was <|im_end|> 势", add_special_tokens=False)["tokens"] == ids
    assert post(server, "/detokenize", tokens=ids) == {"prompt": "it was <|im_end|> 势"}
    assert post(server, "/detokenize", tokens=[]) == {"prompt": ""}
    chat = post(server, "/tokenize", messages=HELLO, chat_template_kwargs={"enable_thinking": True})
    expected = render(TOKENIZER, HELLO, add_generation_prompt=True, enable_thinking=True).token_ids
    assert chat["tokens"] == expected


def samples(server):
    """Values by name and labels, of all metrics."""
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_count_what_happened():
    with Server(FakeEngine(TOKENIZER, lambda request: "it was the best", chunk=1)) as server:
        post(server, "/v1/completions", prompt="x", n=2)
        for path in ("/v1/completions", "/nowhere", "/v1/models/a", "/v1/models/b"):
            httpx.post(server.url + path, json={}) if "models" not in path else httpx.get(server.url + path)
        values = samples(server)
        drawn = 2 * (len(TOKENIZER.encode("it was the best")) + 1)
        assert values["minillm_engine_generated_tokens_total", ()] == drawn
        assert values["minillm_engine_requests_total", ()] == 2 and values["minillm_engine_slots", ()] == 8
        assert values["minillm_time_to_first_token_seconds_count", ()] == 2
        assert values["minillm_time_between_chunks_seconds_count", ()] == drawn - 2
        requests = {
            (labels["endpoint"], labels["status"]): value
            for (name, pairs), value in values.items()
            if name == "minillm_http_requests_total" and (labels := dict(pairs))
        }
        expected = {("/v1/completions", "200"): 1, ("/v1/completions", "400"): 1, ("other", "404"): 1}
        assert requests == expected | {("/v1/models/{model:path}", "404"): 2}


def test_the_page_and_its_files_are_served_and_nothing_beside_them(tmp_path, monkeypatch):
    folder = tmp_path / "web"
    folder.mkdir()
    (folder / "index.html").write_text("<!doctype html><title>chat</title>")
    (folder / "main.js").write_text("export {};")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    monkeypatch.setattr(api, "WEB", folder)
    with Server(FakeEngine(TOKENIZER), keys=["k"]) as server:
        page, script = httpx.get(f"{server.url}/"), httpx.get(f"{server.url}/web/main.js")
        assert page.text.startswith("<!doctype html>") and "text/html" in page.headers["content-type"]
        assert script.text == "export {};" and "javascript" in script.headers["content-type"]
        policy = page.headers["content-security-policy"]
        assert policy.startswith("default-src 'self'") and "unsafe" not in policy
        for path in ("/web/../secret.txt", "/web/%2e%2e/secret.txt", "/web/..%2fsecret.txt", "/web//etc/passwd"):
            raw = server.raw("GET", path)
            assert b"secret" not in raw.partition(b"\r\n\r\n")[2] and b" 40" in raw[:15]
        assert server.raw("GET", "/web/link.txt").startswith(b"HTTP/1.1 404")


def test_a_setting_that_cannot_work_is_told_by_its_flag():
    for flag, options in (
        ("--port", {"port": 70000}),
        ("--drain_timeout", {"drain_timeout": -1.0}),
        ("--cors_origins", {"cors_origins": ("example.org",)}),
        ("--max_choices", {"limits": Limits(max_choices=0)}),
        ("--body_timeout", {"limits": Limits(body_timeout=0.0)}),
    ):
        with pytest.raises(ValueError, match=flag):
            ServeConfig("m", **options).check()
    ServeConfig("m", limits=Limits(max_prompt_tokens=0, request_timeout=0.5)).check()
    for entry in ("pirate", "=x", "m=runs/x", "a=b"):
        with pytest.raises(ValueError, match="--adapters"):
            ServeConfig("runs/m", adapters=("a=c", entry)).adapter_folders()
    assert ServeConfig("runs/m", adapters=("a=b",)).adapter_folders() == {"a": "b"}


async def _stream(client, url, number):
    """Seconds until the first text, and the longest pause between two events."""
    begun, last, pauses, first = time.monotonic(), None, [], None
    body = {"prompt": f"text {number}", "stream": True, "max_tokens": 96, "ignore_eos": True}
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                now = time.monotonic()
                first = first or now - begun
                pauses.append(now - (last or now))
                last = now
    return first, max(pauses), len(pauses)


def test_sixty_four_streams_go_on_side_by_side():
    async def run(url):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:
            return await asyncio.gather(*(_stream(client, url, number) for number in range(64)))

    with Server(FakeEngine(TOKENIZER, chunk=8, delay=0.02, slots=64)) as server:
        begun = time.monotonic()
        results = asyncio.run(run(server.url))
        seconds = time.monotonic() - begun
    assert all(events == 13 for _, _, events in results)  # twelve chunks of eight tokens, and the end
    assert max(pause for _, pause, _ in results) < max(1.0, 0.7 * seconds)
