"""The terminal chat: commands, history, one-shot, pipes, interruption, overflow; with a tiny or a scripted model.

Scripted models stand in the engine's place, so that rendering, decoding and cancelling are the real ones.
"""

import dataclasses
import io
import signal
import sys
import threading
import time

import jax
import pytest
from engines import drawn, started

from minillm_jax.chat import ChatError, render
from minillm_jax.config import ConfigError, ModelConfig
from minillm_jax.lm import LanguageModel, generate
from minillm_jax.model import init_params
from minillm_jax.sampling import SamplingParams
from minillm_jax.tokenizer import Tokenizer, train_tokenizer
from serve import chat as serve_chat
from serve import chat_local
from serve.chat import COMMANDS, ChatConfig, answer, converse, main, parse_line, run
from serve.chat_local import LocalSpeaker, fit, local_speaker, thinking_switch
from serve.conversation import Conversation, answer_turn
from serve.engine import EngineConfig
from serve.protocol import Finished, PromptRead, Request, Tokens
from serve.terminal import Screen, printable

TOKENIZER = train_tokenizer(["You are a helpful assistant. user assistant system hello there"], vocab_size=300)
CONFIG = ModelConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=16,
    max_position_embeddings=128,
)
SAMPLING = SamplingParams(max_new_tokens=16, temperature=0.0)


def turn(role, content):
    return {"role": role, "content": content}


class Recorder:
    """A screen that remembers what it was shown."""

    def __init__(self):
        self.replies, self.notices = [], []
        self.screen = Screen(self.replies.append, self.notices.append)


class Parrot:
    """An engine that draws one scripted text after another, in two chunks, and remembers what it was asked.

    In a text, `^C` is where Ctrl-C is pressed.
    """

    vocab_size, adapters, ready = TOKENIZER.vocab_size, (), True

    def __init__(self, *texts, finish_reason="stop", context=128):
        self.texts, self.finish_reason, self.context = list(texts), finish_reason, context
        self.prompts, self.seeds, self.cancelled = [], [], []

    def submit(self, request, sink):
        self.prompts.append(TOKENIZER.decode(request.token_ids))
        self.seeds.append(request.seed)
        text, interrupted, _ = self.texts.pop(0).partition("^C")
        tokens = TOKENIZER.encode(text)
        sink(PromptRead())
        if tokens:
            sink(Tokens(tuple(tokens[:1])))
        if not interrupted:
            sink(Tokens((*tokens[1:], TOKENIZER.eos_token_id)))
            sink(Finished(self.finish_reason, "out of memory" if self.finish_reason == "error" else ""))
        elif tokens[1:]:
            sink(Tokens(tuple(tokens[1:])))
        if interrupted:
            threading.Timer(0.1, press_ctrl_c).start()
        return len(self.prompts)

    def cancel(self, number):
        self.cancelled.append(number)


def press_ctrl_c():
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # as the kernel does: it wakes who waits


def chat_with(engine, thinking=None):
    settings = Request((), max_new_tokens=16, temperature=0.0)
    return LocalSpeaker(engine, TOKENIZER, settings, thinking, "out/model", lambda text: None)


def contents(conversation):
    return [tuple(turn["content"] for turn in exchange) for exchange in conversation.exchanges]


@pytest.mark.parametrize(
    ("line", "parsed"),
    [
        ("hello there\n", ("say", "hello there")),
        ("\n", ("say", "")),
        ("/reset\n", ("/reset", "")),
        ("/system  Be brief. Very. \n", ("/system", "Be brief. Very.")),
        ("/system", ("/system", "")),
        ("/exit", ("/exit", "")),
        ("/rest", ("unknown", "/rest")),
        (" /etc/passwd holds what?", ("say", "/etc/passwd holds what?")),
    ],
)
def test_lines_are_commands_or_things_to_say(line, parsed):
    assert parse_line(line) == parsed


