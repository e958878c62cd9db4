"""The engine against `minillm_jax.generate`: one request, many, of all lengths, in any order, and how they end."""

import dataclasses

import jax
import numpy as np
import pytest
from engines import CONTEXT, DENSE, NEW, PROMPTS, SMALL, VOCAB, complete, drawn, model, next_logits, started, together

from minillm_jax.config import RopeScaling
from minillm_jax.lm import generate
from minillm_jax.model import forward_hidden
from minillm_jax.sampling import SamplingParams
from serve.device import Device
from serve.engine import Engine
from serve.protocol import Finished, Request, Tokens


@pytest.fixture(scope="module")
def engine():
    engine = started(model())
    yield engine
    assert engine.drain(5)


def greedy(lm, prompts, new=NEW):
    return [c.token_ids for c in generate(lm, prompts, SamplingParams(new, temperature=0.0, ignore_eos=True))]


@pytest.mark.parametrize(
    "config",
    [
        DENSE,
        pytest.param(dataclasses.replace(DENSE, use_moe=True, num_experts=3), marks=pytest.mark.slow),
        dataclasses.replace(DENSE, tie_word_embeddings=False, use_qk_norm=True, attention_bias=True),
        dataclasses.replace(DENSE, rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=32)),
    ],
    ids=["dense", "moe", "untied-qknorm-bias", "yarn"],
)
def test_greedy_tokens_are_those_of_generate(config):
    lm = model(config)
    engine = started(lm)
    assert together(engine, [Request(p, NEW, temperature=0.0) for p in PROMPTS]) == greedy(lm, PROMPTS)
    assert engine.drain(5)
    assert engine.stats().compilations == 0


def test_a_seeded_request_draws_the_same_alone_and_among_others(engine):
    asked = Request(PROMPTS[2], NEW, temperature=0.9, top_p=0.95, seed=2**40 + 7)
    alone = drawn(engine, asked)
    others = [Request(p, 5 + 3 * i, temperature=1.0, top_k=3 * i, seed=i) for i, p in enumerate(PROMPTS * 2)]
    for at in (0, 5, len(others)):
        assert together(engine, [*others[:at], asked, *others[at:]])[at] == alone
    assert drawn(engine, dataclasses.replace(asked, seed=8)) != alone
    assert drawn(engine, dataclasses.replace(asked, seed=7)) != alone  # the upper half of the seed counts


def test_draws_follow_the_models_distribution(engine):
    logits = np.asarray(greedy_logits(engine, PROMPTS[1]))
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    tokens = [t for (t,) in together(engine, [Request(PROMPTS[1], 1, seed=seed) for seed in range(200)])]
    top = int(expected.argmax())
    share, spread = expected[top], np.sqrt(expected[top] * (1 - expected[top]) / 200)
    assert abs(np.mean(np.asarray(tokens) == top) - share) < 4 * spread
    assert len(set(tokens)) > 5


def greedy_logits(engine, prompt):
    """Log-probabilities of the next token, put together from requests that allow one token each."""
    (entry,) = complete(engine, Request(prompt, 1, temperature=0.0, logprobs=20))[1].logprobs
    values = np.full(VOCAB, -30.0)
    for token, logprob in entry.top:
        values[token] = logprob
    return values


def test_an_end_token_ends_its_request_alone():
    free = greedy(model(), PROMPTS)
    end = free[0][3]
    lm = model(ends=[end])
    engine = started(lm)
    requests = [Request(p, NEW, temperature=0.0) for p in PROMPTS]
    for request, tokens in zip(requests, free, strict=True):
        stops = end in tokens
        _, got, last = complete(engine, request)
        assert list(got.token_ids) == (tokens[: tokens.index(end) + 1] if stops else tokens)
        assert last == Finished("stop" if stops else "length")
    assert together(engine, [dataclasses.replace(r, ignore_eos=True) for r in requests]) == free
    assert engine.drain(5)


def test_a_completion_ends_with_the_context(engine):
    prompt = PROMPTS[5] + PROMPTS[4][:47]
    _, got, last = complete(engine, Request(prompt, NEW, temperature=0.0))
    assert (len(prompt) + len(got.token_ids), last) == (CONTEXT, Finished("length"))
    assert list(got.token_ids) == greedy(model(), [prompt], 3)[0]


def test_no_new_tokens_only_reads(engine):
    _, got, last = complete(engine, Request(PROMPTS[4], 0))
    assert (got.token_ids, last) == ((), Finished("length"))


