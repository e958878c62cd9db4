"""Beginnings that were read before are not read again, and nothing else changes."""

import numpy as np
import pytest
from engines import PROMPTS, RNG, VOCAB, complete, model, next_logits, started
from hypothesis import given
from hypothesis import strategies as st

from serve.protocol import Request
from serve.slots import Slots, common_prefix

FIRST = PROMPTS[4]  # 70 tokens


@pytest.fixture
def engine():
    engine = started(model())
    yield engine
    assert engine.drain(5)


def follow(engine, prompt, new=9):
    read, got, _ = complete(engine, Request(prompt, new, temperature=0.0, logprobs=5))
    return read.cached_tokens, got


def same(got, expected):
    assert got.token_ids == expected.token_ids
    for a, b in zip(got.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose([v for _, v in a.top], [v for _, v in b.top], atol=1e-5)


def test_a_conversation_goes_on_where_it_ended(engine):
    cached, answer = follow(engine, FIRST)
    assert cached == 0
    longer = [*FIRST, *answer.token_ids, *PROMPTS[2]]
    cached, reused = follow(engine, longer)
    assert cached == len(FIRST) + len(answer.token_ids)
    fresh = started(model())
    assert follow(fresh, longer)[0] == 0
    same(reused, follow(started(model()), longer)[1])
    logits = next_logits(model(), [*longer, *reused.token_ids])[len(longer) - 1 : -1]
    assert list(reused.token_ids) == logits.argmax(-1).tolist()


def test_the_same_prompt_again_reads_one_token(engine):
    first = follow(engine, FIRST)[1]
    cached, again = follow(engine, FIRST)
    assert cached == len(FIRST) - 1
    same(again, first)


def test_a_shared_beginning_is_copied_and_its_owner_kept(engine):
    system = FIRST[:40]
    one, two = [*system, *PROMPTS[3]], [*system, *PROMPTS[3][::-1]]
    _, answer = follow(engine, [*one, *PROMPTS[2], *PROMPTS[2]], new=30)
    cached, got = follow(engine, two)
    assert cached == 40
    assert list(got.token_ids) == greedy(two, 9)
    cached, _ = follow(engine, [*one, *PROMPTS[2], *PROMPTS[2], *answer.token_ids, 1])
    assert cached == len(one) + 32 + 30


def greedy(prompt, new):
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(int(next_logits(model(), tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def test_more_conversations_than_slots_evict_the_oldest(engine):
    conversations = [RNG.integers(0, VOCAB, 40).tolist() for _ in range(5)]
    for prompt in conversations:
        assert follow(engine, prompt)[0] <= 1
    assert follow(engine, conversations[4])[0] == 39
    assert follow(engine, conversations[0])[0] <= 1
    assert engine.stats().cached_tokens >= 39


def test_slots_are_taken_over_copied_or_begun_afresh():
    slots = Slots(2, worth_reuse=3)
    first = slots.take([1, 2, 3, 4, 5, 6], 0)
    assert (first.slot.tokens, first.source) == ([], None)
    first.slot.tokens = [1, 2, 3, 4, 5, 6]
    busy = slots.take([1, 2, 3, 9, 9], 0)  # the first is in use: copied
    assert (busy.slot.tokens, busy.source) == ([1, 2, 3], first.slot.number)
    assert slots.take([1], 0) is None
    slots.give_back(first.slot)
    other = slots.take([1, 2, 3, 4, 5, 6], 1)  # read with another adapter: of no use
    assert (other.slot.tokens, other.source) == ([], None)


@given(st.lists(st.integers(0, 2), max_size=9), st.lists(st.integers(0, 2), max_size=9))
def test_common_prefix_is_the_longest(a, b):
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n in (len(a), len(b)) or a[n] != b[n]
