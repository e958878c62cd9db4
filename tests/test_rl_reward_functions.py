"""The built-in rewards, each held to a table of texts and to what is always true of it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.reward_functions import (
    exact,
    matches,
    numeric,
    read_number,
    repeated_share,
    repetition,
    soft_overlong_punishment,
    well_formed,
)


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("72", "72", 1),
        (" 72\n", "72 ", 1),
        ("72.", "72", 0),
        ("<think>\n70 + 2\n</think>\n\n72", "72", 1),
        ("<think>72</think><answer> 71 </answer>", "71", 1),
        ("<answer>1</answer> no, <answer>2</answer>", "2", 1),
        ("<answer>two\nlines</answer>", "two\nlines", 1),
        ("Yes", "yes", 0),
        ("", "", 1),
    ],
)
def test_exact_compares_the_final_answer_to_the_letter(completion, answer, reward):
    assert exact(["p"], [completion], [{"answer": answer}]) == [reward]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("72", "72", 1),
        ("It is 72.", "72", 1),
        ("It is 72.0", "72", 1),
        ("72 or 73", "72", 0),
        ("no number at all", "72", 0),
        ("", "0", 0),
        ("1,234", "1234", 1),
        ("$1,234,567.50.", "1234567.5", 1),
        ("1, 2, 3", "3", 1),
        ("1,23", "23", 1),
        ("-5", "-5", 1),
        ("-5", "5", 0),
        ("+5", "5", 1),
        ("−5", "-5", 1),
        ("-$5", "-5", 1),
        ("$-5.25", "-5.25", 1),
        ("3-5", "5", 1),
        ("x = -5", "-5", 1),
        ("(7)-2", "2", 1),
        (".5", "0.5", 1),
        ("so...72", "72", 1),
        ("Answer.72", "72", 1),
        ("**72**", "72", 1),
        (r"\boxed{72}", "72", 1),
        ("72 apples", "72", 1),
        ("72cm", "72", 1),
        ("50%", "50", 1),
        ("答案是72。", "72", 1),
        ("x2", "2", 0),
        ("72 of x2", "72", 1),
        ("1e3", "1000", 1),
        ("1.5E-2", "0.015", 1),
        ("1e999", "1e999", 0),
        ("3/4", "0.75", 1),
        ("2", "1/2", 0),
        ("1/0", "1", 0),
        ("0.3333333", "1/3", 1),
        ("0.33333", "1/3", 0),
        ("3000000.1", "3000000", 1),
        ("123456788", "123456789", 0),
        ("-0", "0", 1),
        ("<think>72</think>It is 71", "71", 1),
        ("<think>9</think><answer>12</answer> and 13", "12", 1),
        ("<think>72</think>none", "72", 0),
        ("72", "48/2 = 24, and 48 + 24 = <<48+24=72>>72\n#### 72", 1),
    ],
)
def test_numeric_compares_the_last_numbers(completion, answer, reward):
    assert numeric(["p"], [completion], [{"answer": answer}]) == [reward]


@given(
    st.integers(-(10**12), 10**12),
    st.sampled_from(["{}", "{}.", "${}", "about {:,}", "<answer>{:,}</answer>", "{}.00"]),
)
def test_every_whole_number_is_read_back(number, form):
    text = form.format(number)
    assert read_number(text.removeprefix("<answer>").removesuffix("</answer>")) == number
    assert numeric(["p"], [text], [{"answer": str(number)}]) == [1]
    assert numeric(["p"], [text], [{"answer": str(number + 1)}]) == [0]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_that_python_writes_is_read_back(number):
    assert read_number(f"it is {number!r}") == number


@given(st.text())
def test_any_text_has_a_finite_number_or_none(text):
    number = read_number(text)
    assert number is None or math.isfinite(number)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("<think>\na\n</think>\n\n<answer>\nb\n</answer>\n", 1),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think>a</think>b", 0),
        ("<think>a</think><answer>b</answer> c", 0),
        ("<think><think>a</think><answer>b</answer>", 0),
    ],
)
def test_format_wants_a_thought_and_an_answer(completion, reward):
    assert well_formed(["p"], [completion], [{}]) == [reward]


def test_regex_searches_the_whole_completion():
    found = matches(r"\d+ apples?$")(["p"] * 3, ["I have 3 apples", "3 apples, I think", "none"], [{}] * 3)
    assert found == [1, 0, 0]


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0),
        ("one two", 0),
        ("one two three four", 0),
        ("a b c a b c", 1 / 4),
        ("a b c, a b c; A B C!", 4 / 7),
        ("no " * 12, 9 / 10),
        ("你好吗你好吗", 1 / 4),
        ("3 + 4 is 7", 0),
    ],
)
def test_repetition_is_the_share_of_runs_of_three_words_that_come_again(text, share):
    assert repeated_share(text) == pytest.approx(share)
    assert repetition(["p"], [text], [{}]) == [pytest.approx(-share)]


@given(st.text(alphabet="ab ", max_size=60))
def test_repetition_lies_between_minus_one_and_zero_and_twice_the_text_is_no_better(text):
    (once,), (twice,) = repetition(["p"], [text], [{}]), repetition(["p"], [f"{text} {text}"], [{}])
    assert -1 < twice <= once <= 0


def test_length_falls_from_the_target_to_the_limit():
    lengths = [0, 60, 80, 85, 90, 100, 120]
    np.testing.assert_allclose(soft_overlong_punishment(lengths, 80, 100), [0, 0, 0, -0.25, -0.5, -1, -1])


@given(st.integers(0, 50), st.integers(1, 50), st.lists(st.integers(0, 200), min_size=2))
def test_longer_is_never_better(target, room, lengths):
    values = soft_overlong_punishment(sorted(lengths), target, target + room)
    assert np.all(np.diff(values) <= 0)
    assert np.all((values >= -1) & (values <= 0))