def test_embeddings_are_mean_hidden_states(engine):
    lm = model()
    rows = engine.embed(PROMPTS)
    for row, prompt in zip(rows, PROMPTS, strict=True):
        hidden = forward_hidden(lm.params, lm.config, np.asarray([prompt])).hidden[0]
        np.testing.assert_allclose(row, hidden.mean(0), atol=1e-5)
    assert engine.embed([]).shape == (0, DENSE.hidden_size)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 3), "token_ids is empty"),
        (Request([VOCAB], 3), "0 … 96"),
        (Request([-1], 3), "0 … 96"),
        (Request([1] * CONTEXT, 3), "leave no room for an answer"),
        (Request([1] * (CONTEXT + 1), 0), "exceed the context of 200"),
        (Request([1], -1), "max_new_tokens must not be negative"),
        (Request([1], 3, temperature=float("nan")), "temperature must be a number"),
        (Request([1], 3, top_p=0.0), r"top_p must lie in \(0, 1\]"),
        (Request([1], 3, logprobs=21), r"logprobs must lie in \[0, 20\]"),
        (Request([1], 3, logit_bias={VOCAB: 1.0}), "logit_bias: 97 is no token"),
        (Request([1], 3, logit_bias={5: float("-inf")}), "logit_bias: the bias of token 5 must be a finite number"),
        (Request([1], 3, adapter="x"), "adapter 'x' is unknown; there are: none"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(engine, request_, message):
    with pytest.raises(ValueError, match=message):
        engine.submit(request_, print)


def test_nothing_is_compiled_while_serving(engine):
    def requests():
        for i, prompt in enumerate(PROMPTS * 2):
            yield Request(
                prompt,
                i % 4 * 5,
                temperature=i % 3 / 2,
                top_p=0.9 if i % 2 else 1.0,
                frequency_penalty=0.3 * (i % 5 == 0),
                logit_bias={3: 1.0} if i % 7 == 0 else {},
                logprobs=i if i % 4 == 0 else None,
                prompt_logprobs=i % 6 == 0,
            )

    together(engine, list(requests()))
    engine.embed(PROMPTS[:2])
    assert engine.stats().compilations == 0
    assert engine.stats().generated_tokens > 0


@pytest.mark.parametrize(("sizes", "expected"), [(8, tuple(range(4, 33, 4))), (3, (11, 22, 32)), (1, (32,))])
def test_pieces_have_sizes_in_equal_steps(sizes, expected, monkeypatch):
    monkeypatch.setattr("serve.engine.Device", lambda *_, pieces, **__: tuple(pieces))
    assert Engine(model(), dataclasses.replace(SMALL, piece_sizes=sizes))._compile() == expected


def reads(engine, requests, monkeypatch):
    """Submit requests before the engine starts; returns what each piece held, and the events of each request."""
    pieces, answers = [], [[] for _ in requests]
    read = Device.read

    def count(self, tokens, targets, segments, **asked):
        pieces.append([n for n in segments.counts.tolist() if n])
        return read(self, tokens, targets, segments, **asked)

    monkeypatch.setattr(Device, "read", count)
    for request, answer in zip(requests, answers, strict=True):
        engine.submit(request, answer.append)
    engine.start(wait=True)
    assert engine.drain(60)
    return pieces, answers


def tokens_of(answers):
    return [[t for event in events if isinstance(event, Tokens) for t in event.token_ids] for events in answers]


def test_prompts_that_wait_are_read_together(monkeypatch):
    lm = model()
    prompts = [PROMPTS[i] for i in (2, 1, 3, 0)]  # 16, 5, 33, 1 tokens, in pieces of up to 32
    requests = [Request(p, NEW, temperature=0.0) for p in prompts]
    pieces, answers = reads(Engine(lm, SMALL), requests, monkeypatch)
    assert pieces == [[16, 5, 11], [22, 1]]
    assert tokens_of(answers) == greedy(lm, prompts)


def test_prompts_that_begin_alike_are_read_one_after_the_other(monkeypatch):
    lm = model()
    prompts = [PROMPTS[4], PROMPTS[4][:40] + PROMPTS[3], PROMPTS[4][:40] + PROMPTS[2]]
    config = dataclasses.replace(SMALL, prefill_piece=128)
    requests = [Request(p, NEW, temperature=0.0) for p in prompts]
    pieces, answers = reads(Engine(lm, config), requests, monkeypatch)
    assert sum(map(sum, pieces)) == 70 + 33 + 16
    assert tokens_of(answers) == greedy(lm, prompts)


def test_only_those_who_ask_get_the_log_probabilities_of_their_prompt(monkeypatch):
    lm = model()
    asked = [False, True, False]
    prompts = [PROMPTS[1], PROMPTS[2], PROMPTS[1][::-1]]
    requests = [
        Request(p, 1, prompt_logprobs=a, logprobs=2 if a else None) for p, a in zip(prompts, asked, strict=True)
    ]
    pieces, answers = reads(Engine(lm, SMALL), requests, monkeypatch)
    assert pieces == [[5, 16, 5]]
    first, second, third = (events[0].logprobs for events in answers)
    assert (first, third) == ((), ())
    expected = jax.nn.log_softmax(next_logits(lm, prompts[1]))[np.arange(15), prompts[1][1:]]
    np.testing.assert_allclose([entry.logprob for entry in second[1:]], expected, atol=1e-5)
    assert len(second) == 16 and second[0].logprob is None
