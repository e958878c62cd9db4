"""Byte-level BPE: train, load, save, encode, decode. Text flows in, token ids flow out, and back without loss.

A tokenizer is two strings, the contents of `tokenizer.json` and `tokenizer_config.json`, so a checkpoint can carry it
and a cache can fingerprint it. The decision worth knowing: there are two engines over the same vocabulary. The plain
one never sees control tokens, so user text cannot forge a turn; the other reads rendered chat templates.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import tokenizers

from minillm_jax.tokenizer_files import (
    CONFIG,
    DEFINITION,
    GENERATION,
    added_by_configuration,
    byte_alphabet,
    configuration,
    dump_json,
    end_ids,
    parse_json,
    read_folder,
    remove_overriding,
    why_not_unicode,
)
from minillm_jax.tokenizer_files import TokenizerError as TokenizerError
from minillm_jax.tokenizer_training import CONTROL_TOKENS as CONTROL_TOKENS
from minillm_jax.tokenizer_training import END_OF_TEXT, learn
from minillm_jax.tokenizer_training import IM_END as IM_END
from minillm_jax.tokenizer_training import IM_START as IM_START
from minillm_jax.tokenizer_training import MIN_VOCAB_SIZE as MIN_VOCAB_SIZE
from minillm_jax.tokenizer_training import TAG_TOKENS as TAG_TOKENS
from minillm_jax.tokenizer_training import default_chat_template as default_chat_template


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary with its chat template, as an immutable value: two are equal when their files are.

    Reads any `tokenizer.json` by its own rules, where `transformers` has others for some (`LlamaTokenizer`). Settings
    that would make ids depend on chance or length (BPE dropout, truncation, padding) are ignored. `config_json`
    includes the chat template, and end tokens of generation_config.json as `eos_token_ids`.
    """

    tokenizer_json: str = field(repr=False)
    config_json: str = field(repr=False)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a folder that holds tokenizer.json, ours or anyone's, or a run folder that holds such a folder.

        Chat templates in files of their own win over those of tokenizer_config.json; the end tokens of a model are
        those of `generation_config.json`, if it stands in the folder.

        Raises:
            TokenizerError: the folder is missing, holds no tokenizer.json, or one that cannot be read.
        """
        root, files = read_folder(folder)
        try:
            return cls.from_files(files)
        except TokenizerError as error:
            raise TokenizerError(f"{root}: {error}") from error

    @classmethod
    def from_files(cls, files: dict[str, str]) -> Tokenizer:
        """Build a tokenizer from file contents by file name, as `files()` returns them.

        Raises:
            TokenizerError: tokenizer.json is missing or malformed, no end token can be found, or one of those that
                generation_config.json lists is not in the vocabulary.
        """
        if DEFINITION not in files:
            raise TokenizerError("tokenizer.json is missing")
        tokenizer = cls(files[DEFINITION], configuration(files))
        listed = parse_json(files.get(GENERATION, "{}"), GENERATION).get("eos_token_id")
        if ends := end_ids(listed, tokenizer.vocab_size, f"{GENERATION}: eos_token_id"):
            tokenizer = tokenizer._ending_with(ends)
        # Malformed files fail here.
        _ = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.chat_template
        return tokenizer

    def files(self) -> dict[str, str]:
        """Return the file contents that make this tokenizer, by file name."""
        return {DEFINITION: self.tokenizer_json, CONFIG: self.config_json}

    def with_system_prompt(self, prompt: str) -> Tokenizer:
        """Return this tokenizer with a chat template that opens conversations without a system turn by this one.

        The prompt then goes wherever the template does: into training, generation, serving and exported folders.

        Raises:
            TokenizerError: the prompt spells a control token, which inside a template would be that token.
        """
        if self.control_pattern is not None and (found := self.control_pattern.search(prompt)):
            raise TokenizerError(f"the system prompt must not spell the control token {found[0]}")
        turn = f"[{{'role': 'system', 'content': {json.dumps(prompt, ensure_ascii=False)}}}]"
        opening = "{%- if not messages or messages[0]['role'] != 'system' %}"
        opening += f"{{%- set messages = {turn} + messages %}}{{%- endif %}}"
        templates = self._templates or {"default": default_chat_template()}
        named = [{"name": name, "template": opening + source} for name, source in templates.items()]
        config = self._config | {"chat_template": named if len(named) > 1 else named[0]["template"]}
        return replace(self, config_json=dump_json(config))

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load` and `transformers.AutoTokenizer` read; a crash leaves no half-written file."""
        root, files = Path(folder), self.files()
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".saving-") as temporary:
            for name, text in files.items():
                (Path(temporary) / name).write_text(text, "utf-8")
            for name in files:
                (Path(temporary) / name).replace(root / name)
        remove_overriding(root)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str, str]]:
        """Pickle the two strings: a pickled engine would forget that it must not see control tokens."""
        return type(self), (self.tokenizer_json, self.config_json)

    def encode(self, text: str) -> list[int]:
        """Encode plain text. The spelling of a control token in it stays ordinary text.

        Raises:
            TokenizerError: the text holds a lone surrogate, which is not Unicode.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many plain texts in parallel, each as `encode` does."""
        batch = self._encode(self._plain_engine, texts)
        for i, ids in enumerate(batch):
            if not self._unforgeable.isdisjoint(ids):
                batch[i] = self._encode_around_spellings(texts[i])
        return batch

    def encode_control(self, text: str) -> list[int]:
        """Encode text in which the spellings of control tokens are these tokens, such as a rendered template."""
        return self._encode(self._control_engine, [text])[0]

    def encode_control_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """Encode like `encode_control`; also return the character at which each token starts."""
        encoding = self._control_engine.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Turn ids back into text, without the control tokens if `skip_special_tokens`.

        Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary give nothing.
        """
        if skip_special_tokens:
            ids = [i for i in ids if i not in self.control_ids]
        table = self._token_bytes
        if table is None:
            return self._control_engine.decode([i for i in ids if i in self._tokens], skip_special_tokens=False)
        return b"".join(table.get(i, b"") for i in ids).decode("utf-8", errors="replace")

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token by its spelling in the vocabulary, or None."""
        return self._control_engine.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """Return the vocabulary's spelling of an id, or None."""
        return self._tokens.get(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to a text; none for an id outside the vocabulary."""
        if (table := self._token_bytes) is not None:
            return table.get(token_id, b"")
        spelling = self._tokens.get(token_id, "")
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", spelling):
            return bytes.fromhex(byte[1])
        before = self.encode("x")  # a text's first token may lose the space that it stands for
        return self.decode([*before, token_id])[len(self.decode(before)) :].encode()

    @cached_property
    def vocab_size(self) -> int:
        """Rows an embedding table needs: the largest id plus one."""
        return max(self._tokens) + 1

    @cached_property
    def eos_token_id(self) -> int:
        """End of a document or turn: `eos_token` of the configuration, else the first well-known name present."""
        names = [self._configured("eos_token"), IM_END, "</s>", "<eos>", "<|end_of_text|>", END_OF_TEXT]
        found = [i for name in names if name is not None and (i := self.token_to_id(name)) is not None]
        if not found:
            raise TokenizerError('no end token; add "eos_token" to tokenizer_config.json')
        return found[0]

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end a turn, each once: `eos_token_id`, then what the model's generation settings add."""
        listed = end_ids(self._config.get("eos_token_ids"), self.vocab_size, f"{CONFIG}: eos_token_ids")
        return tuple(dict.fromkeys([self.eos_token_id, *listed]))

    @cached_property
    def bos_token_id(self) -> int:
        """Begin of a document: `bos_token` of the configuration; a tokenizer without one begins with its end token."""
        return self._id_or_eos("bos_token")

    @cached_property
    def pad_token_id(self) -> int:
        """Padding: `pad_token` of the configuration; a tokenizer without one pads with its end token."""
        return self._id_or_eos("pad_token")

    @cached_property
    def chat_template(self) -> str | None:
        """The jinja2 source of the chat template, or None; of several, the one named `default`."""
        return self._templates.get("default", next(iter(self._templates.values()), None))

    @cached_property
    def tool_template(self) -> str | None:
        """The chat template for conversations that offer tools: the one named `tool_use`, else `chat_template`."""
        return self._templates.get("tool_use", self.chat_template)

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of the control tokens: the added tokens marked special."""
        return frozenset(i for i, token in self._control_engine.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def control_pattern(self) -> re.Pattern[str] | None:
        """Matches the spelling of any control token, the longest first; None when there are none."""
        spellings = sorted(filter(None, map(self.id_to_token, self.control_ids)), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, spellings))) if spellings else None

    @cached_property
    def named_tokens(self) -> dict[str, str]:
        """`bos_token` and its like by name, as chat templates expect to find them."""
        names = [name for name in self._config if name.endswith("_token")]
        return {name: token for name in names if (token := self._configured(name))}

    @cached_property
    def joins_pieces(self) -> bool:
        """Whether texts may be encoded piece by piece; false where every text starts with an invented space."""
        return self.decode(self.encode("x") * 2) == "xx"

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that changes ids: vocabulary, splitting rules, chat template, begin, end, padding."""
        rules = {key: value for key, value in self._definition.items() if key != "decoder"}
        ends = [self.bos_token_id, self.eos_token_id, self.pad_token_id]
        template = self.chat_template or default_chat_template()
        more = [str(token.__getstate__()) for token in self._added_by_configuration]
        if self.tool_template != self.chat_template:
            more.append(str(self.tool_template))
        text = json.dumps([rules, template, ends, *more], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @cached_property
    def _definition(self) -> dict[str, Any]:
        definition = parse_json(self.tokenizer_json, DEFINITION) | {"truncation": None, "padding": None}
        if isinstance(definition.get("model"), dict) and definition["model"].get("dropout"):
            definition["model"]["dropout"] = None
        return definition

    @cached_property
    def _config(self) -> dict[str, Any]:
        return parse_json(self.config_json, CONFIG)

    @cached_property
    def _templates(self) -> dict[str, str]:
        value = self._config.get("chat_template")
        if isinstance(value, list):
            named = {entry["name"]: entry["template"] for entry in value if {"name", "template"} <= set(entry)}
        else:
            named = {} if value is None else {"default": value}
        if not all(isinstance(source, str) for source in named.values()):
            raise TokenizerError("tokenizer_config.json: chat_template: must be a string or a list of named templates")
        return named

    @cached_property
    def _added_by_configuration(self) -> list[tokenizers.AddedToken]:
        known = {token["content"] for token in self._definition.get("added_tokens") or []}
        return added_by_configuration(self._config, known)

    @cached_property
    def _control_engine(self) -> tokenizers.Tokenizer:
        definition = json.dumps(self._definition, ensure_ascii=False)
        try:
            engine = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"tokenizer.json: {error}") from error
        engine.add_tokens(self._added_by_configuration)
        return engine

    @cached_property
    def _plain_engine(self) -> tokenizers.Tokenizer:
        engine = tokenizers.Tokenizer.from_str(self._control_engine.to_str())
        engine.encode_special_tokens = True  # in spite of its name: treats special tokens as ordinary text
        return engine

    @cached_property
    def _tokens(self) -> dict[int, str]:
        return {i: token for token, i in self._control_engine.get_vocab(with_added_tokens=True).items()}

    @cached_property
    def _unforgeable(self) -> frozenset[int]:
        """Control ids that no plain text may produce; unknown text does produce the unknown token."""
        model = self._definition["model"]
        return self.control_ids - {self.token_to_id(model.get("unk_token") or ""), model.get("unk_id")}

    @cached_property
    def _token_bytes(self) -> dict[int, bytes] | None:
        """The bytes of every token, or None for a tokenizer that is not byte-level."""
        if (self._definition.get("decoder") or {}).get("type") != "ByteLevel":
            return None
        byte_of = byte_alphabet()
        added = self._control_engine.get_added_tokens_decoder()
        table: dict[int, bytes] = {}
        for i, token in self._tokens.items():
            spelled_in_bytes = i not in added and all(char in byte_of for char in token)
            table[i] = bytes(byte_of[char] for char in token) if spelled_in_bytes else token.encode()
        return table

    def _configured(self, name: str) -> str | None:
        value = self._config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        return content if isinstance(content, str) and content else None

    def _id_or_eos(self, name: str) -> int:
        token = self._configured(name)
        token_id = self.token_to_id(token) if token is not None else None
        return self.eos_token_id if token_id is None else token_id

    def _ending_with(self, ends: list[int]) -> Tokenizer:
        """Return this tokenizer with these end tokens after its own; one of its own needs no mention."""
        ids = list(dict.fromkeys([self.eos_token_id, *ends]))
        config = {key: value for key, value in self._config.items() if key != "eos_token_ids"}
        if len(ids) > 1:
            config["eos_token_ids"] = ids
        return self if config == self._config else replace(self, config_json=dump_json(config))

    def _encode(self, engine: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in engine.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError as error:
            raise TokenizerError(why_not_unicode(texts)) from error

    def _encode_around_spellings(self, text: str) -> list[int]:
        """Encode text whose control spellings the model itself merges into control tokens: cut them in two."""
        assert self.control_pattern is not None
        cuts = [match.start() + 1 for match in self.control_pattern.finditer(text)]
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return [i for ids in self._encode(self._plain_engine, pieces) for i in ids]


class MissingTokenizer(Tokenizer):
    """Stands in for the tokenizer of a model that came without one: it knows numbers, and no text.

    Ids decode to nothing; whatever needs the vocabulary raises a TokenizerError that says what to do.
    """

    @classmethod
    def for_model(cls, vocab_size: int, eos_token_ids: Sequence[int] = ()) -> MissingTokenizer:
        """Make one for a model with `vocab_size` embeddings.

        Raises:
            TokenizerError: an end token that the model has no embedding for.
        """
        ends = end_ids(list(eos_token_ids), vocab_size, "eos_token_id")
        return cls("", json.dumps({"vocab_size": vocab_size, "eos_token_ids": ends}))

    @cached_property
    def vocab_size(self) -> int:
        """Rows of the model's embedding table."""
        return int(self._config["vocab_size"])

    @cached_property
    def eos_token_id(self) -> int:
        """The first end token; a model need not have any."""
        return self.eos_token_ids[0] if self.eos_token_ids else self._missing("end token")

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All end tokens, perhaps none."""
        return tuple(dict.fromkeys(self._config["eos_token_ids"]))

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """None is known."""
        return frozenset()

    def files(self) -> dict[str, str]:
        """Raise a TokenizerError: there is nothing to write."""
        return self._missing()

    @property
    def chat_template(self) -> NoReturn:
        """None is known."""
        self._missing()

    @property
    def _definition(self) -> NoReturn:
        self._missing()

    @property
    def _tokens(self) -> dict[int, str]:
        return {}

    @property
    def _token_bytes(self) -> dict[int, bytes]:
        return {}

    def _missing(self, what: str = "tokenizer") -> NoReturn:
        raise TokenizerError(f"this model has no {what}: give token ids, or put a tokenizer.json into its folder")


class StreamDecoder:
    """Turns ids that arrive one by one into text, holding back a character until its last byte is there.

    The pieces joined, with `flush()` at the end, are what `Tokenizer.decode` gives for all ids at once.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.control_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._context: list[int] = []  # emitted ids that decide how the next ones are spaced
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Return the text that this token completes, which may be empty."""
        if token_id in self._skipped:
            return ""
        table = self._tokenizer._token_bytes
        if table is not None:
            return self._utf8.decode(table.get(token_id, b""))
        self._pending.append(token_id)
        text = self._pending_text()
        if text.endswith("�") and len(self._pending) < 4:  # no character has more bytes, hence tokens
            return ""
        self._context, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """Return what is left at the end of the stream; the decoder is then ready for another."""
        text = self._pending_text() if self._pending else self._utf8.decode(b"", final=True)
        self._utf8.reset()
        self._context, self._pending = [], []
        return text

    def _pending_text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]


def encode_prompt(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """Token ids of a prompt; text starts like a document, with the begin token, and holds no control tokens."""
    return [tokenizer.bos_token_id, *tokenizer.encode(prompt)] if isinstance(prompt, str) else list(prompt)


def encode_document(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode one pretraining document: begin token, plain text, end token."""
    return encode_documents(tokenizer, [text])[0]


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Encode many pretraining documents in parallel, each as `encode_document` does."""
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [[begin, *ids, end] for ids in tokenizer.encode_batch(texts)]


def train_tokenizer(texts: Iterable[str], vocab_size: int = 6400) -> Tokenizer:
    """Learn a byte-level BPE vocabulary; the same texts give the same tokenizer.

    Args:
        texts: documents, streamed once.
        vocab_size: ids to fill, control and tag tokens included. A corpus with fewer repeated words gives fewer;
            compare `Tokenizer.vocab_size`.

    Raises:
        TokenizerError: `vocab_size` has no room for all bytes, or there is no text.
    """
    return Tokenizer.from_files(learn(texts, vocab_size))
