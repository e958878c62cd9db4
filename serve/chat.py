"""Talk to a model in the terminal, in this process or on a server: lines go in, replies are streamed out.

    python -m serve.chat --model_path out/sft
    python -m serve.chat --model_path out/sft --prompt "What is 12 + 30?"
    python -m serve.chat --url http://127.0.0.1:6006

The conversation is a value that each turn replaces; when it outgrows the context it loses its oldest exchanges whole,
never characters. Only a model in this process needs jax, which is why its speaker is imported late.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import ConfigError, parse_cli
from minillm_jax.errors import UserError
from serve.auth import read_key
from serve.chat_remote import parse_server, remote_speaker
from serve.conversation import Conversation, Ended, Speaker, answer_turn
from serve.protocol import Request
from serve.requests import check_settings
from serve.terminal import Screen, open_screen, printable, typed_lines

COMMANDS = {
    "/reset": "forget the conversation",
    "/system TEXT": "set the system prompt and forget the conversation; without TEXT, go back to the template's own",
    "/help": "show this",
    "/exit": "leave, as do Ctrl-D and Ctrl-C",
}
HELP = "\n".join(f"{command:<13} {what}" for command, what in COMMANDS.items()) + (
    "\nCtrl-C stops an answer. To say something that begins with a slash, put a space before it."
)


@dataclass(frozen=True)
class ChatConfig:
    """Whom to talk to, and how answers are drawn."""

    model_path: str | None = None
    """Run folder, one of its checkpoints, or a Hugging Face folder, to be run in this process."""
    url: str | None = None
    """Address of a running server with OpenAI's API, in place of a model_path; http://127.0.0.1:6006 is ours."""
    model: str | None = None
    """Name of the server's model; None takes the first that it lists."""
    api_key_file: str | None = None
    """File whose first line is the server's key; None looks for it in the environment's MINILLM_API_KEY."""
    context: int | None = None
    """Most tokens of a conversation with a model_path; None takes what the model can, at most 4096."""
    prompt: str | None = None
    """Answer this alone and exit; stdout gets nothing but the reply."""
    system: str | None = None
    """System prompt; None leaves it to the chat template."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Open each reply with a thought, with an empty thought, or as the chat template does by itself."""
    max_new_tokens: int = 512
    """Longest reply in tokens."""
    temperature: float = 0.7
    """Divides the logits; 0 always takes the most likely token."""
    top_p: float = 0.95
    """Keep the most likely tokens whose probability reaches this sum; 1 keeps all."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the most likely one."""
    repetition_penalty: float = 1.0
    """Makes tokens seen before less likely; 1 does not."""
    seed: int = 0
    """Seed of the draws: the same lines give the same replies."""

    def check(self) -> None:
        """Refuse flags that contradict each other.

        Raises:
            ConfigError: naming them.
        """
        if (self.model_path is None) == (self.url is None):
            raise ConfigError("give either --model_path, to run a model here, or --url, to talk to a running server")
        idle = ("model", "api_key_file") if self.url is None else ("context",)
        for name in idle:
            if getattr(self, name) is not None:
                raise ConfigError(f"--{name}: goes with --{'url' if self.url is None else 'model_path'}; leave it out")
        if self.context is not None and self.context < 2:
            raise ConfigError(f"--context {self.context}: must be at least 2")

    def settings(self) -> Request:
        """Return the settings of a reply, as a request whose prompt and seed are still missing.

        Raises:
            ConfigError: a value outside its range.
        """
        settings = Request(
            token_ids=(),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )
        try:
            check_settings(settings)
        except ValueError as error:
            raise ConfigError(f"--{error}") from error
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max_new_tokens must be at least 1; it is {self.max_new_tokens}")
        return settings


def parse_line(line: str) -> tuple[str, str]:
    """Split a line into a command and its argument; plain text is the argument of the command `say`."""
    if not line.startswith("/"):
        return "say", line.strip()
    name, *argument = line.strip().split(maxsplit=1)
    known = {command.split()[0] for command in COMMANDS}
    return (name, argument[0] if argument else "") if name in known else ("unknown", name)


# --- One turn ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """A reply as far as it got; `ended` is None if it was interrupted, times are in seconds."""

    text: str
    ended: Ended | None
    first_text_after: float
    seconds: float


def answer(
    speaker: Speaker, conversation: Conversation, question: str, seed: int, screen: Screen
) -> tuple[Conversation, Reply]:
    """Have one question answered, until the reply ends or Ctrl-C stops it.

    Returns:
        The conversation with the exchange, or without it when nothing was said before an interruption.

    Raises:
        UserError: the question cannot be answered, or the reply broke off.
    """
    kept, said = conversation, list[str]()
    start = time.monotonic()
    first: float | None = None
    ended: Ended | None = None
    speech = speaker.reply(conversation, question, seed)
    try:
        while True:
            piece = next(speech)
            if isinstance(piece, Conversation):
                screen.notice(forgotten(len(kept.exchanges) - len(piece.exchanges), speaker.context))
                kept = piece
                continue
            first = first or time.monotonic() - start
            said.append(piece)
            screen.write(piece)
    except StopIteration as end:
        ended = end.value
    except KeyboardInterrupt:
        speech.close()
    except UserError:
        screen.write("\n" if said else "")
        raise
    seconds = time.monotonic() - start
    screen.write("\n")
    reply = Reply("".join(said), ended, first or seconds, seconds)
    for line in remarks(reply, screen.show_speed):
        screen.notice(line)
    if ended is None and not said:
        return kept, reply
    return kept.followed_by(question, answer_turn(reply.text)), reply


