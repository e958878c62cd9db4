"""Which kind of rows a file holds, told from its first ones, for stages that read more than one kind."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from minillm_jax.data.errors import DataError

_KIND_OF_FIELD = {"text": "pretrain", "conversations": "sft", "chosen": "preference"}
_ROWS_TRIED = 100


def row_kind(file: Path) -> str:
    """Return "pretrain", "sft" or "preference" by the fields of the first row that has any of theirs.

    A file without such a row is called "pretrain", so that reading it says what is wrong with which line.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with file.open("rb") as lines:
            for raw in islice(lines, _ROWS_TRIED):
                try:
                    row = json.loads(raw.decode("utf-8-sig"))
                except (ValueError, RecursionError):
                    continue
                for field, kind in _KIND_OF_FIELD.items():
                    if isinstance(row, dict) and field in row:
                        return kind
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    return "pretrain"
