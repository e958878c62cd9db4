"""The key-value cache of a server: one row per conversation, each of a length of its own.

What has been read lies in `SlotCache`; the tokens of the present call lie in `Fresh`, a small buffer that all rows
write at one common index, and move to each row's own place once, at the end. So a decoding loop never scatters, and
reads the large cache only as far as its longest row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from minillm_jax.attention import MASKED
from minillm_jax.config import ModelConfig
from minillm_jax.matmul import batched_product
from minillm_jax.sharding import constrain

BLOCK = 128
"""Stored keys of one iteration of attention: few enough that a short row reads little, enough for a good product."""

_Partial = tuple[jax.Array, jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotCache:
    """Keys and values of all slots, an array a layer, so that no layer's is cut out of a larger one.

    Attributes:
        k: L arrays `[slots, K, H, S]` of keys, already rotated, each token's a column: the product with a query then
            reads them in the order in which they lie. S is a multiple of `BLOCK`.
        v: L arrays `[slots, K, S, H]` of values.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fresh:
    """Keys and values of tokens that are not in their slots yet.

    Attributes:
        k: L arrays `[B, K, H, C]`.
        v: L arrays `[B, K, C, H]`.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerSlots:
    """What attention of one layer needs to know: the stored and the fresh, and which row reads what.

    Attributes:
        k: `[slots, K, H, S]`, read only; likewise v, `[slots, K, S, H]`.
        v: see k.
        fresh_k: `[B, K, H, C]`.
        fresh_v: `[B, K, C, H]`.
        rows: `[B]` slot of each row.
        lengths: `[B]` stored tokens of each row.
        blocks: scalar, blocks of stored tokens that the longest row has.
        index: scalar, place in the fresh buffer of the call's first token.
        segment_ids: `[B, T]`, where the call's tokens are several texts, each of which sees itself alone; what is
            stored is the beginning of those numbered 1. None: all are.
        picked: `[P]` places of the call's tokens whose outputs are wanted, which suffices in the last layer. None: all.
    """

    k: jax.Array
    v: jax.Array
    fresh_k: jax.Array
    fresh_v: jax.Array
    rows: jax.Array
    lengths: jax.Array
    blocks: jax.Array
    index: jax.Array
    segment_ids: jax.Array | None = None
    picked: jax.Array | None = None

    def pick(self, x: jax.Array) -> jax.Array:
        """Take the picked tokens, `[B, P, ...]`, out of `[B, T, ...]`."""
        return x if self.picked is None else x[:, self.picked]

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, LayerSlots]:
        """Add T tokens to the fresh ones and let them see their row's stored tokens, the fresh before, and themselves.

        Softmax is accumulated over the fresh tokens and then block by block of the stored ones (arXiv:2112.05682).

        Args:
            q: `[B, T, N, H]` queries.
            k: `[B, K, T, H]` keys.
            v: `[B, K, T, H]` values.

        Returns:
            `[B, T, N, H]`, or `[B, P, N, H]` of picked tokens, and this with all tokens added.
        """
        places = self.picked if self.picked is not None else jnp.arange(q.shape[1])
        q = self.pick(q)
        batch, length, heads, size = q.shape
        groups = k.shape[1]
        zero = jnp.zeros((), jnp.int32)
        columns, dtype = k.swapaxes(2, 3), self.fresh_k.dtype
        fresh_k = jax.lax.dynamic_update_slice(self.fresh_k, columns.astype(dtype), (zero, zero, zero, self.index))
        fresh_v = jax.lax.dynamic_update_slice(self.fresh_v, v.astype(dtype), (zero, zero, self.index, zero))
        scaled = (q * (1.0 / math.sqrt(size))).reshape(batch, length, groups, heads // groups, size)
        stacked = scaled.transpose(0, 2, 3, 1, 4).reshape(batch, groups, -1, size)  # [B, K, G * T, H]
        causal = jnp.arange(fresh_k.shape[3])[None, :] <= self.index + places[:, None]  # [T, C]
        causal, follows = causal[None], jnp.ones((1, length), bool)
        if self.segment_ids is not None:  # all fresh tokens are of this call
            segment_ids = self.pick(self.segment_ids)
            causal &= segment_ids[:, :, None] == self.segment_ids[:, None, :]
            follows = segment_ids == 1
        causal = jnp.tile(causal, (1, heads // groups, 1))[:, None]  # [B, 1, G * T, C]
        follows = jnp.tile(follows, (1, heads // groups))[:, None, :, None]  # [B, 1, G * T, 1]
        shape = stacked.shape[:-1]
        partial = (jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros(stacked.shape, jnp.float32))
        partial = _accumulate(partial, stacked, fresh_k, fresh_v, causal)

        def block(i: jax.Array, partial: _Partial) -> _Partial:
            first = i * BLOCK

            def cut(row: jax.Array) -> tuple[jax.Array, jax.Array]:
                keys = jax.lax.dynamic_slice(self.k, (row, zero, zero, first), (1, groups, size, BLOCK))
                values = jax.lax.dynamic_slice(self.v, (row, zero, first, zero), (1, groups, BLOCK, size))
                return keys[0], values[0]

            keys, values = jax.vmap(cut)(self.rows)
            visible = first + jnp.arange(BLOCK)[None, :] < self.lengths[:, None]  # [B, s]
            return _accumulate(partial, stacked, keys, values, visible[:, None, None] & follows)

        _, total, out = jax.lax.fori_loop(zero, self.blocks, block, partial)
        y = (out / total[..., None]).astype(q.dtype).reshape(batch, groups, heads // groups, length, size)
        y = y.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)
        return y, replace(self, fresh_k=fresh_k, fresh_v=fresh_v)


def _accumulate(partial: _Partial, q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> _Partial:
    """One more block of keys `[B, K, H, s]`: top score and sum `[B, K, Q]`, weighted values `[B, K, Q, H]`."""
    top, total, out = partial
    scores = batched_product(q, k)
    scores = jnp.where(visible, scores, MASKED)
    new_top = jnp.maximum(top, scores.max(-1))
    weights = jnp.exp(scores - new_top[..., None])
    shrink = jnp.exp(top - new_top)
    more = batched_product(weights.astype(v.dtype), v)
    return new_top, total * shrink + weights.sum(-1), out * shrink[..., None] + more


def init_slots(config: ModelConfig, slots: int, length: int, dtype: jnp.dtype | type = jnp.float32) -> SlotCache:
    """Make an empty cache of `slots` rows with room for `length` tokens each, rounded up to whole blocks.

    On a mesh heads are split; every data-parallel device holds all slots, since any row may be read by any.
    """
    groups, size = config.num_key_value_heads, config.head_size
    return SlotCache(*_zeros(config.num_hidden_layers, slots, groups, -(-length // BLOCK) * BLOCK, size, dtype))


def init_fresh(cache: SlotCache, rows: int, length: int) -> Fresh:
    """Make an empty buffer for `length` tokens of each of `rows` rows."""
    _, groups, _, size = cache.v[0].shape
    return Fresh(*_zeros(len(cache.v), rows, groups, length, size, cache.v[0].dtype))


def _zeros(layers: int, rows: int, groups: int, length: int, size: int, dtype: Any) -> tuple[Any, Any]:
    """Keys `[rows, K, H, length]` and values `[rows, K, length, H]` of all layers."""

    def arrays(*shape: int) -> tuple[jax.Array, ...]:
        return tuple(constrain(jnp.zeros(shape, dtype), None, "kv_heads", None, None) for _ in range(layers))

    return arrays(rows, groups, size, length), arrays(rows, groups, length, size)


def store(cache: SlotCache, fresh: Fresh, rows: jax.Array, lengths: jax.Array) -> SlotCache:
    """Move fresh tokens to their slots, behind the tokens stored there.

    All C of them are moved, used or not: what lies beyond a row's length is never seen, and is written over later.

    Args:
        cache: written in place where its buffers are donated.
        fresh: of B rows.
        rows: `[B]` slot of each row.
        lengths: `[B]` stored tokens of each; `lengths + C` must not exceed S.
    """
    zero = jnp.zeros((), jnp.int32)

    def move(i: jax.Array, cache: SlotCache) -> SlotCache:
        def write(stored: jax.Array, new: jax.Array, *place: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(stored, jax.lax.dynamic_slice_in_dim(new, i, 1), (rows[i], *place))

        return SlotCache(
            tuple(write(k, new, zero, zero, lengths[i]) for k, new in zip(cache.k, fresh.k, strict=True)),
            tuple(write(v, new, zero, lengths[i], zero) for v, new in zip(cache.v, fresh.v, strict=True)),
        )

    return jax.lax.fori_loop(0, rows.shape[0], move, cache)


def shift(fresh: Fresh, first: jax.Array) -> Fresh:
    """Bring the token at place `first` to the front, and those before it to the back."""
    return Fresh(tuple(jnp.roll(k, -first, 3) for k in fresh.k), tuple(jnp.roll(v, -first, 2) for v in fresh.v))


def copy_slot(cache: SlotCache, source: jax.Array, target: jax.Array) -> SlotCache:
    """Copy all that one slot holds to another."""

    def copy(stored: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(
            stored, jax.lax.dynamic_slice_in_dim(stored, source, 1), target, axis=0
        )

    return SlotCache(tuple(map(copy, cache.k)), tuple(map(copy, cache.v)))
