"""What a server runs on its device: pure functions over one state, each compiled once for each of a few sizes.

Whatever else varies (steps, lengths, settings, which segments a piece holds) is data, so that the list of programs is
short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minillm_jax.config import ComputeConfig, ModelConfig
from minillm_jax.decoding import choose, forward_slots, unembed_slots
from minillm_jax.model import Params, compute_dtype
from minillm_jax.rope import rope_tables
from minillm_jax.sampling import Penalties, SamplingArrays, penalize, sample
from minillm_jax.slots import BLOCK, Fresh, SlotCache, copy_slot, init_fresh, init_slots, shift, store

TOP = 20
"""Most alternatives whose log-probabilities can be asked for."""
SEGMENTS = 8
"""Most prompts, or parts of them, in one piece."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything that stays on the device between programs. There is one slot more than requests get: a scratch slot.

    Attributes:
        cache: keys and values.
        logits: `[slots + 1, V]` float32, of each slot's next token.
        counts: `[slots + 1, V]` int32, how often the completion holds a token.
        seen: `[slots + 1, V]` bool, tokens of prompt and completion.
        bias: `[slots + 1, V]` float32, added to logits.
        done: `[slots + 1]` bool, slots whose completion has drawn an end token, and the scratch slot.
    """

    cache: SlotCache
    logits: jax.Array
    counts: jax.Array
    seen: jax.Array
    bias: jax.Array
    done: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """The rows of one decoding batch; every array has one entry a row.

    Attributes:
        slots: int32, the scratch slot for fillers.
        lengths: int32, tokens that the slot holds.
        drawn: int32, tokens of the completion so far.
        seeds: `[B, 2]` uint32.
        sampling: temperature and filters.
        penalties: what makes tokens less likely; of rows without any, counts and bias in the state mean nothing.
        ignore_eos: bool, go on after an end token.
        logprobs: bool, whether log-probabilities are asked for.
        adapters: int32, number of the adapter; 0 for none.
    """

    slots: Any
    lengths: Any
    drawn: Any
    seeds: Any
    sampling: SamplingArrays
    penalties: Penalties
    ignore_eos: Any
    logprobs: Any
    adapters: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities `[…]` of tokens, and the `TOP` likeliest tokens' `[…, TOP]` with their ids."""

    own: jax.Array
    top: jax.Array
    ids: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunk:
    """What one call of decoding drew: tokens `[C, B]` of which `steps` are meant, and log-probabilities if asked."""

    tokens: jax.Array
    logprobs: Logprobs
    steps: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Segments:
    """What a piece holds: prompts, or parts of them, one behind the other; every array has `SEGMENTS` entries, int32.

    Attributes:
        slots: where each is read into.
        starts: tokens that the slot holds; only the first segment may follow any.
        counts: tokens of each; 0 for fillers, which come last.
    """

    slots: Any
    starts: Any
    counts: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Piece:
    """What reading one piece of P tokens gave.

    Attributes:
        hidden: `[SEGMENTS, D]` float32, the sum of each segment's final hidden states, if asked.
        logprobs: `[P]`, if asked.
    """

    hidden: jax.Array
    logprobs: Logprobs


def init_state(config: ModelConfig, slots: int, length: int, dtype: Any) -> State:
    """Make the state of an idle engine, with room for `length` tokens a slot."""
    rows, vocab = slots + 1, config.vocab_size
    return State(
        cache=init_slots(config, rows, length, dtype),
        logits=jnp.zeros((rows, vocab), jnp.float32),
        counts=jnp.zeros((rows, vocab), jnp.int32),
        seen=jnp.zeros((rows, vocab), bool),
        bias=jnp.zeros((rows, vocab), jnp.float32),
        done=jnp.ones(rows, bool),
    )


def token_logprobs(logits: jax.Array, tokens: jax.Array, wanted: jax.Array) -> Logprobs:
    """Log-probabilities of `[N]` tokens under `[N, V]` logits; zeros, at no cost, unless `wanted`."""
    count, top = tokens.shape[0], min(TOP, logits.shape[-1])

    def compute() -> Logprobs:
        logprobs = jax.nn.log_softmax(logits)
        values, ids = jax.lax.top_k(logprobs, top)
        return Logprobs(jnp.take_along_axis(logprobs, tokens[:, None], -1)[:, 0], values, ids)

    def nothing() -> Logprobs:
        return Logprobs(jnp.zeros(count), jnp.zeros((count, top)), jnp.zeros((count, top), jnp.int32))

    return jax.lax.cond(wanted, compute, nothing)


