"""What can be wrong with training data, in words for people, and the count of rows that were left out because of it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from minillm_jax.errors import UserError

OnBadRow = Literal["error", "skip"]

_MAX_EXAMPLES = 5
_MAX_REASONS = 10


class DataError(UserError, ValueError):
    """Training data that cannot be used; about a row, the text is `FILE:LINE: FIELD: what is wrong`."""


class FieldError(ValueError):
    """What is wrong with one field of a row, before file and line are known.

    Args:
        field: path of the field inside the row, for example `conversations[2].role`.
        problem: what is wrong, in words that do not depend on the row, so that equal problems are counted together.
        detail: what this row has instead.
    """

    def __init__(self, field: str, problem: str, detail: str = "") -> None:
        super().__init__(f"{field}: {problem}{detail}")
        self.reason = f"{re.sub(r'[0-9]+', '', field)}: {problem}"


@dataclass
class SkipReport:
    """Bad rows that were left out: how many for each reason, and the first few in full."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Rows left out."""
        return self.counts.total()

    def add(self, reason: str, example: str) -> None:
        """Count one row; `example` is its full message."""
        self.counts[reason] += 1
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples.append(example)

    def merge(self, other: SkipReport) -> None:
        """Add another report's rows to this one."""
        self.counts.update(other.counts)
        self.examples.extend(other.examples[: _MAX_EXAMPLES - len(self.examples)])

    def lines(self) -> list[str]:
        """Return the report for a screen: the commonest reasons, a line each, then the first example."""
        if not self.total:
            return []
        reasons = [f"  {count:,} x {reason}" for reason, count in self.counts.most_common(_MAX_REASONS)]
        return [f"skipped {self.total:,} bad row(s):", *reasons, f"  the first: {self.examples[0]}"]
