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
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
"""Ids 0, 1, 2: padding, begin, end. Only rendering produces them; their spelling in user text stays text."""
TAG_TOKENS = tuple(
    f"<{slash}{tag}>" for tag in ("think", "answer", "tool_call", "tool_response") for slash in ("", "/")
)
"""Ids 3 to 10: markup that a model writes itself, so each is one token wherever it occurs."""
MIN_VOCAB_SIZE = len(CONTROL_TOKENS) + len(TAG_TOKENS) + 256

# English contractions; words with their leading space and combining marks; digits one at a time, because a small model
# learns arithmetic more easily if a digit is always the same token; punctuation; line ends with the blanks before them;
# runs of blanks, leaving one for the next word. The atomic group keeps millions of blanks from exhausting the engine.
_WORDS = "|".join(
    [
        r"['’](?:[sdmt]|ll|ve|re)(?![\p{L}\p{M}])",
        r" ?[\p{L}\p{M}]+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{M}\p{N}]+",
        r"(?>[^\S\r\n]*)[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


class TokenizerError(ValueError):
    """A folder that is no tokenizer, a vocabulary that cannot be, or a text that is not Unicode."""


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary with its chat template, as an immutable value: two are equal when their files are.

    Reads any `tokenizer.json`. Settings that would make ids depend on chance or length (BPE dropout, truncation,
    padding) are ignored. `config_json` includes the chat template.
    """

    tokenizer_json: str = field(repr=False)
    config_json: str = field(repr=False)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a folder that holds tokenizer.json, ours or anyone's, or a run folder that holds such a folder.

        The template is `chat_template.jinja` if there is one, else `chat_template` of tokenizer_config.json.

        Raises:
            TokenizerError: the folder is missing, holds no tokenizer.json, or one that cannot be read.
        """
        root = Path(folder)
        if not (root / "tokenizer.json").is_file() and (root / "tokenizer" / "tokenizer.json").is_file():
            root = root / "tokenizer"
        if not (root / "tokenizer.json").is_file():
            raise TokenizerError(_why_not_a_tokenizer(root))
        names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        files = {name: (root / name).read_text("utf-8") for name in names if (root / name).is_file()}
        try:
            return cls.from_files(files)
        except TokenizerError as error:
            raise TokenizerError(f"{root}: {error}") from error

    @classmethod
    def from_files(cls, files: dict[str, str]) -> Tokenizer:
        """Build a tokenizer from file contents by file name, as `files()` returns them.

        Raises:
            TokenizerError: tokenizer.json is missing or malformed, or no end token can be found.
        """
        if "tokenizer.json" not in files:
            raise TokenizerError("tokenizer.json is missing")
        config_text = files.get("tokenizer_config.json", "{}")
        if "chat_template.jinja" in files:
            config = _parse_json(config_text, "tokenizer_config.json") | {"chat_template": files["chat_template.jinja"]}
            config_text = _dump_json(config)
        tokenizer = cls(files["tokenizer.json"], config_text)
        _ = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.chat_template  # malformed files fail here
        return tokenizer

    def files(self) -> dict[str, str]:
        """Return the file contents that make this tokenizer, by file name."""
        return {"tokenizer.json": self.tokenizer_json, "tokenizer_config.json": self.config_json}

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load` and `transformers.AutoTokenizer` read; a crash leaves no half-written file."""
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".saving-") as temporary:
            for name, text in self.files().items():
                (Path(temporary) / name).write_text(text, "utf-8")
            for name in self.files():
                (Path(temporary) / name).replace(root / name)
        (root / "chat_template.jinja").unlink(missing_ok=True)  # of an earlier tokenizer; it would win over ours

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
        """Temporary."""
        return (self.eos_token_id,)

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
        value = self._config.get("chat_template")
        if isinstance(value, list):
            named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
            value = named.get("default", next(iter(named.values()), None))
        if value is not None and not isinstance(value, str):
            raise TokenizerError("tokenizer_config.json: chat_template: must be a string or a list of named templates")
        return value

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of the control tokens: the added tokens marked special."""
        return frozenset(token["id"] for token in self._definition.get("added_tokens", []) if token["special"])

    @cached_property
    def control_pattern(self) -> re.Pattern[str] | None:
        """Matches the spelling of any control token, the longest first; None when there are none."""
        spellings = sorted(filter(None, map(self.id_to_token, self.control_ids)), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, spellings))) if spellings else None

    @cached_property
    def named_tokens(self) -> dict[str, str]:
        """`bos_token` and its like by name, as chat templates expect to find them."""
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
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
        text = json.dumps([rules, template, ends], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @cached_property
    def _definition(self) -> dict[str, Any]:
        definition = _parse_json(self.tokenizer_json, "tokenizer.json") | {"truncation": None, "padding": None}
        if isinstance(definition.get("model"), dict) and definition["model"].get("dropout"):
            definition["model"]["dropout"] = None
        return definition

    @cached_property
    def _config(self) -> dict[str, Any]:
        return _parse_json(self.config_json, "tokenizer_config.json")

    @cached_property
    def _control_engine(self) -> tokenizers.Tokenizer:
        try:
            return tokenizers.Tokenizer.from_str(json.dumps(self._definition, ensure_ascii=False))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"tokenizer.json: {error}") from error

    @cached_property
    def _plain_engine(self) -> tokenizers.Tokenizer:
        engine = tokenizers.Tokenizer.from_str(json.dumps(self._definition, ensure_ascii=False))
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
        byte_of = _byte_alphabet()
        added = {token["id"] for token in self._definition.get("added_tokens", [])}
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

    def _encode(self, engine: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in engine.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError as error:
            raise TokenizerError(_why_not_unicode(texts)) from error

    def _encode_around_spellings(self, text: str) -> list[int]:
        """Encode text whose control spellings the model itself merges into control tokens: cut them in two."""
        assert self.control_pattern is not None
        cuts = [match.start() + 1 for match in self.control_pattern.finditer(text)]
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return [i for ids in self._encode(self._plain_engine, pieces) for i in ids]


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
    return Tokenizer(_dump_json(definition), _dump_json(_trained_config(definition["added_tokens"])))


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


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character in GPT-2's table: printable Latin-1 is itself, the others follow U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _parse_json(text: str, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise TokenizerError(f"{name}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{name}: must hold a JSON object, not {type(value).__name__}")
    return value


def _dump_json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def _why_not_a_tokenizer(root: Path) -> str:
    if not root.is_dir():
        return f"{root}: no such folder; train one with python -m train.tokenizer --data_path FILE --out_dir {root}"
    return f"{root}: no tokenizer.json in this folder; a SentencePiece model must be converted by transformers first"


def _why_not_unicode(texts: Sequence[str]) -> str:
    for text in texts:
        if not isinstance(text, str):
            return f"text must be a string, not {type(text).__name__}"
        if match := re.search("[\ud800-\udfff]", text):
            return f"character {match.start()} is the lone surrogate U+{ord(match[0]):04X}, which is not Unicode text"
    return "text is not Unicode"