def read_piece(
    params: Params,
    state: State,
    tokens: jax.Array,
    targets: jax.Array,
    segments: Segments,
    score: jax.Array,
    whole: jax.Array,
    adapter: jax.Array,
    *,
    config: ModelConfig,
    compute: ComputeConfig,
) -> tuple[State, Piece]:
    """Read segments into their slots, behind what those hold; each can then be decoded.

    Args:
        params: from `decoding.split_layers`.
        state: donated.
        tokens: `[P]`, padded on the right.
        targets: `[P]` the tokens that follow them, whose log-probabilities are meant by `score`.
        segments: whose tokens these are.
        score: scalar bool.
        whole: scalar bool, whether all hidden states are wanted, for `score` or their sum, or only each segment's last.
        adapter: scalar, number of the adapter.
        config: the model's shape.
        compute: dtype.
    """
    params = choose(params, adapter)
    size = tokens.shape[0]
    ends = jnp.cumsum(segments.counts)
    firsts = ends - segments.counts
    place = jnp.arange(size)
    member = (place[:, None] >= firsts) & (place[:, None] < ends)  # [P, SEGMENTS]
    segment_ids = jnp.where(member, 1 + jnp.arange(SEGMENTS), 0).sum(-1)
    positions = place + jnp.where(member, segments.starts - firsts, 0).sum(-1)
    rope = rope_tables(positions[None], config)
    rows, lengths = segments.slots[:1], segments.starts[:1]

    def run() -> tuple[jax.Array, Fresh]:
        hidden, fresh = forward_slots(
            params, config, tokens[None], cache=state.cache, fresh=init_fresh(state.cache, 1, size), rows=rows,
            lengths=lengths, index=jnp.zeros((), jnp.int32), blocks=_blocks(lengths), rope=rope,
            segment_ids=segment_ids[None], picked=ends - 1, whole=whole, compute=compute,
        )  # fmt: skip
        return hidden[0], fresh

    def nothing() -> tuple[jax.Array, Fresh]:
        return jnp.zeros((size, config.hidden_size), compute_dtype(compute)), init_fresh(state.cache, 1, size)

    # A condition that always holds, which XLA cannot know: it keeps all reading of the cache before the writing, which
    # otherwise goes to a copy of it.
    hidden, fresh = jax.lax.cond(ends[-1] > 0, run, nothing)  # [P, D]

    def scored() -> Logprobs:
        return token_logprobs(unembed_slots(params, config, hidden), targets, score)

    shapes = jax.eval_shape(scored)
    logprobs = jax.lax.cond(score, scored, lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))
    scratch = state.done.shape[0] - 1

    def keep(i: jax.Array, state: State) -> State:
        slot = segments.slots[i]
        last = jax.lax.dynamic_slice_in_dim(hidden, ends[i] - 1, 1)
        return replace(
            state,
            cache=store(state.cache, shift(fresh, firsts[i]), slot[None], segments.starts[i][None]),
            logits=state.logits.at[slot].set(unembed_slots(params, config, last)[0]),
            done=state.done.at[slot].set(slot == scratch),
        )

    state = jax.lax.fori_loop(0, (segments.counts > 0).sum(), keep, state)
    return state, Piece(member.T.astype(jnp.float32) @ hidden.astype(jnp.float32), logprobs)


