"""The built-in rewards: small pure functions of texts.

A reward is a function `(prompts, completions, rows) -> [B]`, ours or a user's: the text of each rendered prompt, the
text of each completion without its end token, and the JSON object of the row that the prompt was made of. Each judges a
completion by itself, and none knows its own weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from minillm_jax.evaluation import final_answer
from minillm_jax.reasoning import read_reasoning

Row = Mapping[str, Any]
RewardFn = Callable[[list[str], list[str], list[Row]], Any]

NGRAM = 3
"""Words that have to come again together to count as repetition."""
RELATIVE_TOLERANCE = 1e-6

_NUMBER = re.compile(
    r"(?P<sign>(?:(?<![A-Za-z0-9_)\]])[-+−])?(?:\$[-+−]?)?)"  # a minus after a letter or digit is an operator or a dash
    r"(?P<digits>(?<![A-Za-z0-9_])(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
    r"(?P<exponent>[eE][-+]?[0-9]+)?"
    r"(?:/(?P<denominator>[0-9]+))?"
)
_CJK = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
"""A word; of scripts that put no spaces between words, a character."""


def exact(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
    """Give 1 where the final answer is the row's `answer` to the letter, as evaluation does, and else 0."""
    return [
        float(final_answer(completion) == row["answer"].strip())
        for completion, row in zip(completions, rows, strict=True)
    ]


def numeric(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
    """Give 1 where the last number of the final answer is the last one of the row's `answer`, and else 0."""
    return [
        float(same_number(read_number(final_answer(completion)), read_number(row["answer"])))
        for completion, row in zip(completions, rows, strict=True)
    ]


def read_number(text: str) -> float | None:
    """Read the last number of a text; None if it has none, or none that a float can hold.

    Understood are signs, decimals, thousands separators (`1,234`), dollars (`-$5`), exponents and fractions (`3/4`).
    Digits that belong to a name (`x2`) are no number.
    """
    found = None
    for found in _NUMBER.finditer(text):  # noqa: B007 (the last one is wanted)
        pass
    if found is None:
        return None
    value = float(found["digits"].replace(",", "") + (found["exponent"] or ""))
    if found["denominator"]:
        denominator = float(found["denominator"])
        value = value / denominator if denominator else math.nan
    if "-" in found["sign"] or "−" in found["sign"]:
        value = -value
    return value if math.isfinite(value) else None


def same_number(a: float | None, b: float | None) -> bool:
    """Compare whole numbers exactly, others up to a relative difference of 1e-6; what is no number equals none."""
    if a is None or b is None:
        return False
    if a.is_integer() and b.is_integer():  # counting is exact, however large the number
        return a == b
    return math.isclose(a, b, rel_tol=RELATIVE_TOLERANCE)


def well_formed(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
    """Give 1 where a completion is a thought and an answer, see `reasoning.read_reasoning`, and else 0."""
    return [float(read_reasoning(completion) is not None) for completion in completions]


def matches(pattern: str) -> RewardFn:
    """Make the reward that is 1 where a regular expression is found anywhere in the completion, and else 0."""
    compiled = re.compile(pattern)

    def regex(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
        return [float(compiled.search(completion) is not None) for completion in completions]

    return regex


def repetition(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
    """Give minus the share of a completion's runs of three words that were there before: 0 to nearly -1."""
    return [-repeated_share(completion) for completion in completions]


def repeated_share(text: str) -> float:
    """Return the share in [0, 1) of runs of three words that repeat an earlier one, upper and lower case alike."""
    words = _WORD.findall(text.lower())
    runs = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def soft_overlong_punishment(lengths: Sequence[int], target: int, limit: int) -> np.ndarray:
    """DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13).

    Up to `target` it is 0; from there it falls linearly to -1 at `limit` and stays there. In the paper's symbols
    `limit` is L_max and `limit - target` is L_cache.

    Args:
        lengths: [B] tokens of the completions.
        target: tokens that cost nothing.
        limit: tokens from which on the punishment is whole, more than `target`.

    Returns:
        [B] float64 in [-1, 0].
    """
    return np.clip((target - np.asarray(lengths, np.float64)) / (limit - target), -1.0, 0.0)
