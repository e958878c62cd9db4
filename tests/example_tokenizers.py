"""Tokenizers that several test files share: a small one of ours, variations of it, and one of Llama 2's kind."""

import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from minillm_jax.tokenizer import Tokenizer, train_tokenizer

CORPUS = [
    "It was the best of times, it was the worst of times; we don't know which.\n\n    And so on, in 1859.\n",
    "话说天下大势，分久必合，合久必分。却说曹操引军渡河，再战，又败而走。\n",
] * 20
TOKENIZER = train_tokenizer(CORPUS, 380)


def with_config(**changes: object) -> dict[str, str]:
    """The test tokenizer's files with some configuration fields changed, or removed where None."""
    config = json.loads(TOKENIZER.config_json) | changes
    config = {key: value for key, value in config.items() if value is not None}
    return {"tokenizer.json": TOKENIZER.tokenizer_json, "tokenizer_config.json": json.dumps(config)}


def with_definition(**changes: object) -> dict[str, str]:
    """The test tokenizer's files with some fields of tokenizer.json changed."""
    return TOKENIZER.files() | {"tokenizer.json": json.dumps(json.loads(TOKENIZER.tokenizer_json) | changes)}


def spaced_tokenizer() -> Tokenizer:
    """A tokenizer of Llama 2's kind: a space is invented before each text, unknown characters fall back to bytes."""
    engine = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    engine.pre_tokenizer = pre_tokenizers.Metaspace()
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    engine.train_from_iterator(CORPUS[:1], trainers.BpeTrainer(vocab_size=400, special_tokens=tokens))
    definition = json.loads(engine.to_str())
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] in special]
    return Tokenizer.from_files({"tokenizer.json": json.dumps(definition)})
