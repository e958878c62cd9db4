"""JSONL files to typed records, one row at a time.

Files go in; frozen records that know their file and line come out. Every check of a row's shape lives here, so that the
stages behind may rely on it; a row that fails reads `FILE:LINE: FIELD: what is wrong`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillm_jax.chat import ChatError, check_conversation
from minillm_jax.data.errors import DataError, FieldError, OnBadRow, SkipReport
from minillm_jax.data.sources import resolve_sources

Turns = Sequence[Mapping[str, Any]]

_BOM = b"\xef\xbb\xbf"
_LARGEST = 3.4e38  # what float32 takes
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Record:
    """Where a row stands: its file as given, and its line counted from 1."""

    file: str
    line: int


@dataclass(frozen=True)
class PretrainRecord(Record):
    """A document of plain text."""

    text: str


@dataclass(frozen=True)
class SftRecord(Record):
    """A conversation with at least one assistant turn; `tools` is what stood beside it in the row."""

    conversations: Turns
    tools: Any = None


@dataclass(frozen=True)
class PreferenceRecord(Record):
    """Two conversations that end in an assistant turn, the first one preferred, and by how much if the row says."""

    chosen: Turns
    rejected: Turns
    tools: Any = None
    margin: float | None = None


@dataclass(frozen=True)
class RLRecord(Record):
    """A prompt as turns that an assistant would answer, and the verifiable answer if there is one."""

    conversations: Turns
    answer: str | None = None
    tools: Any = None
    row: Mapping[str, Any] = field(default_factory=dict)
    """The JSON object as it was read, for reward functions that want other fields."""


@dataclass(frozen=True)
class ChoiceRecord(Record):
    """A question, its candidate continuations, and the index of the right one."""

    query: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class PairsRecord(Record):
    """An acceptable text and one that differs minimally and is not, and what the difference tests if the row says."""

    good: str
    bad: str
    task: str | None = None


@dataclass(frozen=True)
class ExactRecord(Record):
    """A prompt and the only accepted answer, and the kind of question if the row says."""

    prompt: str
    answer: str
    family: str | None = None


def _describe(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, list) else "an object"


def _string(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        raise FieldError(key, "is missing")
    if not isinstance(row[key], str):
        number = isinstance(row[key], int | float) and not isinstance(row[key], bool)
        advice = "; write it in quotes" if number else ""
        raise FieldError(key, "must be a string", f", not {_describe(row[key])}{advice}")
    return row[key]


def _optional_string(row: Mapping[str, Any], key: str) -> str | None:
    return None if row.get(key) is None else _string(row, key)


def _optional_number(row: Mapping[str, Any], key: str) -> float | None:
    """Read a number that float32 can hold; JSON as Python reads it also has NaN, Infinity and integers of any size."""
    value = row.get(key)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise FieldError(key, "must be a number", f", not {_describe(value)}")
    if not abs(value) <= _LARGEST:
        raise FieldError(key, "must be a finite number", f", not {_describe(value)}")
    return float(value)


def _list(row: Mapping[str, Any], key: str) -> list[Any]:
    if key not in row:
        raise FieldError(key, "is missing")
    if not isinstance(row[key], list):
        raise FieldError(key, "must be a list", f", not {_describe(row[key])}")
    if not row[key]:
        raise FieldError(key, "is empty")
    return row[key]


def _turns(row: Mapping[str, Any], key: str) -> Turns:
    """Read one list of turns, checked as the chat template's renderer will read it."""
    turns = _list(row, key)
    try:
        check_conversation(turns, row.get("tools"), field=key)
    except ChatError as error:
        raise chat_field_error(error) from None
    return turns


def chat_field_error(error: ChatError) -> FieldError:
    """Turn an error of the chat module into one of this; what a template says about a whole chat names no field."""
    where, _, problem = str(error).partition(": ")
    return FieldError("conversations", str(error)) if " " in where else FieldError(where, problem)


def _pretrain(row: dict[str, Any], file: str, line: int) -> PretrainRecord:
    return PretrainRecord(file, line, _string(row, "text"))


def _sft(row: dict[str, Any], file: str, line: int) -> SftRecord:
    turns = _turns(row, "conversations")
    if not any(turn["role"] == "assistant" for turn in turns):
        raise FieldError("conversations", "has no assistant turn to learn from")
    return SftRecord(file, line, turns, row.get("tools"))


def _preference(row: dict[str, Any], file: str, line: int) -> PreferenceRecord:
    chosen, rejected = _turns(row, "chosen"), _turns(row, "rejected")
    for key, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1]["role"] != "assistant":
            raise FieldError(f"{key}[{len(turns) - 1}].role", "the last turn must be the assistant's")
    return PreferenceRecord(file, line, chosen, rejected, row.get("tools"), _optional_number(row, "margin"))


def _rl(row: dict[str, Any], file: str, line: int) -> RLRecord:
    if "prompt" in row:
        turns: Turns = [{"role": "user", "content": _string(row, "prompt")}]
    elif "conversations" in row:
        turns = _turns(row, "conversations")
        if turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        if not any(turn["role"] == "user" for turn in turns):
            raise FieldError("conversations", "has no user turn to answer")
    else:
        raise FieldError("prompt", "is missing", " (and so is conversations)")
    return RLRecord(file, line, turns, _optional_string(row, "answer"), row.get("tools"), row)


