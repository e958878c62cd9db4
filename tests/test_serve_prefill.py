"""How prompts are cut into pieces: nothing is lost, little is filled in, and only a piece's first part goes on."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.prefill import PADDING, Part, cut, joins, piece_size

SIZES = (32, 64, 128, 256)


def live(length=10, read=0, adapter=0):
    return SimpleNamespace(prompt=list(range(length)), read=read, adapter=adapter)


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        (1, [32]),
        (32, [32]),
        (70, [64, 32]),
        (100, [128]),
        (130, [128, 32]),
        (192, [128, 64]),
        (224, [256]),
        (600, [256, 256, 64, 32]),
    ],
)
def test_prompts_are_read_in_few_pieces_with_little_padding(prompt, pieces):
    assert [size for size, _ in cut([Part(live(prompt), 0, prompt)], SIZES)] == pieces


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.integers(0, 50))
def test_every_token_is_read_once_and_in_order(lengths, start):
    parts = [Part(live(n), 0, n) for n in lengths]
    parts[0] = Part(parts[0].live, min(start, lengths[0] - 1), lengths[0])
    read = {id(part.live): part.start for part in parts}
    pieces = cut(parts, SIZES)
    for size, piece in pieces:
        assert 0 < sum(map(len, piece)) <= size
        for i, part in enumerate(piece):
            assert part.start == read[id(part.live)]
            assert i == 0 or part.start == 0
            read[id(part.live)] = part.end
    assert all(read[id(part.live)] == part.end for part in parts)
    assert sum(size for size, _ in pieces) - sum(map(len, parts)) <= PADDING


def test_no_parts_make_no_pieces():
    assert cut([], SIZES) == []


@given(st.integers(1, 2000))
def test_a_piece_has_one_of_the_sizes(remaining):
    assert piece_size(remaining, SIZES) in SIZES


def test_what_can_be_read_together():
    first = [Part(live(50, read=20), 20, 50)]
    assert joins([], live(read=20), 2)
    assert joins(first, live(), 2)
    assert not joins(first, live(read=32), 2)
    assert not joins(first, live(adapter=1), 2)
    assert not joins(first * 2, live(), 2)


def test_targets_are_the_tokens_that_follow():
    whole = live(5)
    assert Part(whole, 1, 3).targets == [2, 3]
    assert Part(whole, 3, 5).targets == [4, 0]
