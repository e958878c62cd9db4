"""What the device runs: reading a piece gives the same, whether all hidden states are wanted or only the last ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import DENSE

from minillm_jax.config import ComputeConfig
from minillm_jax.decoding import split_layers
from minillm_jax.model import forward, forward_hidden, init_params
from serve.programs import init_state, read_piece, segments_of

SIZE = 24
MOE = dataclasses.replace(DENSE, use_moe=True, num_experts=3)


def reader(config, params):
    """Return a function that reads texts into slots, behind what those hold, and the state of an idle engine."""
    compute = ComputeConfig()
    read = jax.jit(functools.partial(read_piece, config=config, compute=compute))

    def into(state, segments, texts, whole):
        tokens = np.zeros(SIZE, np.int32)
        tokens[: sum(map(len, texts))] = np.concatenate(texts)
        return read(params, state, tokens, np.roll(tokens, -1), segments_of(segments), whole, whole, np.int32(0))

    return into, init_state(config, 4, 128, jnp.float32)


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_a_piece_is_read_alike_whether_all_of_it_is_wanted_or_only_its_last_tokens(config):
    params = init_params(config, jax.random.key(0))
    into, state = reader(config, split_layers(params, config))
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, config.vocab_size, n) for n in (9, 7, 8, 3)]
    begun, _ = into(state, [(2, 0, 9)], texts[:1], np.bool_(False))
    segments = [(2, 9, 7), (0, 0, 8), (1, 0, 3)]  # the first goes on
    states, pieces = zip(*(into(begun, segments, texts[1:], np.bool_(whole)) for whole in (True, False)), strict=True)
    conversations = [np.concatenate(texts[:2]), *texts[2:]]
    for slot, text in zip((2, 0, 1), conversations, strict=True):
        expected = forward(params, config, text[None])[0, -1]
        for state in states:
            np.testing.assert_allclose(state.logits[slot], expected, atol=1e-5)
            for k, first in zip(state.cache.k, states[0].cache.k, strict=True):
                np.testing.assert_allclose(k[slot, ..., : len(text)], first[slot, ..., : len(text)], atol=1e-6)
    hidden = forward_hidden(params, config, texts[2][None]).hidden[0].sum(0)
    np.testing.assert_allclose(pieces[0].hidden[1], hidden, atol=1e-4)
    logprobs = jax.nn.log_softmax(forward(params, config, texts[2][None])[0])
    expected = np.take_along_axis(np.asarray(logprobs)[:-1], texts[2][1:, None], -1)[:, 0]
    np.testing.assert_allclose(pieces[0].logprobs.own[7:14], expected, atol=1e-5)
