"""What a request may ask for beyond plain sampling: penalties, biases, log-probabilities and constraints."""

import jax
import numpy as np
import pytest
from engines import NEW, PROMPTS, VOCAB, complete, drawn, model, next_logits, started, together

from serve.protocol import Finished, Request

PROMPT = PROMPTS[1]


@pytest.fixture(scope="module")
def lm():
    return model()


@pytest.fixture(scope="module")
def engine(lm):
    engine = started(lm)
    yield engine
    assert engine.drain(5)
    assert engine.stats().compilations == 0


def penalised(lm, repetition=1.0, presence=0.0, frequency=0.0, bias=None, allowed=None):
    """Greedy tokens by whole forward passes."""
    tokens = list(PROMPT)
    for step in range(NEW):
        logits = next_logits(lm, tokens)[-1]
        seen = np.isin(np.arange(VOCAB), tokens)
        counts = np.bincount(tokens[len(PROMPT) :], minlength=VOCAB)
        logits = np.where(seen, np.where(logits > 0, logits / repetition, logits * repetition), logits)
        logits = logits - presence * (counts > 0) - frequency * counts
        for token, value in (bias or {}).items():
            logits[token] += value
        if allowed is not None:
            logits[~allowed(step)] = -np.inf
        tokens.append(int(logits.argmax()))
    return tokens[len(PROMPT) :]


SETTINGS = [
    {"repetition": 1.5},
    {"presence": 1.2},
    {"frequency": 0.7},
    {"repetition": 1.1, "presence": 0.4, "frequency": 0.2, "bias": {5: 3.0, 9: -2.0}},
    {"bias": {7: 2.5}},
]


def asked(repetition=1.0, presence=0.0, frequency=0.0, bias=None, **more):
    return Request(
        PROMPT,
        NEW,
        temperature=0.0,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias or {},
        **more,
    )


def test_penalties_and_biases_equal_adjusted_forward_passes(lm, engine):
    plain = penalised(lm)
    expected = [penalised(lm, **settings) for settings in SETTINGS]
    assert all(tokens != plain for tokens in expected)
    requests = [asked(**settings) for settings in SETTINGS]
    assert [drawn(engine, request) for request in requests] == expected
    assert together(engine, [*requests, asked(), *requests]) == [*expected, plain, *expected]


def test_logprobs_are_the_models_own_with_the_likeliest_beside_them(lm, engine):
    request = asked(repetition=1.5, logprobs=3)
    _, got, _ = complete(engine, request)
    logits = next_logits(lm, [*PROMPT, *got.token_ids])[len(PROMPT) - 1 : -1]
    expected = np.asarray(jax.nn.log_softmax(logits))
    for entry, token, row in zip(got.logprobs, got.token_ids, expected, strict=True):
        assert entry.token == token
        np.testing.assert_allclose(entry.logprob, row[token], atol=1e-5)
        assert [t for t, _ in entry.top] == np.argsort(-row)[:3].tolist()
        np.testing.assert_allclose([value for _, value in entry.top], np.sort(row)[::-1][:3], atol=1e-5)
    assert complete(engine, asked())[1].logprobs == ()
    assert complete(engine, asked(logprobs=0))[1].logprobs[0].top == ()


def test_prompts_are_scored(lm, engine):
    prompt = PROMPTS[4]  # several pieces
    drawn(engine, Request(prompt, 1))  # read before, which must change nothing
    read, got, last = complete(engine, Request(prompt, 0, logprobs=2, prompt_logprobs=True))
    assert (got.token_ids, last, read.cached_tokens) == ((), Finished("length"), 0)
    expected = np.asarray(jax.nn.log_softmax(next_logits(lm, prompt)))
    assert [entry.token for entry in read.logprobs] == prompt
    assert read.logprobs[0].logprob is None and read.logprobs[0].top == ()
    for i, entry in enumerate(read.logprobs[1:]):
        np.testing.assert_allclose(entry.logprob, expected[i, prompt[i + 1]], atol=1e-5)
        assert [token for token, _ in entry.top] == np.argsort(-expected[i])[:2].tolist()


class Alternate:
    """Allows even and odd tokens in turns, and ends after some."""

    def __init__(self, length=10**9):
        self.pushed, self.length = [], length

    def mask(self):
        return np.arange(VOCAB) % 2 == len(self.pushed) % 2

    def push(self, token):
        self.pushed.append(token)

    @property
    def ended(self):
        return len(self.pushed) == self.length


def test_a_constraint_masks_its_own_row_and_no_other(lm, engine):
    expected = penalised(lm, allowed=lambda step: np.arange(VOCAB) % 2 == step % 2)
    plain = penalised(lm)
    constraint = Alternate()
    got = together(engine, [asked(), asked(constraint=constraint), asked(), asked(constraint=Alternate())])
    assert got == [plain, expected, plain, expected]
    assert constraint.pushed == expected


def test_the_end_of_a_constraint_ends_its_request(engine):
    _, got, last = complete(engine, asked(constraint=Alternate(length=7)))
    assert (len(got.token_ids), last) == (7, Finished("stop"))


class Broken(Alternate):
    """Fails in one of its methods after some tokens, or allows nothing."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def mask(self):
        if self.how == "mask" and len(self.pushed) == 3:
            raise RuntimeError("no mask today")
        return super().mask() & (self.how != "none" or len(self.pushed) < 3)

    def push(self, token):
        super().push(token)
        if self.how == "push" and len(self.pushed) == 3:
            raise RuntimeError("no push today")


@pytest.mark.parametrize(
    ("how", "detail"), [("mask", "no mask today"), ("push", "no push today"), ("none", "no token")]
)
def test_a_constraint_that_fails_ends_its_request_alone(lm, engine, how, detail):
    _, got, last = complete(engine, asked(constraint=Broken(how)))
    assert len(got.token_ids) == 3
    assert last.reason == "error" and detail in last.detail
    assert drawn(engine, asked()) == penalised(lm)
