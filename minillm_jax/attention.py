"""Attention over packed, padded and cached tokens, behind one signature.

A query sees a key when both belong to the same non-zero segment and the key's position is not later. A segment may have
branches, whose ids are the segment's plus a multiple of `BRANCH`: they see the segment itself and their own tokens, not
one another, so that several continuations of a text can share its beginning in one row. Implementations
differ in speed only. The `xla` one works on blocks of queries and recomputes their probabilities in the backward pass
(FlashAttention, arXiv:2205.14135), so that the scores of a long row never exist at once; without a cache, keys to the
right of a block are not read at all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from minillm_jax.cache import BRANCH

QUERY_BLOCK = 128
CHECKPOINT_NAME = "attention"
"""What attention saves for its backward pass bears this name, so that rematerialisation can keep it."""
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Score of a hidden key. Finite, so that a row of padding averages its keys instead of giving NaN."""


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segment_ids: jax.Array,
    kv_segment_ids: jax.Array,
    causal_layout: bool,
    impl: str = "auto",
) -> jax.Array:
    """Scaled dot-product attention with grouped heads (arXiv:2305.13245).

    Args:
        q: `[B, T, N, H]` queries.
        k: `[B, K, S, H]` keys; K divides N.
        v: `[B, K, S, H]` values.
        q_positions: `[B, T]` position of each query within its segment.
        kv_positions: `[B, S]` position of each key.
        q_segment_ids: `[B, T]` segment of each query, 0 for padding.
        kv_segment_ids: `[B, S]` segment of each key, 0 for padding and empty cache slots.
        causal_layout: S equals T and no query needs a key of a later index: true for rows of tokens, false with a
            cache.
        impl: `auto` or `xla`.

    Returns:
        `[B, T, N, H]` in the dtype of `q`.
    """
    if impl not in ("auto", "xla"):
        raise ValueError(f"attention_impl {impl!r} is unknown; choose auto or xla")
    batch, length, heads, size = q.shape
    groups = k.shape[1]
    scaled = (q * (1.0 / math.sqrt(size))).reshape(batch, length, groups, heads // groups, size)
    grouped = scaled.transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    out = _xla(causal_layout, grouped, k, v, q_positions, kv_positions, q_segment_ids, kv_segment_ids)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, size)


def _blocks(causal_layout: bool, length: int, keys: int) -> Iterator[tuple[slice, slice]]:
    """Slices of queries, and of the keys that they may see."""
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        yield slice(start, stop), slice(0, stop if causal_layout else keys)


def _rows(x: jax.Array, rows: slice) -> jax.Array:
    """One block of queries with its heads stacked: `[B, K, G, T, H]` to `[B, K, G * t, H]`."""
    batch, groups, _, _, size = x.shape
    return x[:, :, :, rows].reshape(batch, groups, -1, size)


def _scores(
    q: jax.Array, k: jax.Array, per_head: int, q_pos: jax.Array, k_pos: jax.Array, q_seg: jax.Array, k_seg: jax.Array
) -> jax.Array:
    """Masked float32 scores `[B, K, G * t, s]` of stacked queries `[B, K, G * t, H]` and keys `[B, K, s, H]`."""
    own, trunk, key = q_seg[:, :, None], (q_seg & (BRANCH - 1))[:, :, None], k_seg[:, None, :]
    same = (own == key) | (trunk == key)
    visible = same & (k_pos[:, None, :] <= q_pos[:, :, None]) & (key > 0)  # [B, t, s]
    batch, length, keys = visible.shape
    visible = jnp.broadcast_to(visible[:, None, None], (batch, 1, per_head, length, keys))
    scores = jnp.einsum("bkqh,bksh->bkqs", q, k, preferred_element_type=jnp.float32)
    return jnp.where(visible.reshape(batch, 1, per_head * length, keys), scores, MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _xla(causal_layout: bool, q: jax.Array, k: jax.Array, v: jax.Array, *masks: jax.Array) -> jax.Array:
    return _xla_fwd(causal_layout, q, k, v, *masks)[0]


def _xla_fwd(
    causal_layout: bool,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_pos: jax.Array,
    k_pos: jax.Array,
    q_seg: jax.Array,
    k_seg: jax.Array,
) -> tuple[jax.Array, Any]:
    """Return `[B, K, G, T, H]` outputs, and with the inputs the log-partition of every query for the way back."""
    batch, groups, per_head, length, size = q.shape
    outputs, partitions = [], []
    for rows, keys in _blocks(causal_layout, length, k.shape[2]):
        scores = _scores(
            _rows(q, rows), k[:, :, keys], per_head, q_pos[:, rows], k_pos[:, keys], q_seg[:, rows], k_seg[:, keys]
        )
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        out = jnp.einsum("bkqs,bksh->bkqh", weights.astype(v.dtype), v[:, :, keys], preferred_element_type=jnp.float32)
        outputs.append((out / total).astype(q.dtype).reshape(batch, groups, per_head, -1, size))
        partitions.append(checkpoint_name(top + jnp.log(total), CHECKPOINT_NAME))
    out = checkpoint_name(jnp.concatenate(outputs, axis=3), CHECKPOINT_NAME)
    return out, (q, k, v, q_pos, k_pos, q_seg, k_seg, out, partitions)


def _xla_bwd(causal_layout: bool, residuals: Any, grad: jax.Array) -> tuple[Any, ...]:
    q, k, v, q_pos, k_pos, q_seg, k_seg, out, partitions = residuals
    batch, groups, per_head, length, size = q.shape
    dk, dv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dq = []
    for (rows, keys), partition in zip(_blocks(causal_layout, length, k.shape[2]), partitions, strict=True):
        q_rows, grad_rows = _rows(q, rows), _rows(grad, rows)
        scores = _scores(
            q_rows, k[:, :, keys], per_head, q_pos[:, rows], k_pos[:, keys], q_seg[:, rows], k_seg[:, keys]
        )
        probs = jnp.exp(scores - partition)  # [B, K, G * t, s]
        mean = (grad_rows * _rows(out, rows)).astype(jnp.float32).sum(-1, keepdims=True)
        dprobs = jnp.einsum("bkqh,bksh->bkqs", grad_rows, v[:, :, keys], preferred_element_type=jnp.float32)
        dscores = (probs * (dprobs - mean)).astype(q.dtype)
        add = functools.partial(jnp.einsum, "bkqs,bkqh->bksh", preferred_element_type=jnp.float32)
        dv = dv.at[:, :, keys].add(add(probs.astype(v.dtype), grad_rows))
        dk = dk.at[:, :, keys].add(add(dscores, q_rows))
        dq.append(jnp.einsum("bkqs,bksh->bkqh", dscores, k[:, :, keys]).reshape(batch, groups, per_head, -1, size))
    return jnp.concatenate(dq, axis=3), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None, None


_xla.defvjp(_xla_fwd, _xla_bwd)