def decode(
    params: Params,
    state: State,
    rows: Rows,
    mask: jax.Array,
    constrained: jax.Array,
    steps: jax.Array,
    *,
    config: ModelConfig,
    compute: ComputeConfig,
    chunk: int,
    eos_token_ids: tuple[int, ...],
    looped: bool,
) -> tuple[State, Chunk]:
    """Draw up to `steps` tokens a row; fewer when all rows are done.

    A step draws from the logits of the step before and reads what it drew, as in `sampler.decode_chunk`. The random
    key of a draw depends on the row's seed and the draw's number alone.

    Args:
        params: from `decoding.split_layers`.
        state: donated.
        rows: the B rows.
        mask: `[B, V]` bool, tokens that may be drawn.
        constrained: scalar bool, whether the mask is to be read.
        steps: scalar, at most `chunk`.
        config: the model's shape.
        compute: dtype.
        chunk: most steps C.
        eos_token_ids: tokens that end a row.
        looped: see `matmul.looped_products`.
    """
    params = choose(params, rows.adapters)
    batch = rows.slots.shape[0]
    keys = jax.vmap(_row_key)(rows.seeds)
    ends = jnp.asarray(eos_token_ids, jnp.int32)
    blocks = _blocks(rows.lengths)
    rope = rope_tables(rows.lengths[:, None] + jnp.arange(chunk), config)
    bias = state.bias[rows.slots]
    any_logprobs = rows.logprobs.any()

    def body(carry: dict[str, Any]) -> dict[str, Any]:
        i, logits, done = carry["steps"], carry["logits"], carry["done"]
        adjusted = penalize(logits, carry["seen"], carry["counts"], bias, rows.penalties)
        adjusted = jax.lax.cond(constrained, lambda: jnp.where(mask, adjusted, -jnp.inf), lambda: adjusted)
        tokens = sample(adjusted, jax.vmap(jax.random.fold_in)(keys, rows.drawn + i), rows.sampling)
        logprobs = token_logprobs(logits, tokens, any_logprobs)
        hidden, fresh = forward_slots(
            params, config, tokens[:, None], cache=state.cache, fresh=carry["fresh"], rows=rows.slots,
            lengths=rows.lengths, index=i, blocks=blocks, rope=jax.tree.map(lambda x: x[:, i][:, None], rope),
            compute=compute, looped=looped,
        )  # fmt: skip
        each = jnp.arange(batch)
        ended = (tokens[:, None] == ends).any(-1) & ~rows.ignore_eos
        return {
            "steps": i + 1,
            "fresh": fresh,
            "logits": unembed_slots(params, config, hidden[:, 0], looped),
            "counts": carry["counts"].at[each, tokens].add(1),
            "seen": carry["seen"].at[each, tokens].set(True),
            "done": done | ended,
            "tokens": carry["tokens"].at[i].set(tokens),
            "logprobs": jax.tree.map(lambda all_steps, step: all_steps.at[i].set(step), carry["logprobs"], logprobs),
        }

    def wide(shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.zeros((chunk, batch, *shape), dtype)

    top = min(TOP, config.vocab_size)
    carry: dict[str, Any] = {
        "steps": jnp.zeros((), jnp.int32),
        "fresh": init_fresh(state.cache, batch, chunk),
        "logits": state.logits[rows.slots],
        "counts": state.counts[rows.slots],
        "seen": state.seen[rows.slots],
        "done": state.done[rows.slots],
        "tokens": wide((), jnp.int32),
        "logprobs": Logprobs(wide((), jnp.float32), wide((top,), jnp.float32), wide((top,), jnp.int32)),
    }
    out = jax.lax.while_loop(lambda carry: (carry["steps"] < steps) & ~carry["done"].all(), body, carry)
    state = State(
        cache=store(state.cache, out["fresh"], rows.slots, rows.lengths),
        logits=state.logits.at[rows.slots].set(out["logits"]),
        counts=state.counts.at[rows.slots].set(out["counts"]),
        seen=state.seen.at[rows.slots].set(out["seen"]),
        bias=state.bias,
        done=state.done.at[rows.slots].set(out["done"]),
    )
    return state, Chunk(out["tokens"], out["logprobs"], out["steps"])


def set_row(state: State, slot: jax.Array, seen: jax.Array, bias: jax.Array) -> State:
    """Prepare a slot for penalties: tokens seen `[V]` bool in its prompt, and its bias `[V]`."""
    return replace(
        state,
        counts=state.counts.at[slot].set(0),
        seen=state.seen.at[slot].set(seen),
        bias=state.bias.at[slot].set(bias),
    )


def copy_row(state: State, source: jax.Array, target: jax.Array) -> State:
    """Copy what one slot has read to another."""
    return replace(state, cache=copy_slot(state.cache, source, target))


def _row_key(seed: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed[0]), seed[1])


def _blocks(lengths: jax.Array) -> jax.Array:
    return (jnp.max(lengths) + BLOCK - 1) // BLOCK


def filler_rows(batch: int, scratch: int) -> Rows:
    """Make rows that draw nothing, as numpy arrays to be filled in: all of the scratch slot, with neutral settings."""

    def full(value: float, dtype: Any) -> Any:
        return np.full(batch, value, dtype)

    return Rows(
        slots=full(scratch, np.int32),
        lengths=full(0, np.int32),
        drawn=full(0, np.int32),
        seeds=np.zeros((batch, 2), np.uint32),
        sampling=SamplingArrays(
            temperature=full(0, np.float32),
            top_k=full(0, np.int32),
            top_p=full(1, np.float32),
            min_p=full(0, np.float32),
            repetition_penalty=full(1, np.float32),
        ),
        penalties=Penalties(
            repetition=full(1, np.float32),
            presence=full(0, np.float32),
            frequency=full(0, np.float32),
            biased=full(0, bool),
        ),
        ignore_eos=full(0, bool),
        logprobs=full(0, bool),
        adapters=full(0, np.int32),
    )


def segments_of(segments: Sequence[tuple[int, int, int]]) -> Segments:
    """Lay slots, starts and counts of up to `SEGMENTS` segments out as numpy arrays."""
    filled = np.zeros((3, SEGMENTS), np.int32)
    filled[:, : len(segments)] = np.asarray(segments, np.int32).reshape(-1, 3).T
    return Segments(*filled)
