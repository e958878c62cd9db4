"""The speaker of a terminal chat whose model runs in this process: the serving engine with a single slot.

One slot means that the conversation's own beginning is what the cache holds, so that each turn reads only what is new.
The engine compiles while the first question is typed; who asks before it is done is told.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

from minillm_jax.chat import ChatError, Turn, render
from minillm_jax.config import ConfigError
from minillm_jax.flops import count_params
from minillm_jax.lm import LanguageModel, load
from minillm_jax.reward import is_reward_model
from minillm_jax.tokenizer import Tokenizer
from serve.client import generate
from serve.conversation import THINK, Conversation, Ended, SpeakerError, Speech
from serve.engine import Engine, EngineConfig
from serve.protocol import EngineLike, EngineStoppedError, Finished, Request, Tokens
from serve.text import TokenDecoder

DEFAULT_CONTEXT = 4096
"""Tokens of a conversation unless more are asked for: their cache is reserved at the start."""
PIECE = 64
"""Tokens of a prompt that are read at once: one size only, because each takes seconds to compile."""
PATIENCE = 1.0
"""Seconds without an answer after which the reason is told."""


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
        conversation = conversation.without_oldest()
        ids = to_ids(conversation.messages(question))
    if len(ids) >= context:
        raise ChatError(
            f"this message and the system prompt have {len(ids)} tokens, which leaves no room for an answer in the "
            f"context of {context}; shorten them"
        )
    return conversation, ids


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


@dataclass(frozen=True)
class LocalSpeaker:
    """An engine with the settings of its replies; see `conversation.Speaker`.

    Attributes:
        engine: started, ready or not.
        tokenizer: the model's.
        settings: of every reply; its prompt and its seed are replaced.
        thinking: the chat template's switch; None leaves it alone.
        title: who it is, in a few words.
        notice: tells what keeps the person waiting.
    """

    engine: EngineLike
    tokenizer: Tokenizer
    settings: Request
    thinking: bool | None
    title: str
    notice: Callable[[str], None]

    @property
    def context(self) -> int:
        """Most tokens of a conversation and its reply."""
        return self.engine.context

    def prompt_ids(self, messages: list[Turn]) -> list[int]:
        """Render turns to a prompt."""
        return render(self.tokenizer, messages, add_generation_prompt=True, enable_thinking=self.thinking).token_ids

    def reply(self, conversation: Conversation, question: str, seed: int) -> Speech:
        """Answer a question.

        Raises:
            ChatError: the question does not fit, or the template cannot render it.
            TokenizerError: the question is not Unicode.
            SpeakerError: the engine has failed.
        """
        reserve = min(self.settings.max_new_tokens, self.context // 2)
        kept, ids = fit(conversation, question, self.prompt_ids, self.context, reserve)
        if kept != conversation:
            yield kept
        opening = THINK + "\n" if self.tokenizer.decode(ids[-8:]).rstrip().endswith(THINK) else ""
        ends = frozenset(self.tokenizer.eos_token_ids)
        decoder, count, reason = TokenDecoder(self.tokenizer), 0, ""
        for event in self._events(replace(self.settings, token_ids=ids, seed=seed)):
            if isinstance(event, Tokens):
                count += len(event.token_ids)
                text = decoder.push([token for token in event.token_ids if token not in ends])
            else:
                reason, text = event.reason, decoder.flush()
                if reason not in ("stop", "length"):
                    raise SpeakerError(event.detail or f"the engine ended the reply: {reason}")
            if text:
                yield opening + text
                opening = ""
        return Ended(reason, count)

    def _events(self, request: Request) -> Iterator[Tokens | Finished]:
        """Yield what the engine draws; whoever waits for it to compile is told so."""
        patience = threading.Timer(PATIENCE, self._excuse)
        patience.daemon = True
        patience.start()
        try:
            with closing(generate(self.engine, request)) as events:
                for event in events:
                    patience.cancel()
                    if isinstance(event, Tokens | Finished):
                        yield event
        except EngineStoppedError as error:
            raise SpeakerError(str(error)) from error
        finally:
            patience.cancel()

    def _excuse(self) -> None:
        if not self.engine.ready:
            self.notice("(compiling …; the first start takes longest)")


@contextmanager
def local_speaker(
    path: str, settings: Request, thinking: str, context: int | None, notice: Callable[[str], None]
) -> Iterator[LocalSpeaker]:
    """Load a model and start its engine, which ends with the block.

    Args:
        path: run folder, one of its checkpoints, or a Hugging Face folder.
        settings: of every reply.
        thinking: `auto`, `on` or `off`.
        context: most tokens of a conversation; None takes what the model can, at most `DEFAULT_CONTEXT`.
        notice: tells what keeps the person waiting.

    Raises:
        ConfigError: the model writes no texts, or has no such switch.
        UserError: the folder holds no model.
    """
    lm: LanguageModel = load(path)
    if is_reward_model(lm.params):
        raise ConfigError(f"--model_path {path}: is a reward model; it scores texts and writes none")
    switch = thinking_switch(lm.tokenizer, thinking)
    config = EngineConfig(slots=1, context=context or DEFAULT_CONTEXT, prefill_piece=PIECE, piece_sizes=1)
    engine = Engine(lm, config)
    engine.start()
    title = f"{path}: {count_params(lm.config) / 1e6:.1f} M parameters"
    try:
        yield LocalSpeaker(engine, lm.tokenizer, settings, switch, title, notice)
    finally:
        if engine.ready:  # one that still compiles can only end with the process
            engine.drain(0)
