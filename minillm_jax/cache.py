"""The key-value cache: a pytree that the model takes and returns.

Every slot remembers the position and segment of the token written there, so attention masks itself and padded
prompts, left or right, need no other bookkeeping: padding is written too, but belongs to segment 0 and is never seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from minillm_jax.config import ModelConfig
from minillm_jax.sharding import constrain

BRANCH = 1 << 16
"""Segment ids are smaller than this; branch n of segment s has the id s + n * BRANCH, see `attention`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers, with what is needed to mask them.

    Attributes:
        k: `[L, B, K, S, H]` keys, already rotated. Slots lie next to the head size, as the decoding product reads them.
        v: `[L, B, K, S, H]` values.
        positions: `[B, S]` position of each slot's token.
        segment_ids: `[B, S]` segment of each slot's token; 0 marks a slot that nothing may attend to.
        index: scalar, the slot that the next token is written to, the same for all rows.
    """

    k: jax.Array
    v: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    index: jax.Array


def init_cache(config: ModelConfig, batch_size: int, max_length: int, dtype: jnp.dtype | type = jnp.float32) -> KVCache:
    """Make an empty cache of `max_length` slots for `batch_size` rows; on a mesh, split like the rows and heads."""
    shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length, config.head_size)
    slots = jnp.zeros((batch_size, max_length), jnp.int32)
    return place_cache(
        KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), slots, slots, jnp.zeros((), jnp.int32))
    )


def place_cache(cache: KVCache) -> KVCache:
    """Pin a cache's layout on a mesh, see `sharding.constrain`."""
    return KVCache(
        k=constrain(cache.k, "layers", "batch", "kv_heads", None, None),
        v=constrain(cache.v, "layers", "batch", "kv_heads", None, None),
        positions=constrain(cache.positions, "batch", None),
        segment_ids=constrain(cache.segment_ids, "batch", None),
        index=cache.index,
    )


def write_slots(cache: KVCache, positions: jax.Array, segment_ids: jax.Array) -> KVCache:
    """Record the tokens about to be written: their `[B, T]` positions and segments, from `index` on."""
    start = (0, cache.index)
    return KVCache(
        k=cache.k,
        v=cache.v,
        positions=jax.lax.dynamic_update_slice(cache.positions, positions.astype(jnp.int32), start),
        segment_ids=jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids.astype(jnp.int32), start),
        index=cache.index + positions.shape[1],
    )


def write_layer(buffer: jax.Array, new: jax.Array, layer: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Write one layer's keys or values in place.

    Args:
        buffer: `[L, B, K, S, H]`.
        new: `[B, K, T, H]`.
        layer: scalar index into L.
        start: scalar slot of the first token.

    Returns:
        The updated buffer, and this layer's `[B, K, S, H]` part of it.
    """
    update = new.astype(buffer.dtype)[None]  # [1, B, K, T, H]
    zero = jnp.zeros((), jnp.int32)
    buffer = jax.lax.dynamic_update_slice(buffer, update, (layer, zero, zero, start, zero))
    return buffer, jax.lax.dynamic_index_in_dim(buffer, layer, keepdims=False)