def forgotten(count: int, context: int | None) -> str:
    """Say that a conversation was shortened, and why."""
    full = "the context is full" if context is None else f"the context of {context} tokens is full"
    what = "oldest question and its answer" if count == 1 else f"{count} oldest questions and their answers"
    return f"({full}: the {what} are forgotten)"


def remarks(reply: Reply, show_speed: bool) -> list[str]:
    """Say what a reader of the reply should know about it."""
    if reply.ended is None:
        return ["(stopped)"]
    lines = []
    if reply.ended.finish_reason == "length":
        lines.append("(cut off at the token limit; --max_new_tokens raises it as far as the context goes)")
    elif reply.ended.finish_reason != "stop":
        lines.append(f"(the server ended the reply: {printable(reply.ended.finish_reason)})")
    if show_speed and reply.ended.tokens:
        rate = reply.ended.tokens / max(reply.seconds, 1e-9)
        lines.append(
            f"{reply.ended.tokens} tokens, {rate:.0f} tokens/s, first text after {reply.first_text_after:.1f} s"
        )
    return lines


# --- The program -------------------------------------------------------------------------------------------------


def converse(
    speaker: Speaker, conversation: Conversation, lines: Iterable[str], screen: Screen, seed: int = 0
) -> Conversation:
    """Answer line after line, obeying commands, and return the conversation as it ends."""
    for number, line in enumerate(lines):
        command, argument = parse_line(line)
        if command == "/exit":
            break
        if command == "/help":
            screen.notice(HELP)
        elif command == "/reset":
            conversation = Conversation(conversation.system)
            screen.notice("(the conversation is forgotten)")
        elif command == "/system":
            conversation = Conversation(argument or None)
            screen.notice("(the system prompt is set)" if argument else "(the system prompt is the template's own)")
        elif command == "unknown":
            screen.notice(f"{argument} is no command; /help lists them, and a space before it says it to the model")
        elif argument:
            try:
                conversation, _ = answer(speaker, conversation, argument, seed + number, screen)
            except UserError as error:
                screen.notice(f"error: {error}")
    return conversation


@contextmanager
def open_speaker(config: ChatConfig, screen: Screen) -> Iterator[Speaker]:
    """Find whom the flags name; a model in this process is let go with the block.

    Raises:
        UserError: there is nobody, or the flags are wrong.
    """
    settings = config.settings()
    if config.url is not None:
        server = parse_server(config.url, read_key(config.api_key_file, os.environ))
        yield remote_speaker(server, config.model, settings, config.thinking)
    elif config.model_path is not None:
        setup_jax()
        from serve.chat_local import local_speaker  # imports jax, which takes seconds

        with local_speaker(config.model_path, settings, config.thinking, config.context, screen.notice) as speaker:
            yield speaker


def main(argv: Sequence[str] | None = None) -> int:
    """Chat until the input ends; return the exit status."""
    with user_errors():
        config = parse_cli(ChatConfig, "Talk to a model in the terminal.", argv=argv)
        config.check()
        screen = open_screen()
        with open_speaker(config, screen) as speaker:
            return run(speaker, config, screen)


def run(speaker: Speaker, config: ChatConfig, screen: Screen) -> int:
    """Answer the one prompt, or whatever is typed or piped in; return the exit status."""
    conversation = Conversation(config.system)
    if config.prompt is not None:
        _, reply = answer(speaker, conversation, config.prompt, config.seed, replace(screen, show_speed=False))
        return 130 if reply.ended is None else 0
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    if typed:
        context = "" if speaker.context is None else f", context of {speaker.context:,} tokens"
        screen.notice(f"{speaker.title}{context}\n/help lists commands; Ctrl-C stops an answer, Ctrl-D leaves")
    try:
        converse(speaker, conversation, typed_lines() if typed else sys.stdin, screen, config.seed)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 0 if typed else 130
    return 0


def leave(status: int) -> None:
    """End the process without waiting for what an engine may still compile."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    try:
        leave(main())
    except SystemExit as ending:  # a wrong flag, or --help
        leave(ending.code if isinstance(ending.code, int) else int(bool(ending.code)))
    except KeyboardInterrupt:  # before there is anybody to talk to
        leave(130)
    except BrokenPipeError:  # nobody reads on, as behind `head`
        os._exit(141)
