"""The terminal chat with a server: what is asked and shown, and what goes wrong; with a stand-in and our own API."""

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from api_server import Server as ApiServer
from example_tokenizers import TOKENIZER
from fake_engine import FakeEngine
from scripted_api import Reply, chunk, event, refused, spoken

from serve.chat import ChatConfig, answer, converse, main
from serve.chat_remote import parse_server, read_events, remote_speaker
from serve.conversation import Conversation, SpeakerError
from serve.terminal import Screen

ROOT = Path(__file__).parent.parent
NOTHING_SAID = Conversation()
DONE = b"data: [DONE]\n\n"
TOO_LONG = b'{"error": {"message": "too long", "code": "context_length_exceeded"}}'


class Recorder:
    """A screen that remembers what it was shown."""

    def __init__(self):
        self.replies, self.notices = [], []
        self.screen = Screen(self.replies.append, self.notices.append)


def speaker_at(url, key=None, model=None, thinking="auto", **settings):
    return remote_speaker(parse_server(url, key), model, ChatConfig(url=url, **settings).settings(), thinking)


def chat(scripted, *lines, conversation=NOTHING_SAID, **settings):
    """Say lines to the stand-in; what was shown, and the conversation at the end."""
    seen = Recorder()
    conversation = converse(speaker_at(scripted.url, **settings), conversation, lines, seen.screen)
    return seen, conversation


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def test_words_are_shown_as_they_come_and_the_next_request_holds_the_conversation(scripted):
    scripted.replies = [spoken("one", ", two"), spoken("three")]
    seen, _ = chat(scripted, "a", "b", conversation=Conversation("Be brief."))
    assert seen.replies == ["one", ", two", "\n", "three", "\n"]
    assert seen.notices == []
    turns = [turn("system", "Be brief."), turn("user", "a"), turn("assistant", "one, two"), turn("user", "b")]
    assert scripted.requests[1]["messages"] == turns


def test_settings_are_sent_and_those_that_say_nothing_are_left_out(scripted):
    scripted.replies = [spoken("x"), spoken("x")]
    chat(scripted, "a")
    chat(scripted, "a", model="poet", thinking="off", temperature=0.0, top_k=5, min_p=0.1, max_new_tokens=7)
    plain, full = scripted.requests
    assert set(plain) == {
        "model", "messages", "stream", "stream_options", "max_tokens", "temperature", "top_p", "seed"
    }  # fmt: skip
    assert plain["model"] == "base" and plain["stream"] is True and plain["max_tokens"] == 512
    sent = {"model": "poet", "temperature": 0.0, "top_k": 5, "min_p": 0.1, "max_tokens": 7}
    assert {name: full[name] for name in sent} == sent
    assert full["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_a_thought_stands_between_tags_and_is_sent_back_apart(scripted, name):
    pieces = chunk(**{name: "hm"}), chunk(**{name: ", well"}), chunk(content="yes"), chunk("stop"), DONE
    scripted.replies = [Reply(pieces), spoken("no")]
    seen, _ = chat(scripted, "a", "b")
    assert "".join(seen.replies) == "<think>\nhm, well\n</think>\n\nyes\nno\n"
    assert scripted.requests[1]["messages"][1] == turn("assistant", "yes", reasoning_content="hm, well")


def test_a_thought_that_the_token_limit_cuts_off_is_closed(scripted):
    scripted.replies = [Reply((chunk(reasoning_content="hm"), chunk("length"), DONE))]
    seen, _ = chat(scripted, "a")
    assert "".join(seen.replies) == "<think>\nhm\n</think>\n"
    assert "--max_new_tokens" in seen.notices[0]


def test_a_conversation_that_the_server_finds_too_long_loses_its_oldest_exchanges(scripted):
    scripted.replies = [spoken("1"), spoken("2"), *[Reply((TOO_LONG,), 0.0, 400)] * 2, spoken("3")]
    seen, conversation = chat(scripted, "a", "b", "c")
    assert [question["content"] for question, _ in conversation.exchanges] == ["c"]
    assert seen.notices == ["(the context is full: the 2 oldest questions and their answers are forgotten)"]
    assert [len(request["messages"]) for request in scripted.requests] == [1, 3, 5, 3, 1]


def test_a_question_too_long_by_itself_is_an_error(scripted):
    scripted.replies = [Reply((TOO_LONG,), 0.0, 400)]
    seen, conversation = chat(scripted, "a")
    assert conversation == Conversation() and seen.notices == [f"error: --url {scripted.url}: answers 400: too long"]


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (refused(429, "busy", Retry_After="7"), "answers 429: busy (ask again in 7 s)"),
        (refused(503, "still starting"), "answers 503: still starting (ask again later)"),
        (refused(401, "no key"), "answers 401: no key; give its key by --api_key_file"),
        (refused(404, "no such model"), "answers 404: no such model; check --url and --model"),
        (
            refused(302, "", Location="https://b.example"),
            "answers 302: found; give --url the address that it points to: https://b.",
        ),
        (Reply((b"<html>",), 0.0, 500), "answers 500: internal server error"),
        (Reply((b'{"detail": "a\\n\\u001b[2Jb"}',), 0.0, 422), "answers 422: a ␛[2Jb"),
        (Reply((b'{"error": "plain words"}',), 0.0, 400), "answers 400: plain words"),
        (Reply((chunk(content="x"), event({"error": {"message": "on fire"}}))), "gave the answer up: on fire"),
        (Reply((chunk(content="x"),)), "the server's answer broke off"),
        (Reply((b"data: {nonsense\n\n",)), "something else than OpenAI's events"),
    ],
)
def test_what_goes_wrong_is_one_line_and_the_chat_goes_on(scripted, reply, says):
    scripted.replies = [reply, spoken("yes")]
    seen, conversation = chat(scripted, "a", "b")
    assert says in seen.notices[0] and len(seen.notices) == 1 and "\n" not in seen.notices[0]
    assert [question["content"] for question, _ in conversation.exchanges] == ["b"]