def test_each_prompt_holds_the_whole_conversation():
    parrot, seen = Parrot("one", "two"), Recorder()
    conversation = converse(chat_with(parrot), Conversation("Be brief."), ["a\n", "\n", "b\n"], seen.screen)
    turns = [turn("system", "Be brief."), turn("user", "a"), turn("assistant", "one"), turn("user", "b")]
    assert parrot.prompts[1] == TOKENIZER.decode(render(TOKENIZER, turns, add_generation_prompt=True).token_ids)
    assert contents(conversation) == [("a", "one"), ("b", "two")]
    assert "".join(seen.replies) == "one\ntwo\n"
    assert seen.notices == []


def test_the_same_question_later_draws_with_another_seed():
    parrot = Parrot("one", "two")
    converse(chat_with(parrot), Conversation(), ["a", "a"], Recorder().screen, seed=7)
    assert parrot.seeds == [7, 8]


def test_reset_forgets_all_but_the_system_prompt():
    parrot, seen = Parrot("one", "two"), Recorder()
    conversation = converse(chat_with(parrot), Conversation("Be brief."), ["a", "/reset", "b"], seen.screen)
    assert conversation.system == "Be brief."
    assert contents(conversation) == [("b", "two")]
    assert "one" not in parrot.prompts[1]


def test_system_sets_the_prompt_and_resets_and_alone_restores_the_default():
    parrot = Parrot("one", "two", "three")
    lines = ["a", "/system Speak like a pirate.", "b", "/system", "c"]
    converse(chat_with(parrot), Conversation(), lines, Recorder().screen)
    default = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
    assert parrot.prompts[0].startswith(default)
    assert parrot.prompts[1].startswith("<|im_start|>system\nSpeak like a pirate.<|im_end|>\n<|im_start|>user\nb<")
    assert parrot.prompts[2].startswith(default + "<|im_start|>user\nc<")


def test_help_names_every_command_and_exit_leaves():
    seen = Recorder()
    converse(chat_with(Parrot()), Conversation(), ["/help", "/exit", "never said"], seen.screen)
    assert all(command in seen.notices[0] for command in COMMANDS)
    assert seen.replies == []


def test_an_unknown_command_is_not_said_to_the_model():
    parrot, seen = Parrot(), Recorder()
    converse(chat_with(parrot), Conversation(), ["/rest"], seen.screen)
    assert "/rest" in seen.notices[0] and "/help" in seen.notices[0]
    assert parrot.prompts == []


def test_interrupting_keeps_what_was_said_and_goes_on():
    parrot, seen = Parrot("on^C", "two"), Recorder()
    conversation = converse(chat_with(parrot), Conversation(), ["a", "b"], seen.screen)
    assert contents(conversation) == [("a", "on"), ("b", "two")]
    assert seen.notices == ["(stopped)"]
    assert "".join(seen.replies) == "on\ntwo\n"
    assert parrot.cancelled == [1]


def test_interrupting_before_the_first_word_drops_the_question():
    conversation = converse(chat_with(Parrot("^C", "two")), Conversation(), ["a", "b"], Recorder().screen)
    assert contents(conversation) == [("b", "two")]


def test_a_reply_at_the_token_limit_says_so():
    seen = Recorder()
    converse(chat_with(Parrot("one", finish_reason="length")), Conversation(), ["a"], seen.screen)
    assert "--max_new_tokens" in seen.notices[0]


def test_a_failing_engine_is_told_and_its_question_forgotten():
    seen = Recorder()
    parrot = Parrot("one", finish_reason="error")
    assert converse(chat_with(parrot), Conversation(), ["a"], seen.screen) == Conversation()
    assert seen.notices == ["error: out of memory"] and "".join(seen.replies) == "one\n"


def test_who_waits_for_the_compiler_is_told(monkeypatch):
    class Compiling(Parrot):
        ready = False

        def submit(self, request, sink):
            threading.Timer(0.3, super().submit, (request, sink)).start()
            return 1

    monkeypatch.setattr(chat_local, "PATIENCE", 0.05)
    for engine, excuses in ((Compiling("one"), 1), (Parrot("one"), 0)):
        seen = Recorder()
        speaker = dataclasses.replace(chat_with(engine), notice=seen.screen.notice)
        converse(speaker, Conversation(), ["a"], seen.screen)
        time.sleep(0.1)
        assert "".join(seen.replies) == "one\n"
        assert len(seen.notices) == excuses and all("compiling" in notice for notice in seen.notices)


