"""Generation: prefill the prompts, then decode in jitted chunks of several steps over an explicit cache.

Prompts of different lengths share a batch: they are padded on the right to a common bucket, and generated tokens follow
in common cache slots; positions and segments keep the padding invisible. Each row draws from a random key of its own,
so a prompt gives the same completion alone and among others.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minillm_jax.cache import KVCache, init_cache, place_cache
from minillm_jax.config import ComputeConfig, ModelConfig
from minillm_jax.losses import logprobs_from_logits
from minillm_jax.model import Params, compute_dtype, forward_hidden, unembed
from minillm_jax.sampling import SamplingArrays, SamplingParams, penalize_repetition, sample, sampling_arrays
from minillm_jax.sharding import constrain, data_parallelism, mesh_of, on_mesh_of

CHUNK = 16
"""Decode steps per call of the device: enough to hide Python, few enough to stream smoothly."""
SHRINKING_CHUNK = 8
"""The same where ended rows are left behind after a chunk."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Everything one decode step reads and writes.

    Attributes:
        cache: keys and values so far.
        logits: `[B, V]` float32, of the next token.
        positions: `[B]` position of the next token.
        done: `[B]` bool, rows that ended.
        seen: `[B, V]` bool, tokens of prompt and completion; `[B, 0]` when no row penalises repetition.
        keys: `[B]` one random key a row.
        step: scalar, tokens drawn so far.
    """

    cache: KVCache
    logits: jax.Array
    positions: jax.Array
    done: jax.Array
    seen: jax.Array
    keys: jax.Array
    step: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "cache_length", "track_seen", "compute"))
def prefill(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    *,
    cache_length: int,
    track_seen: bool,
    compute: ComputeConfig,
) -> DecodeState:
    """Read right-padded prompts.

    Args:
        params: model parameters.
        config: the model's shape.
        tokens: `[B, T]` prompts, padded on the right.
        lengths: `[B]` real tokens of each; a row of length 0 is a filler and starts out done.
        keys: `[B]` random keys.
        cache_length: slots S of the cache.
        track_seen: whether some row penalises repetition.
        compute: dtype and attention implementation.
    """
    batch, length = tokens.shape
    real = jnp.arange(length)[None, :] < lengths[:, None]
    cache = init_cache(config, batch, cache_length, compute_dtype(compute))
    output = forward_hidden(params, config, tokens, segment_ids=real.astype(jnp.int32), cache=cache, compute=compute)
    last = jnp.take_along_axis(output.hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    assert output.cache is not None
    seen = jnp.zeros((batch, config.vocab_size if track_seen else 0), bool)
    if track_seen:
        seen = seen.at[jnp.arange(batch)[:, None], tokens].max(real)
    logits = _whole_rows(unembed(params, config, last))
    return DecodeState(output.cache, logits, lengths, lengths == 0, seen, keys, jnp.zeros((), jnp.int32))


def _whole_rows(logits: jax.Array) -> jax.Array:
    """Gather the logits `[B, V]` of a row on one device: every mesh then adds up probabilities in the same order."""
    return constrain(logits, "batch", None)


@functools.partial(jax.jit, static_argnames=("config", "steps", "compute", "tempered"), donate_argnames=("state",))
def decode_chunk(
    params: Params,
    config: ModelConfig,
    state: DecodeState,
    settings: SamplingArrays,
    eos_token_ids: jax.Array,
    *,
    steps: int,
    compute: ComputeConfig,
    tempered: bool = False,
) -> tuple[DecodeState, jax.Array, jax.Array]:
    """Draw `steps` tokens a row, or fewer once all rows are done: a chunk that nobody needs costs nothing.

    Args:
        params: model parameters.
        config: the model's shape.
        state: from `prefill` or the chunk before; donated.
        settings: sampling settings of each row.
        eos_token_ids: `[B, n]` tokens that end a row; -1 where there is none.
        steps: tokens to draw.
        compute: dtype and attention implementation.
        tempered: see Returns.

    Returns:
        The next state; tokens `[B, steps]`, -1 after a row's end; and their float32 log-probabilities `[B, steps]`
        under the model itself, before temperature, penalties and filters, or if `tempered` after temperature alone.
    """
    heat = jnp.where(settings.temperature > 0, settings.temperature, 1.0)[:, None]

    def body(state: DecodeState) -> tuple[DecodeState, jax.Array, jax.Array]:
        logits = state.logits
        if state.seen.shape[1]:
            logits = penalize_repetition(logits, state.seen, settings.repetition_penalty)
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, state.step)
        tokens = sample(logits, keys, settings)
        logprobs = logprobs_from_logits(state.logits / heat if tempered else state.logits, tokens)
        emitted = jnp.where(state.done, -1, tokens)
        done = state.done | (tokens[:, None] == eos_token_ids).any(-1)
        output = forward_hidden(
            params,
            config,
            tokens[:, None],
            positions=state.positions[:, None],
            segment_ids=(~state.done).astype(jnp.int32)[:, None],
            cache=state.cache,
            compute=compute,
        )
        assert output.cache is not None
        seen = state.seen
        if seen.shape[1]:
            seen = seen.at[jnp.arange(tokens.shape[0]), tokens].set(True)
        next_logits = _whole_rows(unembed(params, config, output.hidden[:, 0]))
        next_state = DecodeState(output.cache, next_logits, state.positions + 1, done, seen, state.keys, state.step + 1)
        return next_state, emitted, logprobs

    def draw(carry: tuple[jax.Array, DecodeState, jax.Array, jax.Array]) -> tuple[Any, ...]:
        i, state, tokens, logprobs = carry
        state, token, logprob = body(state)
        return i + 1, state, tokens.at[:, i].set(token), logprobs.at[:, i].set(logprob)

    shape = (state.done.shape[0], steps)
    start = (jnp.int32(0), state, jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32))
    _, state, tokens, logprobs = jax.lax.while_loop(
        lambda carry: (carry[0] < steps) & ~carry[1].done.all(), draw, start
    )
    return state, tokens, logprobs


def bucket(length: int, smallest: int = 32) -> int:
    """Round a length up to the next of 32, 48, 64, 96, 128, …, so that few shapes are ever compiled."""
    size = smallest
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def row_keys(prompts: Sequence[Sequence[int]], seed: int) -> jax.Array:
    """One random key a prompt: it depends on the seed, the prompt and how often it came before, not on the batch."""
    count: Counter[bytes] = Counter()
    labels = []
    for prompt in prompts:
        data = np.asarray(prompt, np.int32).tobytes()
        labels.append((zlib.crc32(data), count[data]))
        count[data] += 1
    fold = jax.vmap(jax.random.fold_in)
    keys = jnp.broadcast_to(jax.random.key(seed), len(prompts))
    for part in np.asarray(labels, np.uint32).T:
        keys = fold(keys, part)
    return keys


def check_prompts(prompts: Sequence[Sequence[int]], config: ModelConfig, max_new_tokens: int) -> np.ndarray:
    """Refuse prompts that cannot be read, and return how many new tokens `[B]` the context leaves to each.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, or no room for a single new token.
    """
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty; give at least one token")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(f"prompt {i} holds a token id outside the vocabulary of {config.vocab_size}")
        if len(prompt) >= config.max_position_embeddings:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; with max_position_embeddings "
                f"{config.max_position_embeddings} there is no room for an answer"
            )
    return np.minimum(max_new_tokens, config.max_position_embeddings - np.asarray([len(prompt) for prompt in prompts]))


def equal_neighbours(prompts: Sequence[Sequence[int]]) -> int:
    """Return the largest n such that prompts come n equal ones at a time; their beginning is then read once."""
    n, run = 0, 0
    for i, prompt in enumerate(prompts):
        if i and prompt != prompts[i - 1]:
            n, run = math.gcd(n, run), 0
        run += 1
    return math.gcd(n, run)


@jax.jit
def take_rows(state: DecodeState, rows: jax.Array, keys: jax.Array) -> DecodeState:
    """Take `[n]` of the rows, some perhaps several times, and give them random keys `[n]`."""
    return DecodeState(
        place_cache(
            KVCache(
                k=state.cache.k[:, rows],
                v=state.cache.v[:, rows],
                positions=state.cache.positions[rows],
                segment_ids=state.cache.segment_ids[rows],
                index=state.cache.index,
            )
        ),
        _whole_rows(state.logits[rows]),
        state.positions[rows],
        state.done[rows],
        state.seen[rows],
        keys,
        state.step,
    )


def decode_stream(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    eos_token_ids: Sequence[int],
    *,
    seed: int = 0,
    compute: ComputeConfig = ComputeConfig(),
    tempered: bool = False,
    shrink: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Generate chunk by chunk for a batch of prompts; log-probabilities are those of `decode_chunk`.

    Where the parameters lie on a mesh, rows are split over its devices, and so is the cache. The tokens are those that
    one device draws, as far as rounding lets two tokens' probabilities be told apart.

    Either the next chunk is dispatched before the last one is read, so that the device does not wait for the consumer,
    or with `shrink` rows that have ended are left behind once they are three quarters of the batch. The latter suits
    large batches that nobody watches; each size is compiled once.

    Yields:
        Tokens `[B, n]` int32, -1 after a row's end or last position, and their log-probabilities `[B, n]`.

    Raises:
        ValueError: see `check_prompts`.
    """
    budgets = check_prompts(prompts, config, sampling.max_new_tokens)
    budget, rows = int(budgets.max()), len(prompts)
    chunk = min(SHRINKING_CHUNK if shrink else CHUNK, bucket(budget, smallest=1))
    chunks = -(-budget // chunk)
    state = _read_prompts(params, config, prompts, sampling, seed, chunks * chunk, compute)
    batch = state.done.shape[0]
    ends = [-1] if sampling.ignore_eos or not eos_token_ids else list(eos_token_ids)

    def dispatch(state: DecodeState) -> tuple[DecodeState, tuple[jax.Array, ...]]:
        size = state.done.shape[0]
        with on_mesh_of(params):
            eos = jnp.broadcast_to(jnp.asarray(ends, jnp.int32), (size, len(ends)))
            state, drawn, logprobs = decode_chunk(
                params, config, state, sampling_arrays([sampling] * size), eos,
                steps=chunk, compute=compute, tempered=tempered,
            )  # fmt: skip
            return state, (drawn, logprobs, jnp.copy(state.done))

    place = np.arange(batch)  # where in the whole batch the rows stand that are still decoded
    state, current = dispatch(state)
    for i in range(chunks):
        pending = current
        if not shrink and i + 1 < chunks:
            state, current = dispatch(state)
        drawn, logprobs, done = jax.device_get(pending)
        counts = np.arange(i * chunk, min((i + 1) * chunk, budget)) + 1  # tokens drawn so far
        within = counts <= budgets[:, None]
        tokens = np.full((batch, chunk), -1, np.int32)
        values = np.zeros((batch, chunk), np.float32)
        tokens[place], values[place] = drawn, logprobs
        yield np.where(within, tokens[:rows, : len(counts)], -1), values[:rows, : len(counts)]
        ended = done | (place >= rows) | (counts[-1] >= np.append(budgets, np.zeros(batch - rows, int))[place])
        if ended.all():
            return
        if shrink and i + 1 < chunks:
            kept = np.argsort(ended, kind="stable")[: _shrunk(len(ended), int((~ended).sum()))]
            if len(kept) < len(place):
                with on_mesh_of(params):
                    state, place = take_rows(state, kept, state.keys[kept]), place[kept]
            state, current = dispatch(state)


def _shrunk(size: int, live: int) -> int:
    """Size of a batch of which only some rows are live: a quarter, as often as they fit."""
    while live <= size // 4:
        size //= 4
    return size


def _read_prompts(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    seed: int,
    room: int,
    compute: ComputeConfig,
) -> DecodeState:
    """Prefill prompts, each repeated one once, and leave room for new tokens; fillers at the end round the batch up."""
    copies = equal_neighbours(prompts)
    different = prompts[::copies]
    mesh = mesh_of(params)
    ways = 1 if mesh is None else data_parallelism(mesh)
    ways //= math.gcd(ways, copies)  # rows of the whole batch are to be a multiple of the devices
    fillers = ways * -(-bucket(len(different), smallest=1) // ways) - len(different)
    width = min(bucket(max(map(len, prompts))), config.max_position_embeddings)
    tokens = np.zeros((len(different) + fillers, width), np.int32)
    for i, prompt in enumerate(different):
        tokens[i, : len(prompt)] = prompt
    lengths = np.asarray([len(p) for p in different] + [0] * fillers, np.int32)
    with on_mesh_of(params):
        keys = row_keys([*prompts, *[()] * (copies * fillers)], seed)
        state = prefill(
            params, config, tokens, lengths, keys[::copies],
            cache_length=bucket(width + room),  # shared by prompt widths, so decoding is compiled less often
            track_seen=sampling.repetition_penalty != 1.0,
            compute=compute,
        )  # fmt: skip
        return state if copies == 1 else take_rows(state, np.repeat(np.arange(len(lengths)), copies), keys)