def _choice(row: dict[str, Any], file: str, line: int) -> ChoiceRecord:
    query, choices, gold = _string(row, "query"), _list(row, "choices"), row.get("gold")
    for i, choice in enumerate(choices):
        if not isinstance(choice, str):
            raise FieldError(f"choices[{i}]", "must be a string", f", not {_describe(choice)}")
    if "gold" not in row:
        raise FieldError("gold", "is missing")
    if not isinstance(gold, int) or isinstance(gold, bool):
        raise FieldError("gold", "must be a whole number", f", not {_describe(gold)}")
    if not 0 <= gold < len(choices):
        raise FieldError("gold", "must be the index of a choice", f" (0 to {len(choices) - 1}), not {gold}")
    return ChoiceRecord(file, line, query, tuple(choices), gold)


def _pairs(row: dict[str, Any], file: str, line: int) -> PairsRecord:
    return PairsRecord(file, line, _string(row, "good"), _string(row, "bad"), _optional_string(row, "task"))


def _exact(row: dict[str, Any], file: str, line: int) -> ExactRecord:
    return ExactRecord(file, line, _string(row, "prompt"), _string(row, "answer"), _optional_string(row, "family"))


_PARSERS: dict[str, Callable[[dict[str, Any], str, int], Record]] = {
    "pretrain": _pretrain,
    "sft": _sft,
    "preference": _preference,
    "rl": _rl,
    "choice": _choice,
    "pairs": _pairs,
    "exact": _exact,
}
KINDS = tuple(_PARSERS)


def _refuse_surrogates(value: Any, name: str) -> None:
    """Refuse strings that have no UTF-8 form: JSON can escape half of a surrogate pair, and no tokenizer takes it."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f" \\u{ord(value[error.start]):04x} at character {error.start}"
            raise FieldError(name or "row", "holds half of a surrogate pair", half) from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _refuse_surrogates(key, name)
            _refuse_surrogates(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _refuse_surrogates(item, f"{name}[{i}]")


def _parse_line(raw: bytes) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise FieldError(
            "row", "is not UTF-8", f" (byte {error.start + 1} of the line); save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise FieldError("row", "is not JSON", f": {error.msg} at character {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested too deeply
        raise FieldError("row", "is not JSON", f": {error}") from None
    if not isinstance(row, dict):
        raise FieldError("row", "must be a JSON object", f", not {_describe(row)}")
    if _SURROGATE_ESCAPE.search(raw):
        _refuse_surrogates(row, "")
    return row


def bad_row(record: Record, error: FieldError, on_bad_row: OnBadRow, report: SkipReport | None) -> None:
    """Stop at a bad row, or count it.

    Raises:
        DataError: `FILE:LINE: FIELD: what is wrong`, unless `on_bad_row` is "skip".
    """
    message = f"{record.file}:{record.line}: {error}"
    if on_bad_row == "error":
        raise DataError(message) from None
    if report is not None:
        report.add(error.reason, message)


def read_file(
    file: Path, kind: str, on_bad_row: OnBadRow = "error", report: SkipReport | None = None
) -> Iterator[tuple[Record, int]]:
    """Read one JSONL file, holding one line at a time.

    Args:
        file: UTF-8, with or without a byte-order mark; blank lines are passed over.
        kind: one of KINDS.
        on_bad_row: "error" stops at the first bad row; "skip" counts it in `report` and goes on.
        report: receives the skipped rows.

    Yields:
        Each record, and how many bytes of the file have been read by then.

    Raises:
        DataError: a bad row, an unreadable file, or a file without rows.
    """
    parse, name, position, rows = _PARSERS[kind], str(file), 0, 0
    try:
        with file.open("rb") as lines:
            for number, raw in enumerate(lines, start=1):
                position += len(raw)
                raw = (raw.removeprefix(_BOM) if number == 1 else raw).rstrip()
                if not raw:
                    continue
                rows += 1
                try:
                    record = parse(_parse_line(raw), name, number)
                except FieldError as error:
                    bad_row(Record(name, number), error, on_bad_row, report)
                else:
                    yield record, position
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from error
    if not rows:
        raise DataError(f"{name}: holds no rows; it needs one JSON object a line")


def read_records(
    path_specs: Sequence[str], kind: str, on_bad_row: OnBadRow = "error", report: SkipReport | None = None
) -> Iterator[Any]:
    """Read every row of some files and folders in order, one at a time; weights are ignored.

    Args:
        path_specs: files or folders, each with an optional `:weight`.
        kind: one of "pretrain", "sft", "preference", "rl", "choice", "pairs", "exact".
        on_bad_row: "error" stops at the first bad row; "skip" counts it in `report` and goes on.
        report: receives the skipped rows.

    Yields:
        PretrainRecord, SftRecord, PreferenceRecord, RLRecord, ChoiceRecord, PairsRecord or ExactRecord.

    Raises:
        DataError: a bad row (`FILE:LINE: FIELD: what is wrong`), or a path without rows.
    """
    for source in resolve_sources(path_specs):
        for file in source.files:
            for record, _ in read_file(file, kind, on_bad_row, report):
                yield record
