from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm_jax.data.documents import Documents
from minillm_jax.data.packing import concatenate_plans, gather_rows, plan_packing, split_documents

LENGTHS = st.lists(st.integers(0, 40), max_size=60)
SEQ_LEN = st.integers(1, 16)


def make_documents(lengths: list[int], masked: bool = False, chunks: int = 3) -> Documents:
    """Make documents whose tokens are all different, spread over several chunks; every third token is trained."""
    flat = np.arange(1, sum(lengths) + 1, dtype=np.int32)
    chunk = np.arange(len(lengths), dtype=np.int32) * chunks // max(1, len(lengths))
    begin = np.cumsum(lengths) - lengths if lengths else np.zeros(0, np.int64)
    tokens, masks, start = [], [], np.zeros(len(lengths), np.int64)
    for c in range(chunks):
        here = np.flatnonzero(chunk == c)
        first, last = (begin[here[0]], begin[here[-1]] + lengths[here[-1]]) if len(here) else (0, 0)
        tokens.append(flat[first:last])
        masks.append((flat[first:last] % 3 == 0).astype(np.uint8))
        start[here] = begin[here] - first
    return Documents(tuple(tokens), tuple(masks) if masked else None, chunk, start, np.array(lengths, np.int64))


def document_tokens(documents: Documents, d: int) -> list[int]:
    start = documents.start[d]
    return documents.tokens[documents.chunk[d]][start : start + documents.length[d]].tolist()


def all_pairs(documents: Documents) -> list[tuple[int, int]]:
    texts = [document_tokens(documents, d) for d in range(len(documents))]
    return [pair for text in texts for pair in pairwise(text)]


def rows_by_best_fit_decreasing(lengths: np.ndarray, seq_len: int) -> int:
    """Count the rows of the textbook algorithm, one piece at a time."""
    _, start, stop = split_documents(lengths, seq_len)
    space: list[int] = []
    for size in sorted(stop - start - 1, reverse=True):
        fitting = [i for i, left in enumerate(space) if left >= size]
        if fitting:
            space[min(fitting, key=lambda i: space[i])] -= size
        else:
            space.append(seq_len - size)
    return len(space)


@settings(deadline=None, derandomize=True)
@given(LENGTHS, SEQ_LEN)
def test_every_input_target_pair_occurs_exactly_once(lengths, seq_len):
    documents = make_documents(lengths)
    plan = plan_packing(documents.length, seq_len)
    batch = gather_rows(documents, plan, range(len(plan)))
    real = batch["segment_ids"] > 0
    pairs = list(zip(batch["tokens"][real].tolist(), batch["targets"][real].tolist(), strict=True))
    assert sorted(pairs) == sorted(all_pairs(documents))
    assert plan.tokens == len(pairs)


@settings(deadline=None, derandomize=True)
@given(LENGTHS, SEQ_LEN)
def test_a_segment_is_one_stretch_of_one_document_and_its_positions_start_at_zero(lengths, seq_len):
    documents = make_documents(lengths)
    plan = plan_packing(documents.length, seq_len)
    batch = gather_rows(documents, plan, range(len(plan)))
    for row in range(len(plan)):
        ids = batch["segment_ids"][row]
        segments = ids.max()
        assert segments >= 1
        filled = np.count_nonzero(ids)
        assert np.all(np.diff(ids[:filled]) >= 0)  # in order, and padding only at the end
        for segment in range(1, segments + 1):
            here = ids == segment
            tokens, positions = batch["tokens"][row][here], batch["positions"][row][here]
            assert positions.tolist() == list(range(len(tokens)))
            assert np.all(np.diff(tokens) == 1)  # documents count upwards, so a stretch does too
            assert np.all(batch["targets"][row][here] == tokens + 1)


@settings(deadline=None, derandomize=True)
@given(LENGTHS, SEQ_LEN)
def test_padding_is_zero_everywhere(lengths, seq_len):
    documents = make_documents(lengths)
    plan = plan_packing(documents.length, seq_len)
    batch = gather_rows(documents, plan, range(len(plan)))
    padding = batch["segment_ids"] == 0
    assert all(not array[padding].any() for array in batch.values())


