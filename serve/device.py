"""What the engine runs on the device: few programs, all compiled before the first request, over one state.

`Device` holds parameters and state; its methods take and return numpy arrays of a few numbers a row, and none of them
waits for a result. Batches are padded to a few sizes, prompts are read in pieces of a few sizes, and whatever else
varies (steps, lengths, settings) is data, so that the list of programs is short and nothing is ever compiled later.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from minillm_jax.config import ComputeConfig, ModelConfig
from minillm_jax.decoding import choose, forward_slots, unembed_slots
from minillm_jax.model import Params, compute_dtype
from minillm_jax.sampling import Penalties, SamplingArrays, penalize, sample
from minillm_jax.sharding import mesh_of, on_mesh_of
from minillm_jax.slots import BLOCK, SlotCache, copy_slot, init_fresh, init_slots, store

TOP = 20
"""Most alternatives whose log-probabilities can be asked for."""


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
class Piece:
    """What reading one piece of P tokens gave: the sum `[D]` of its hidden states, log-probabilities `[P]` if asked."""

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
    slot: jax.Array,
    start: jax.Array,
    count: jax.Array,
    score: jax.Array,
    adapter: jax.Array,
    *,
    config: ModelConfig,
    compute: ComputeConfig,
) -> tuple[State, Piece]:
    """Read a piece of a prompt into a slot, behind what it holds; the slot can then be decoded.

    Args:
        params: from `decoding.split_layers`.
        state: donated.
        tokens: `[P]`, padded on the right.
        targets: `[P]` the tokens that follow them, whose log-probabilities are meant by `score`.
        slot: scalar.
        start: scalar, tokens that the slot holds.
        count: scalar, real tokens of the piece.
        score: scalar bool.
        adapter: scalar, number of the adapter.
        config: the model's shape.
        compute: dtype.
    """
    params = choose(params, adapter)
    rows, lengths = slot[None], start[None]

    def run(_: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        hidden, fresh = forward_slots(
            params, config, tokens[None], cache=state.cache, fresh=carry[1], rows=rows, lengths=lengths,
            index=jnp.zeros((), jnp.int32), blocks=_blocks(lengths), compute=compute,
        )  # fmt: skip
        return hidden[0], fresh

    # A loop of one iteration, whose number XLA cannot know: it keeps all reading of the cache before the writing, which
    # otherwise goes to a copy of it.
    hidden = jnp.zeros((tokens.shape[0], config.hidden_size), compute_dtype(compute))  # [P, D]
    fresh = init_fresh(state.cache, 1, tokens.shape[0])
    hidden, fresh = jax.lax.fori_loop(0, jnp.minimum(count, 1), run, (hidden, fresh))
    real = jnp.arange(tokens.shape[0]) < count

    def scored() -> Logprobs:
        return token_logprobs(unembed_slots(params, config, hidden), targets, score)

    shapes = jax.eval_shape(scored)
    logprobs = jax.lax.cond(score, scored, lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))
    last = unembed_slots(params, config, hidden[count - 1][None])[0]
    scratch = state.done.shape[0] - 1
    state = replace(
        state,
        cache=store(state.cache, fresh, rows, lengths),
        logits=state.logits.at[slot].set(last),
        done=state.done.at[slot].set(slot == scratch),
    )
    total = jnp.where(real[:, None], hidden.astype(jnp.float32), 0.0).sum(0)
    return state, Piece(total, logprobs)


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
    """
    params = choose(params, rows.adapters)
    batch = rows.slots.shape[0]
    keys = jax.vmap(_row_key)(rows.seeds)
    ends = jnp.asarray(eos_token_ids, jnp.int32)
    blocks = _blocks(rows.lengths)
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
            lengths=rows.lengths, index=i, blocks=blocks, compute=compute,
        )  # fmt: skip
        each = jnp.arange(batch)
        ended = (tokens[:, None] == ends).any(-1) & ~rows.ignore_eos
        return {
            "steps": i + 1,
            "fresh": fresh,
            "logits": unembed_slots(params, config, hidden[:, 0]),
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


def _options(program: str, size: int) -> dict[str, str] | None:
    """Options of the compiler for one program.

    On CPU XLA hands products to YNNPACK, which packs all weights anew for each: worth it where many rows use them,
    while XLA's own products are up to 1.8 times as fast for 4 to 32 rows.
    """
    few_rows = program == "decode" and 1 < size <= 64
    return {"xla_cpu_experimental_ynn_fusion_type": ""} if few_rows and jax.default_backend() == "cpu" else None


class Device:
    """Parameters, state and compiled programs. Only the engine's thread calls it.

    Args:
        config: the model's shape.
        params: from `decoding.split_layers`.
        eos_token_ids: tokens that end a completion.
        slots: completions decoded at once.
        length: tokens of the cache a slot.
        chunk: most steps of one call of `decode`.
        pieces: sizes of the pieces that prompts are read in, rising.
        batches: sizes of decoding batches, rising; the last is `slots`.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        eos_token_ids: Sequence[int],
        *,
        slots: int,
        length: int,
        chunk: int,
        pieces: Sequence[int],
        batches: Sequence[int],
    ) -> None:
        self.config, self.params, self.slots, self.chunk = config, params, slots, chunk
        self.pieces, self.batches = tuple(pieces), tuple(batches)
        compute = ComputeConfig()
        self._mesh = mesh_of(params)
        with on_mesh_of(params):
            make = jax.jit(init_state, static_argnums=(0, 1, 2, 3))
            self._state = make(config, slots, length, compute_dtype(compute))
        everything = {b: np.ones((b, config.vocab_size), bool) for b in batches}
        # On a mesh the programs say where it lies, and moving what lies elsewhere would be compiled at the first call.
        self._allowed = everything if self._mesh is not None else jax.device_put(everything)
        read = functools.partial(read_piece, config=config, compute=compute)
        draw = functools.partial(
            decode, config=config, compute=compute, chunk=chunk, eos_token_ids=tuple(eos_token_ids)
        )
        zero = np.zeros((), np.int32)
        row = np.zeros(config.vocab_size)
        with on_mesh_of(params):
            lowered = {("read", p): self._lower(read, 1, *self._piece_arguments(p)) for p in pieces}
            lowered |= {("decode", b): self._lower(draw, 1, *self._decode_arguments(b)) for b in batches}
            lowered[("set", 0)] = self._lower(set_row, 0, self._state, zero, row.astype(bool), row.astype(np.float32))
            lowered[("copy", 0)] = self._lower(copy_row, 0, self._state, zero, zero)
        with ThreadPoolExecutor(2) as pool:
            compiled = pool.map(lambda name: lowered[name].compile(_options(*name)), lowered)
            self._programs: dict[tuple[str, int], Any] = dict(zip(lowered, compiled, strict=True))

    def read(self, tokens: np.ndarray, targets: np.ndarray, slot: int, start: int, score: bool, adapter: int) -> Piece:
        """Read up to the largest piece of tokens into a slot that holds `start`; see `read_piece`."""
        size = next(p for p in self.pieces if p >= len(tokens))
        padded = np.zeros((2, size), np.int32)
        padded[0, : len(tokens)], padded[1, : len(targets)] = tokens, targets
        numbers = (np.int32(slot), np.int32(start), np.int32(len(tokens)), np.bool_(score), np.int32(adapter))
        self._state, piece = self._programs[("read", size)](self.params, self._state, *padded, *numbers)
        return piece

    def decode(self, rows: Rows, steps: int, mask: np.ndarray | None = None) -> Chunk:
        """Draw up to `steps` tokens for rows that fill one of the batch sizes; see `decode`."""
        batch = len(rows.slots)
        allowed = self._allowed[batch] if mask is None else mask
        self._state, chunk = self._programs[("decode", batch)](
            self.params, self._state, rows, allowed, np.bool_(mask is not None), np.int32(steps)
        )
        return chunk

    def set_row(self, slot: int, seen: np.ndarray, bias: np.ndarray) -> None:
        """Prepare a slot for penalties; see `set_row`."""
        self._state = self._programs[("set", 0)](self._state, np.int32(slot), seen, bias)

    def copy_row(self, source: int, target: int) -> None:
        """Copy what one slot has read to another."""
        self._state = self._programs[("copy", 0)](self._state, np.int32(source), np.int32(target))

    def _lower(self, function: Callable[..., Any], donated: int, *arguments: Any) -> Any:
        """Lower a program whose state comes out as it went in; what else it returns lies on every device of a mesh."""
        if self._mesh is None:
            return jax.jit(function, donate_argnums=donated).lower(*arguments)
        state = jax.tree.map(lambda leaf: leaf.sharding, self._state)
        out = state if donated == 0 else (state, NamedSharding(self._mesh, PartitionSpec()))
        return jax.jit(function, donate_argnums=donated, out_shardings=out).lower(*arguments)

    def _piece_arguments(self, size: int) -> tuple[Any, ...]:
        zero, tokens = np.zeros((), np.int32), np.zeros(size, np.int32)
        return self.params, self._state, tokens, tokens, zero, zero, zero, np.zeros((), bool), zero

    def _decode_arguments(self, batch: int) -> tuple[Any, ...]:
        zero = np.zeros((), np.int32)
        return self.params, self._state, filler_rows(batch, self.slots), self._allowed[batch], np.zeros((), bool), zero


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
