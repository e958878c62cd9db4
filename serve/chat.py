"""Talk to a model in the terminal: lines go in, replies are streamed out.

    python -m serve.chat --model_path out/sft
    python -m serve.chat --model_path out/sft --prompt "What is 12 + 30?"

Replies go to stdout and everything else to stderr, so that either end can be a pipe. The conversation is a value that
each turn replaces; when it outgrows the context it loses its oldest exchanges whole, never characters.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from rich.console import Console

from minillm_jax.chat import ChatError, Turn, render
from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import ConfigError, parse_cli
from minillm_jax.flops import count_params
from minillm_jax.lm import Completion, LanguageModel, load, stream
from minillm_jax.reward import is_reward_model
from minillm_jax.sampling import SamplingParams
from minillm_jax.tokenizer import Tokenizer, TokenizerError

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

    model_path: str
    """Run folder, or one of its checkpoints."""
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

    def sampling(self) -> SamplingParams:
        """Return the settings of a reply.

        Raises:
            ConfigError: a value outside its range.
        """
        try:
            return SamplingParams(
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
            )
        except ValueError as error:
            raise ConfigError(f"--{error}") from error


# --- The conversation --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conversation:
    """What has been said: a system prompt, and exchanges of a user's turn and the assistant's."""

    system: str | None = None
    exchanges: tuple[tuple[Turn, Turn], ...] = ()

    def messages(self, question: str) -> list[Turn]:
        """Return all turns, the question last."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        past = [turn for exchange in self.exchanges for turn in exchange]
        return [*system, *past, {"role": "user", "content": question}]

    def followed_by(self, question: str, answer: Turn) -> Conversation:
        """Return the conversation with one more exchange."""
        return replace(self, exchanges=(*self.exchanges, ({"role": "user", "content": question}, answer)))


def fit(
    conversation: Conversation, question: str, to_ids: Callable[[list[Turn]], list[int]], context: int, reserve: int
) -> tuple[Conversation, list[int]]:
    """Drop the oldest exchanges until the prompt leaves room for a reply.

    Args:
        conversation: what was said before.
        question: what is said now.
        to_ids: renders turns to a prompt.
        context: most tokens of prompt and reply.
        reserve: tokens to leave for the reply, as long as there are exchanges to drop.

    Returns:
        The conversation that is left, and the prompt's token ids.

    Raises:
        ChatError: the question alone fills the context.
    """
    ids = to_ids(conversation.messages(question))
    while len(ids) > context - reserve and conversation.exchanges:
        conversation = replace(conversation, exchanges=conversation.exchanges[1:])
        ids = to_ids(conversation.messages(question))
    if len(ids) >= context:
        raise ChatError(
            f"this message and the system prompt have {len(ids)} tokens, which leaves no room for an answer in the "
            f"model's context of {context}; shorten them"
        )
    return conversation, ids


def answer_turn(reply: str, opened: bool = False) -> Turn:
    """Make the assistant's turn of a reply, its thought kept apart as chat templates expect it.

    Args:
        reply: the generated text.
        opened: whether the prompt ended inside a thought already.
    """
    if not opened and not reply.lstrip().startswith("<think>"):
        return {"role": "assistant", "content": reply}
    thought, _, content = reply.partition("</think>")
    thought = thought.strip().removeprefix("<think>").strip("\n")
    return {"role": "assistant", "reasoning_content": thought, "content": content.lstrip("\n")}


def parse_line(line: str) -> tuple[str, str]:
    """Split a line into a command and its argument; plain text is the argument of the command `say`."""
    if not line.startswith("/"):
        return "say", line.strip()
    name, *argument = line.strip().split(maxsplit=1)
    known = {command.split()[0] for command in COMMANDS}
    return (name, argument[0] if argument else "") if name in known else ("unknown", name)


def thinking_switch(tokenizer: Tokenizer, thinking: str) -> bool | None:
    """Turn the flag into the template's switch.

    Raises:
        ConfigError: the template renders the same prompt whatever the switch says.
    """
    if thinking == "auto":
        return None
    probe = [{"role": "user", "content": "?"}]
    switches = (None, True, False)
    prompts = [render(tokenizer, probe, add_generation_prompt=True, enable_thinking=s).token_ids for s in switches]
    if prompts[0] == prompts[1] == prompts[2]:
        raise ConfigError(f"--thinking {thinking}: this model's chat template has no such switch; leave the flag out")
    return thinking == "on"


# --- One turn ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Screen:
    """Where replies go, and where everything else goes."""

    write: Callable[[str], None]
    notice: Callable[[str], None]
    show_speed: bool = False


@dataclass(frozen=True)
class Reply:
    """A reply as far as it got; `completion` is None if it was interrupted, times are in seconds."""

    text: str
    completion: Completion | None
    first_text_after: float
    seconds: float


Speaker = Callable[..., Generator[str, None, Completion]]
"""`minillm_jax.lm.stream`, or a stand-in."""


def speak(pieces: Generator[str, None, Completion], write: Callable[[str], None]) -> Reply:
    """Write pieces as they come, until they end or Ctrl-C stops them."""
    start = time.monotonic()
    first: float | None = None
    said: list[str] = []
    completion = None
    try:
        while True:
            piece = next(pieces)
            first = first or time.monotonic() - start
            said.append(piece)
            write(piece)
    except StopIteration as end:
        completion = end.value
    except KeyboardInterrupt:
        pieces.close()
    seconds = time.monotonic() - start
    return Reply("".join(said), completion, first or seconds, seconds)


