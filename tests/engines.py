"""What tests of the serving engine share: a tiny model, an engine of it, and ways to ask for completions."""

import threading

import jax
import numpy as np

from minillm_jax.config import ModelConfig
from minillm_jax.lm import LanguageModel
from minillm_jax.model import forward, init_params
from minillm_jax.tokenizer import MissingTokenizer
from serve.client import generate as events_of
from serve.engine import Engine, EngineConfig
from serve.protocol import Finished, PromptRead, Tokens

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
CONTEXT = 200
SMALL = EngineConfig(slots=4, context=CONTEXT, chunk=4, prefill_piece=32, piece_sizes=2)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, VOCAB, n).tolist() for n in (1, 5, 16, 33, 70, 150)]
NEW = 21


def model(config=DENSE, ends=()):
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    return LanguageModel(config, params, MissingTokenizer.for_model(VOCAB, ends))


def started(lm, config=SMALL, **more):
    engine = Engine(lm, config, **more)
    engine.start(wait=True)
    return engine


def complete(engine, request):
    """All events of one request, the tokens in one piece: what was read, tokens with log-probabilities, the end."""
    read, *drawn, last = list(events_of(engine, request))
    assert isinstance(read, PromptRead) and isinstance(last, Finished)
    assert all(isinstance(event, Tokens) for event in drawn)
    logprobs = tuple(entry for event in drawn for entry in event.logprobs)
    return read, Tokens(tuple(t for event in drawn for t in event.token_ids), logprobs), last


def drawn(engine, request):
    """The tokens of one request."""
    return list(complete(engine, request)[1].token_ids)


def together(engine, requests):
    """Tokens of requests that are submitted at once."""
    results = [None] * len(requests)

    def run(i):
        results[i] = drawn(engine, requests[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def next_logits(lm, tokens):
    """Logits `[T, V]` after each token; later tokens change nothing, so rows are padded to one length."""
    padded = np.zeros((1, CONTEXT), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(forward(lm.params, lm.config, padded))[0, : len(tokens)]