def said_before(*questions):
    exchanges = tuple((turn("user", q), turn("assistant", q.upper())) for q in questions)
    return Conversation("S", exchanges)


def one_token_a_turn(messages):
    return list(range(len(messages)))


@pytest.mark.parametrize(
    ("context", "reserve", "left"),
    [(20, 12, ["a", "b", "c"]), (20, 13, ["b", "c"]), (20, 15, ["c"]), (20, 17, []), (3, 3, [])],
)
def test_a_full_context_forgets_the_oldest_exchanges_first(context, reserve, left):
    conversation, ids = fit(said_before("a", "b", "c"), "d", one_token_a_turn, context, reserve)
    assert [question["content"] for question, _ in conversation.exchanges] == left
    assert ids == one_token_a_turn(conversation.messages("d"))
    assert conversation.system == "S"


def test_a_question_longer_than_the_context_is_refused_with_its_length():
    with pytest.raises(ChatError, match=r"have 2 tokens.* context of 2;"):
        fit(said_before("a"), "d", one_token_a_turn, context=2, reserve=1)


def test_overflow_is_said_and_the_chat_goes_on():
    question = "hello there " * 30
    parrot, seen = Parrot("one", "two", "three"), Recorder()
    lines = [question, question, "hello " * 200, "short"]
    conversation = converse(chat_with(parrot), Conversation(), lines, seen.screen)
    assert contents(conversation) == [(question.strip(), "two"), ("short", "three")]
    assert seen.notices[0].startswith("(the context of 128 tokens is full: the oldest question and its answer")
    assert seen.notices[1].startswith("error: this message and the system prompt have ")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("yes", {"content": "yes"}),
        ("<think>\nhm\n</think>\n\nyes", {"reasoning_content": "hm", "content": "yes"}),
        ("<think>\nhm, well", {"reasoning_content": "hm, well", "content": ""}),
        ("a </think> b", {"content": "a </think> b"}),
    ],
)
def test_thoughts_are_kept_apart_in_the_history(reply, expected):
    assert answer_turn(reply) == {"role": "assistant", **expected}


def test_thinking_on_opens_the_prompt_with_a_thought_and_the_next_prompt_repeats_it():
    parrot, seen = Parrot("hm\n</think>\n\none", "two\n</think>\n\n2"), Recorder()
    converse(chat_with(parrot, thinking_switch(TOKENIZER, "on")), Conversation(), ["a", "b"], seen.screen)
    assert parrot.prompts[0].endswith("<|im_start|>assistant\n<think>\n")
    assert parrot.prompts[1].startswith(parrot.prompts[0] + "hm\n</think>\n\none<|im_end|>\n")
    assert "".join(seen.replies).startswith("<think>\nhm\n</think>\n\none\n")


def test_a_thinking_switch_that_the_template_lacks_is_refused():
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = Tokenizer.from_files(TOKENIZER.files() | {"chat_template.jinja": template})
    assert thinking_switch(tokenizer, "auto") is None
    with pytest.raises(ConfigError, match="--thinking off"):
        thinking_switch(tokenizer, "off")


def test_a_model_cannot_drive_the_terminal():
    assert printable("a\x1b[2Jb\r\n\tc\x9b1m") == "a␛[2Jb␍\n\tc�1m"


# --- The whole program, with a tiny model in place of a checkpoint -----------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return LanguageModel(CONFIG, jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0)), TOKENIZER)


@pytest.fixture
def start(tiny, monkeypatch):
    """Run the program on some standard input."""

    def program(*flags, stdin=""):
        monkeypatch.setattr(chat_local, "load", lambda path: tiny)
        monkeypatch.setattr(serve_chat, "setup_jax", lambda: None)
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        return main(["--model_path", "out", "--max_new_tokens", "16", *flags])

    return program


