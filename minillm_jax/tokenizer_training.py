"""Learning a vocabulary: texts flow in, the files of a byte-level BPE tokenizer flow out.

The rules by which text is split before merges are learned are the part worth reading; they are saved in tokenizer.json,
so that a tokenizer trained under other rules keeps its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from minillm_jax.tokenizer_files import CONFIG, DEFINITION, TokenizerError, dump_json

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
"""Ids 0, 1, 2: padding, begin, end. Only rendering produces them; their spelling in user text stays text."""
TAG_TOKENS = tuple(
    f"<{slash}{tag}>" for tag in ("think", "answer", "tool_call", "tool_response") for slash in ("", "/")
)
"""Ids 3 to 10: markup that a model writes itself, so each is one token wherever it occurs."""
MIN_VOCAB_SIZE = len(CONTROL_TOKENS) + len(TAG_TOKENS) + 256

# The line end behind a turn's "assistant", apart from line ends that the answer begins with, so that a prompt's ids are
# a prefix of the conversation's; English contractions; words with their leading space and combining marks; digits one
# at a time, because a small model learns arithmetic more easily if a digit is always the same token; punctuation; line
# ends with the blanks before them; runs of blanks, leaving one for the next word. The atomic group keeps millions of
# blanks from exhausting the engine.
_WORDS = "|".join(
    [
        r"(?<=\Aassistant)\n",
        r"['’](?:[sdmt]|ll|ve|re)(?![\p{L}\p{M}])",
        r" ?[\p{L}\p{M}]+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{M}\p{N}]+",
        r"(?>[^\S\r\n]*)[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def learn(texts: Iterable[str], vocab_size: int) -> dict[str, str]:
    """Learn a vocabulary as `minillm_jax.tokenizer.train_tokenizer` says; return file contents by name."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise TokenizerError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {MIN_VOCAB_SIZE - 256} reserved tokens "
            f"need at least {MIN_VOCAB_SIZE}"
        )
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*CONTROL_TOKENS, *TAG_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    reserved = re.compile("|".join(map(re.escape, CONTROL_TOKENS + TAG_TOKENS)))
    pieces = (piece for text in texts for piece in reserved.split(text) if piece)  # no merge inside a reserved token
    if (first := next(pieces, None)) is None:
        raise TokenizerError("there is no text to train on")
    engine.train_from_iterator(chain([first], pieces), trainer)
    definition = json.loads(engine.to_str())
    for token in definition["added_tokens"]:
        token["special"] = token["content"] in CONTROL_TOKENS  # the trainer marks all of them
    return {DEFINITION: dump_json(definition), CONFIG: dump_json(_trained_config(definition["added_tokens"]))}


@cache
def default_chat_template() -> str:
    """Return the jinja2 source of the default chat template."""
    return Path(__file__).with_name("chat_template.jinja").read_text("utf-8")


def _trained_config(added_tokens: list[dict[str, Any]]) -> dict[str, Any]:
    """Describe a trained tokenizer to `transformers.AutoTokenizer`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": IM_START,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "model_max_length": 32768,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added_tokens
        },
        "chat_template": default_chat_template(),
    }