def test_ctrl_c_keeps_what_was_said_and_closes_the_connection(scripted):
    held = threading.Event()
    scripted.replies = [Reply((chunk(content="one"), held, *[chunk(content="more")] * 1000), delay=0.001)]
    seen = Recorder()

    def write(text):
        seen.replies.append(text)
        if text == "one":
            raise KeyboardInterrupt

    conversation, reply = answer(speaker_at(scripted.url), Conversation(), "a", 0, Screen(write, seen.notices.append))
    held.set()
    assert scripted.hung_up.wait(10)
    assert reply.ended is None and seen.notices == ["(stopped)"]
    assert conversation.exchanges == ((turn("user", "a"), turn("assistant", "one")),)


def test_a_key_is_sent_from_a_file_or_the_environment(scripted, tmp_path, monkeypatch, capsys):
    scripted.api_key = "secret"
    file = tmp_path / "key"
    file.write_text("# mine\nsecret\n")
    with pytest.raises(SystemExit):
        main(["--url", scripted.url, "--prompt", "a"])
    assert "answers 401: give the right key; give its key by --api_key_file" in capsys.readouterr().err
    scripted.replies = [spoken("one"), spoken("two")]
    assert main(["--url", scripted.url, "--prompt", "a", "--api_key_file", str(file)]) == 0
    monkeypatch.setenv("MINILLM_API_KEY", "secret")
    assert main(["--url", scripted.url, "--prompt", "a", "--model", "poet"]) == 0
    assert [request["model"] for request in scripted.requests] == ["base", "poet"]
    assert capsys.readouterr().out == "one\ntwo\n"


def test_a_server_that_lists_no_models_needs_a_name(scripted):
    scripted.models = []
    with pytest.raises(SpeakerError, match="lists no models; name one with --model"):
        speaker_at(scripted.url)
    assert speaker_at(scripted.url, model="poet").model == "poet"


@pytest.mark.parametrize("address", ["{}", "{}/", "{}/v1", "{}/v1/"])
def test_an_address_may_end_in_v1(scripted, address):
    assert speaker_at(address.format(scripted.url.rstrip("/"))).model == "base"


def test_events_are_read_as_the_standard_says():
    raw = b": hello\r\ndata: a\r\n\r\nevent: x\ndata:b\ndata:  c\nid: 1\n\n\n\ndata\n\ndata: \xe8\xaf\x9d\n"
    assert list(read_events(io.BytesIO(raw))) == ["a", "b\n c", "", "话"]


def test_nobody_there_is_one_line_and_no_jax_is_loaded():
    program = "import sys, serve.chat as c\ntry: c.main(sys.argv[1:])\nfinally: print('jax' in sys.modules)"
    command = [sys.executable, "-c", program, "--url", "http://127.0.0.1:9", "--prompt", "a"]
    result = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60)
    expected = "error: --url http://127.0.0.1:9: cannot be reached: connection refused; is a server running there?\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "False\n", expected)


def test_our_own_server_is_understood():
    engine = FakeEngine(TOKENIZER, reply=lambda request: "<think>\nhm\n</think>\n\nyes", context=512)
    with ApiServer(engine) as server:
        speaker = speaker_at(server.url, top_k=5, repetition_penalty=1.5)
        assert (speaker.model, speaker.context) == ("tiny", 512)
        seen = Recorder()
        conversation, reply = answer(speaker, Conversation(), "a", 3, seen.screen)
    assert "".join(seen.replies) == "<think>\nhm\n</think>\n\nyes\n"
    assert conversation.exchanges[0][1] == turn("assistant", "yes", reasoning_content="hm")
    assert reply.ended.finish_reason == "stop" and reply.ended.tokens > 0
    (request,) = engine.requests
    assert (request.seed, request.max_new_tokens, request.top_k) == (3, 256, 5)