@dataclass(frozen=True)
class Chat:
    """A model with the settings of its replies."""

    lm: LanguageModel
    sampling: SamplingParams
    thinking: bool | None
    speaker: Speaker = stream

    def prompt_ids(self, messages: list[Turn]) -> list[int]:
        """Render turns to a prompt."""
        return render(self.lm.tokenizer, messages, add_generation_prompt=True, enable_thinking=self.thinking).token_ids

    def answer(
        self, conversation: Conversation, question: str, seed: int, screen: Screen
    ) -> tuple[Conversation, Reply]:
        """Answer one question.

        Returns:
            The conversation with the exchange, or without it when nothing was said before an interruption.

        Raises:
            ChatError: the question does not fit, or the template cannot render it.
            TokenizerError: the question is not Unicode.
        """
        context = self.lm.config.max_position_embeddings
        reserve = min(self.sampling.max_new_tokens, context // 2)
        kept, ids = fit(conversation, question, self.prompt_ids, context, reserve)
        if dropped := len(conversation.exchanges) - len(kept.exchanges):
            what = "oldest question and its answer" if dropped == 1 else f"{dropped} oldest questions and their answers"
            screen.notice(f"(the context of {context} tokens is full: the {what} are forgotten)")
        reply = speak(self.speaker(self.lm, ids, self.sampling, seed=seed), screen.write)
        screen.write("\n")
        for line in remarks(reply, self.lm.tokenizer, screen.show_speed):
            screen.notice(line)
        if reply.completion is None and not reply.text:
            return kept, reply
        opened = self.lm.tokenizer.decode(ids[-8:]).rstrip().endswith("<think>")
        return kept.followed_by(question, answer_turn(reply.text, opened)), reply


def remarks(reply: Reply, tokenizer: Tokenizer, show_speed: bool) -> list[str]:
    """Say what a reader of the reply should know about it."""
    lines = []
    if reply.completion is None:
        lines.append("(stopped)")
    elif reply.completion.finish_reason == "length":
        lines.append("(cut off at the token limit; --max_new_tokens raises it as far as the context goes)")
    count = len(tokenizer.encode(reply.text) if reply.completion is None else reply.completion.token_ids)
    if show_speed and count:
        rate = count / max(reply.seconds, 1e-9)
        lines.append(f"{count} tokens, {rate:.0f} tokens/s, first text after {reply.first_text_after:.1f} s")
    return lines


# --- The terminal ------------------------------------------------------------------------------------------------


def converse(
    chat: Chat, conversation: Conversation, lines: Iterable[str], screen: Screen, seed: int = 0
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
                conversation, _ = chat.answer(conversation, argument, seed + number, screen)
            except (ChatError, TokenizerError) as error:
                screen.notice(f"error: {error}")
    return conversation


def typed_lines() -> Iterator[str]:
    """Yield lines typed at the terminal, with line editing where Python has it, until Ctrl-D."""
    with suppress(ImportError):
        importlib.import_module("readline")  # importing it is what makes input() editable
    while True:
        try:
            yield input("> ")
        except EOFError:
            print(file=sys.stderr)
            return


def open_screen() -> Screen:
    """Write replies to stdout and dim notices to stderr."""
    console = Console(stderr=True, highlight=False)
    at_terminal = sys.stdout.isatty()

    def write(text: str) -> None:
        sys.stdout.write(printable(text) if at_terminal else text)
        sys.stdout.flush()

    def notice(text: str) -> None:
        console.print(text, style="dim", markup=False, soft_wrap=True)

    return Screen(write, notice, show_speed=at_terminal)


def printable(text: str) -> str:
    """Show control characters as symbols, so that no model can drive the terminal."""
    return "".join(
        _symbol(char) if unicodedata.category(char) == "Cc" and char not in "\n\t" else char for char in text
    )


def _symbol(control: str) -> str:
    return chr(0x2400 + ord(control)) if control < " " else "�"


def main(argv: Sequence[str] | None = None) -> int:
    """Chat until the input ends; return the exit status."""
    with user_errors():
        config = parse_cli(ChatConfig, "Talk to a model in the terminal.", argv=argv)
        sampling = config.sampling()
        setup_jax()
        lm = load(config.model_path)
        if is_reward_model(lm.params):
            raise ConfigError(f"--model_path {config.model_path}: is a reward model; it scores texts and writes none")
        chat = Chat(lm, sampling, thinking_switch(lm.tokenizer, config.thinking))
        return run(chat, config, open_screen())


def run(chat: Chat, config: ChatConfig, screen: Screen) -> int:
    """Answer the one prompt, or whatever is typed or piped in; return the exit status."""
    conversation = Conversation(config.system)
    if config.prompt is not None:
        _, reply = chat.answer(conversation, config.prompt, config.seed, replace(screen, show_speed=False))
        return 130 if reply.completion is None else 0
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    if typed:
        shape = chat.lm.config
        screen.notice(
            f"{config.model_path}: {count_params(shape) / 1e6:.1f} M parameters, "
            f"context of {shape.max_position_embeddings:,} tokens\n"
            "/help lists commands; Ctrl-C stops an answer, Ctrl-D leaves"
        )
    try:
        converse(chat, conversation, typed_lines() if typed else sys.stdin, screen, config.seed)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 0 if typed else 130
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before there is anybody to talk to
        sys.exit(130)
    except BrokenPipeError:  # nobody reads on, as behind `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would fail as well
        sys.exit(141)