@settings(deadline=None, derandomize=True)
@given(LENGTHS, SEQ_LEN)
def test_weights_are_the_mask_of_the_targets(lengths, seq_len):
    documents = make_documents(lengths, masked=True)
    plan = plan_packing(documents.length, seq_len)
    batch = gather_rows(documents, plan, range(len(plan)))
    real = batch["segment_ids"] > 0
    np.testing.assert_array_equal(batch["weights"][real], batch["targets"][real] % 3 == 0)
    assert batch["weights"].sum() == documents.trained_tokens().sum()


@settings(deadline=None, derandomize=True)
@given(LENGTHS, SEQ_LEN)
def test_without_a_mask_every_pair_has_weight_one(lengths, seq_len):
    documents = make_documents(lengths)
    plan = plan_packing(documents.length, seq_len)
    batch = gather_rows(documents, plan, range(len(plan)))
    np.testing.assert_array_equal(batch["weights"], batch["segment_ids"] > 0)
    assert batch["weights"].sum() == documents.trained_tokens().sum()


@settings(deadline=None, derandomize=True)
@given(LENGTHS, SEQ_LEN)
def test_neighbouring_pieces_share_one_token_and_join_to_the_document(lengths, seq_len):
    document, start, stop = split_documents(np.array(lengths, np.int64), seq_len)
    for d, length in enumerate(lengths):
        pieces = list(zip(start[document == d].tolist(), stop[document == d].tolist(), strict=True))
        if length < 2:
            assert pieces == []
            continue
        assert pieces[0][0] == 0
        assert pieces[-1][1] == length
        assert all(left[1] - 1 == right[0] for left, right in pairwise(pieces))
        assert all(1 <= last - first - 1 <= seq_len for first, last in pieces)


@settings(deadline=None, derandomize=True)
@given(LENGTHS, SEQ_LEN)
def test_the_plan_needs_no_more_rows_than_best_fit_decreasing_one_by_one(lengths, seq_len):
    array = np.array(lengths, np.int64)
    assert len(plan_packing(array, seq_len)) == rows_by_best_fit_decreasing(array, seq_len)


def test_planning_twice_gives_the_same_plan():
    lengths = np.random.default_rng(0).integers(2, 300, 2000)
    first, second = plan_packing(lengths, 128), plan_packing(lengths, 128)
    for name in ("row_splits", "document", "start", "stop", "offset"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("seq_len", [512, 4096])
def test_rows_of_many_short_documents_are_nearly_full(seq_len):
    lengths = np.random.default_rng(0).integers(2, 200, 200_000)
    plan = plan_packing(lengths, seq_len)
    assert plan.fill > 0.999
    assert plan.tokens == (lengths - 1).sum()


def test_a_row_written_out():
    documents = make_documents([3, 1, 4], chunks=2)  # tokens 1 2 3 | 4 | 5 6 7 8
    plan = plan_packing(documents.length, 6)
    (tokens, targets, weights, segments, positions) = (
        gather_rows(documents, plan, [0])[name][0].tolist()
        for name in ("tokens", "targets", "weights", "segment_ids", "positions")
    )
    assert tokens == [5, 6, 7, 1, 2, 0]
    assert targets == [6, 7, 8, 2, 3, 0]
    assert weights == [1, 1, 1, 1, 1, 0]
    assert segments == [1, 1, 1, 2, 2, 0]
    assert positions == [0, 1, 2, 0, 1, 0]


@settings(deadline=None, derandomize=True)
@given(LENGTHS, LENGTHS, SEQ_LEN)
def test_concatenated_plans_give_the_rows_of_each(first, second, seq_len):
    documents = make_documents(first + second)
    parts = [documents.take(np.arange(len(first))), documents.take(np.arange(len(first), len(first + second)))]
    plans = [plan_packing(part.length, seq_len) for part in parts]
    joint = concatenate_plans(plans, [len(part) for part in parts])
    separate = [gather_rows(part, plan, range(len(plan)))["tokens"] for part, plan in zip(parts, plans, strict=True)]
    np.testing.assert_array_equal(gather_rows(documents, joint, range(len(joint)))["tokens"], np.concatenate(separate))