def expected_reply(lm, *turns, sampling=SAMPLING, seed=0):
    ids = render(TOKENIZER, turns, add_generation_prompt=True).token_ids
    return generate(lm, [ids], sampling, seed=seed)[0].text


def test_prompt_prints_the_reply_and_a_newline_alone(start, tiny, capsys):
    assert start("--prompt", "hello", "--temperature", "0") == 0
    assert capsys.readouterr().out == expected_reply(tiny, turn("user", "hello")) + "\n"


def test_flags_reach_the_engine(start, tiny, capsys):
    start("--prompt", "hello", "--system", "there", "--top-k", "50", "--top_p", "0.9", "--seed", "5")
    prompt = render(TOKENIZER, [turn("system", "there"), turn("user", "hello")], add_generation_prompt=True).token_ids
    request = Request(prompt, max_new_tokens=16, temperature=ChatConfig().temperature, top_k=50, top_p=0.9, seed=5)
    tokens = drawn(started(tiny, EngineConfig(slots=1, context=128, prefill_piece=64, piece_sizes=1)), request)
    assert capsys.readouterr().out == TOKENIZER.decode(tokens, skip_special_tokens=True) + "\n"


def test_piped_lines_are_turns_of_one_conversation(start, tiny, capsys):
    assert start("--temperature", "0", stdin="hello\n/reset\nthere\n") == 0
    replies = [expected_reply(tiny, turn("user", question)) for question in ("hello", "there")]
    assert capsys.readouterr().out == "".join(reply + "\n" for reply in replies)


def test_a_turn_reads_only_what_the_last_one_left_unread(tiny, monkeypatch):
    monkeypatch.setattr(chat_local, "load", lambda path: tiny)
    settings = Request((), max_new_tokens=4, temperature=0.0)
    with local_speaker("out", settings, "auto", None, lambda text: None) as speaker:
        conversation, _ = answer(speaker, Conversation(), "hello there", 0, Recorder().screen)
        first = speaker.engine.stats()
        answer(speaker, conversation, "there", 0, Recorder().screen)
        assert first.cached_tokens == 0
        assert speaker.engine.stats().cached_tokens >= first.prompt_tokens - 1
    assert not speaker.engine.ready


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "either --model_path"),
        (["--model_path", "out", "--url", "http://127.0.0.1:1"], "either --model_path"),
        (["--model_path", "out", "--model", "base"], "--model: goes with --url"),
        (["--url", "http://127.0.0.1:1", "--context", "64"], "--context: goes with --model_path"),
        (["--model_path", "out", "--context", "1"], "--context 1: must be at least 2"),
        (["--url", "127.0.0.1:6006"], "--url 127.0.0.1:6006: must look like http://"),
        (["--url", "http://127.0.0.1:99999"], "--url http://127.0.0.1:99999: Port out of range"),
    ],
)
def test_flags_that_name_nobody_to_talk_to_are_one_line_and_status_2(flags, says, capsys):
    with pytest.raises(SystemExit) as exit:
        main(flags)
    assert exit.value.code == 2
    errors = capsys.readouterr().err
    assert says in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize("flags", [("--temperature", "-1"), ("--top_p", "0"), ("--max_new_tokens", "0")])
def test_settings_out_of_range_are_one_line_and_status_2(start, capsys, flags):
    with pytest.raises(SystemExit) as exit:
        start(*flags)
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {flags[0]} must ")


def test_an_interrupted_prompt_prints_what_was_said_and_exits_like_an_interrupted_program():
    seen = Recorder()
    assert run(chat_with(Parrot("on^C")), ChatConfig(prompt="a"), seen.screen) == 130
    assert "".join(seen.replies) == "on\n"


def test_ctrl_c_at_the_prompt_leaves(monkeypatch):
    lines = iter(["a"])

    def typed():
        yield from lines
        raise KeyboardInterrupt

    monkeypatch.setattr(serve_chat, "typed_lines", typed)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    seen = Recorder()
    assert run(chat_with(Parrot("one")), ChatConfig(), seen.screen) == 0
    assert "".join(seen.replies) == "one\n"
    assert "out/model" in seen.notices[0] and "/help" in seen.notices[0]
