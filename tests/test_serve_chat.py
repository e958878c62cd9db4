"""The terminal chat: commands, history, one-shot, pipes, interruption, overflow; with a tiny or a scripted model."""

import dataclasses
import io
import sys

import jax
import pytest

from minillm_jax.chat import ChatError, render
from minillm_jax.config import ConfigError, ModelConfig
from minillm_jax.lm import Completion, LanguageModel, generate
from minillm_jax.model import init_params
from minillm_jax.sampling import SamplingParams
from minillm_jax.tokenizer import Tokenizer, train_tokenizer
from serve import chat as serve_chat
from serve.chat import (
    COMMANDS,
    Chat,
    ChatConfig,
    Conversation,
    Screen,
    answer_turn,
    converse,
    fit,
    main,
    parse_line,
    printable,
    run,
    thinking_switch,
)

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
    """A speaker that says one scripted text after another, in pieces, and remembers its prompts."""

    def __init__(self, *texts, finish_reason="stop"):
        self.texts, self.finish_reason = list(texts), finish_reason
        self.prompts, self.seeds = [], []

    def __call__(self, lm, ids, sampling, *, seed):
        self.prompts.append(lm.tokenizer.decode(ids))
        self.seeds.append(seed)
        text = self.texts.pop(0)
        for piece in (text[:2], text[2:]):
            if "^C" in piece:
                raise KeyboardInterrupt
            yield piece
        return Completion(text, lm.tokenizer.encode(text), [], self.finish_reason)


def chat_with(speaker, **changes):
    lm = LanguageModel(dataclasses.replace(CONFIG, **changes), {}, TOKENIZER)
    return Chat(lm, SAMPLING, None, speaker)


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


def test_interrupting_before_the_first_word_drops_the_question():
    conversation = converse(chat_with(Parrot("^C", "two")), Conversation(), ["a", "b"], Recorder().screen)
    assert contents(conversation) == [("b", "two")]


def test_a_reply_at_the_token_limit_says_so():
    seen = Recorder()
    converse(chat_with(Parrot("one", finish_reason="length")), Conversation(), ["a"], seen.screen)
    assert "--max_new_tokens" in seen.notices[0]


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
    ("reply", "opened", "expected"),
    [
        ("yes", False, {"content": "yes"}),
        ("<think>\nhm\n</think>\n\nyes", False, {"reasoning_content": "hm", "content": "yes"}),
        ("hm\n</think>\n\nyes", True, {"reasoning_content": "hm", "content": "yes"}),
        ("hm, well", True, {"reasoning_content": "hm, well", "content": ""}),
        ("a </think> b", False, {"content": "a </think> b"}),
    ],
)
def test_thoughts_are_kept_apart_in_the_history(reply, opened, expected):
    assert answer_turn(reply, opened) == {"role": "assistant", **expected}


def test_thinking_on_opens_the_prompt_with_a_thought_and_the_next_prompt_repeats_it():
    parrot = Parrot("hm\n</think>\n\none", "two\n</think>\n\n2")
    chat = dataclasses.replace(chat_with(parrot), thinking=thinking_switch(TOKENIZER, "on"))
    converse(chat, Conversation(), ["a", "b"], Recorder().screen)
    assert parrot.prompts[0].endswith("<|im_start|>assistant\n<think>\n")
    assert parrot.prompts[1].startswith(parrot.prompts[0] + "hm\n</think>\n\none<|im_end|>\n")


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
        monkeypatch.setattr(serve_chat, "load", lambda path: tiny)
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


def test_flags_reach_the_sampler(start, tiny, capsys):
    start("--prompt", "hello", "--system", "there", "--top-k", "50", "--top_p", "0.9", "--seed", "5")
    sampling = SamplingParams(max_new_tokens=16, temperature=ChatConfig("").temperature, top_k=50, top_p=0.9)
    turns = turn("system", "there"), turn("user", "hello")
    assert capsys.readouterr().out == expected_reply(tiny, *turns, sampling=sampling, seed=5) + "\n"


def test_piped_lines_are_turns_of_one_conversation(start, tiny, capsys):
    assert start("--temperature", "0", stdin="hello\n/reset\nthere\n") == 0
    replies = [expected_reply(tiny, turn("user", question)) for question in ("hello", "there")]
    assert capsys.readouterr().out == "".join(reply + "\n" for reply in replies)


@pytest.mark.parametrize("flags", [("--temperature", "-1"), ("--top_p", "0")])
def test_settings_out_of_range_are_one_line_and_status_2(start, capsys, flags):
    with pytest.raises(SystemExit) as exit:
        start(*flags)
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {flags[0]} must ")


def test_an_interrupted_prompt_prints_what_was_said_and_exits_like_an_interrupted_program(tmp_path):
    seen = Recorder()
    assert run(chat_with(Parrot("on^C")), ChatConfig(str(tmp_path), prompt="a"), seen.screen) == 130
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
    assert run(chat_with(Parrot("one")), ChatConfig("out/model"), seen.screen) == 0
    assert "".join(seen.replies) == "one\n"
    assert "out/model" in seen.notices[0] and "/help" in seen.notices[0]
