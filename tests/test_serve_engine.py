"""The engine against `minillm_jax.generate`: one request, many, of all lengths, in any order."""

import dataclasses
import threading

import jax
import numpy as np
import pytest

from minillm_jax.config import ModelConfig, RopeScaling
from minillm_jax.lm import LanguageModel, generate
from minillm_jax.model import init_params
from minillm_jax.sampling import SamplingParams
from minillm_jax.tokenizer import MissingTokenizer
from serve.engine import Engine, EngineConfig
from serve.engine import generate as events_of
from serve.protocol import Finished, PromptRead, Request, Tokens

VOCAB = 97
DENSE = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=32,
    initializer_range=0.2,
)
SMALL = EngineConfig(slots=4, context=200, chunk=4, prefill_piece=32)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, VOCAB, n).tolist() for n in (1, 5, 16, 33, 70, 150)]
NEW = 21


def model(config: ModelConfig, ends=()) -> LanguageModel:
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    return LanguageModel(config, params, MissingTokenizer.for_model(VOCAB, ends))


def started(lm: LanguageModel, config: EngineConfig = SMALL) -> Engine:
    engine = Engine(lm, config)
    engine.start(wait=True)
    return engine


def complete(engine, request):
    """All tokens of one request, and its last event."""
    events = list(events_of(engine, request))
    assert isinstance(events[0], PromptRead) and sum(isinstance(e, Finished) for e in events) == 1
    return [t for e in events if isinstance(e, Tokens) for t in e.token_ids], events[-1]


def together(engine, requests):
    """Tokens of requests that are submitted at once."""
    results = [None] * len(requests)

    def run(i):
        results[i] = complete(engine, requests[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture(scope="module")
def engine():
    engine = started(model(DENSE))
    yield engine
    assert engine.drain(5)
    assert engine.stats().compilations == 0


def greedy(lm, prompts, new=NEW):
    return [c.token_ids for c in generate(lm, prompts, SamplingParams(new, temperature=0.0, ignore_eos=True))]


@pytest.mark.parametrize(
    "config",
    [
        DENSE,
        dataclasses.replace(DENSE, use_moe=True, num_experts=3),
        dataclasses.replace(DENSE, tie_word_embeddings=False, use_qk_norm=True, attention_bias=True),
        dataclasses.replace(DENSE, rope_scaling=RopeScaling(factor=4.0, original_max_position_embeddings=32)),
    ],
    ids=["dense", "moe", "untied-qknorm-bias", "yarn"],
)
def test_greedy_tokens_are_those_of_generate(config):
    lm = model(config)
    engine = started(lm)
    requests = [Request(prompt, NEW, temperature=0.0) for prompt in PROMPTS]
    for (tokens, last), expected in zip(together(engine, requests), greedy(lm, PROMPTS), strict=True):
        assert tokens == expected
        assert last == Finished("length")
    assert engine.drain(5)
    assert engine.stats().compilations == 0


def test_a_seeded_request_draws_the_same_alone_and_among_others(engine):
    asked = Request(PROMPTS[2], NEW, temperature=0.9, top_p=0.95, seed=2**40 + 7)
    alone, _ = complete(engine, asked)
    others = [Request(p, 5 + 3 * i, temperature=1.0, top_k=3 * i, seed=i) for i, p in enumerate(PROMPTS * 2)]
    for at in (0, 5, len(others)):
        assert together(engine, [*others[:at], asked, *others[at:]])[at][0] == alone
    assert complete(engine, dataclasses.replace(asked, seed=8))[0] != alone
