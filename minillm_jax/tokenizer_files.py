"""Tokenizer folders as people publish them: file contents flow in, the two strings of a `Tokenizer` flow out.

The same facts are written in several places: templates in files of their own or in the configuration, names of tokens
in `special_tokens_map.json`, end ids with the settings of generation. The decision worth knowing: which place counts
is what `transformers` decides, so that both give the same ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from minillm_jax.errors import UserError

DEFINITION, CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
NAMES, TEMPLATE, MORE_TEMPLATES = "special_tokens_map.json", "chat_template.jinja", "additional_chat_templates"


class TokenizerError(UserError, ValueError):
    """A folder that is no tokenizer, a vocabulary that cannot be, or a text that is not Unicode."""


def read_folder(folder: str | Path) -> tuple[Path, dict[str, str]]:
    """Read a folder with tokenizer.json, or one that holds such a folder; return which it was, and contents by name.

    Raises:
        TokenizerError: the folder is missing, holds no tokenizer.json, or text that is not UTF-8.
    """
    root = Path(folder)
    if not (root / DEFINITION).is_file() and (root / "tokenizer" / DEFINITION).is_file():
        root = root / "tokenizer"
    if not (root / DEFINITION).is_file():
        raise TokenizerError(_why_not_a_tokenizer(root))
    paths = [root / name for name in (DEFINITION, CONFIG, GENERATION, NAMES, TEMPLATE)]
    paths += sorted((root / MORE_TEMPLATES).glob("*.jinja"))
    files = {}
    for path in filter(Path.is_file, paths):
        try:
            files[path.relative_to(root).as_posix()] = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path}: not UTF-8 text: {error}") from error
    return root, files


def remove_overriding(root: Path) -> None:
    """Remove files of an earlier tokenizer that would win over the configuration."""
    for path in (root / TEMPLATE, root / NAMES, *(root / MORE_TEMPLATES).glob("*.jinja")):
        path.unlink(missing_ok=True)


def configuration(files: dict[str, str]) -> str:
    """Merge what stands beside tokenizer_config.json into it: templates and the names of tokens.

    Raises:
        TokenizerError: a file that does not hold a JSON object.
    """
    text = files.get(CONFIG, "{}")
    merged: dict[str, Any] = {}
    if NAMES in files and "added_tokens_decoder" not in parse_json(text, CONFIG):  # the older layout
        names = parse_json(files[NAMES], NAMES)
        merged |= {name: token for name, token in names.items() if name.endswith("_token")}
    templates = {Path(name).stem: source for name, source in files.items() if name.startswith(MORE_TEMPLATES + "/")}
    if TEMPLATE in files:
        templates = {"default": files[TEMPLATE]} | templates
    if list(templates) == ["default"]:
        merged["chat_template"] = templates["default"]
    elif templates:
        merged["chat_template"] = [{"name": name, "template": source} for name, source in templates.items()]
    return dump_json(parse_json(text, CONFIG) | merged) if merged else text


def added_by_configuration(config: dict[str, Any], known: set[str]) -> list[tokenizers.AddedToken]:
    """Return the tokens that only the configuration names, as older folders do; none of `known`."""
    listed = [token for token in (config.get("added_tokens_decoder") or {}).values() if isinstance(token, dict)]
    named = [value for name, value in config.items() if name.endswith("_token")]
    for key in ("extra_special_tokens", "additional_special_tokens"):
        more = config.get(key) or []
        named += more.values() if isinstance(more, dict) else more
    tokens: dict[str, tokenizers.AddedToken] = {}
    for value in [*listed, *named]:
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str) and content and content not in known | set(tokens):
            kept = ("single_word", "lstrip", "rstrip", "normalized", "special")
            flags = {key: value[key] for key in kept if key in value} if isinstance(value, dict) else {}
            tokens[content] = tokenizers.AddedToken(content, **({"special": value not in listed} | flags))
    return list(tokens.values())


def end_ids(value: Any, vocab_size: int, where: str) -> list[int]:
    """Read the ids that end a turn: one, a list, or null for none.

    Raises:
        TokenizerError: something that is no id of this vocabulary; the message begins with `where`.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise TokenizerError(f"{where}: {json.dumps(i)} is not an id of this vocabulary of {vocab_size}")
    return ids


def parse_json(text: str, name: str) -> dict[str, Any]:
    """Parse a file that holds a JSON object.

    Raises:
        TokenizerError: it does not; the message begins with `name`.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise TokenizerError(f"{name}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{name}: must hold a JSON object, not {type(value).__name__}")
    return value


def dump_json(value: dict[str, Any]) -> str:
    """Write JSON as all our tokenizer files have it."""
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def byte_alphabet() -> dict[str, int]:
    """Return the byte of each character in GPT-2's table: printable Latin-1 is itself, the others follow U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def why_not_unicode(texts: Sequence[str]) -> str:
    """Say what is wrong with texts that cannot be encoded."""
    for text in texts:
        if not isinstance(text, str):
            return f"text must be a string, not {type(text).__name__}"
        if match := re.search("[\ud800-\udfff]", text):
            return f"character {match.start()} is the lone surrogate U+{ord(match[0]):04X}, which is not Unicode text"
    return "text is not Unicode"


def _why_not_a_tokenizer(root: Path) -> str:
    if not root.is_dir():
        return f"{root}: no such folder; train one with python -m train.tokenizer --data_path FILE --out_dir {root}"
    return f"{root}: no tokenizer.json in this folder; a SentencePiece model must be converted by transformers first"
