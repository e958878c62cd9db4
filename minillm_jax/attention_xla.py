"""Attention in plain XLA operations: the implementation that can do everything, and that the others are held against.

It works on blocks of queries and recomputes their probabilities in the backward pass (FlashAttention,
arXiv:2205.14135), so that the scores of a long row never exist at once; without a cache, keys to the right of a block
are not read at all.
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


def visible(q_pos: jax.Array, k_pos: jax.Array, q_seg: jax.Array, k_seg: jax.Array) -> jax.Array:
    """Tell which keys `[B, S]` each query `[B, T]` sees, `[B, T, S]`: the definition, see `attention.attention`."""
    own, trunk, key = q_seg[:, :, None], (q_seg & (BRANCH - 1))[:, :, None], k_seg[:, None, :]
    return ((own == key) | (trunk == key)) & (k_pos[:, None, :] <= q_pos[:, :, None]) & (key > 0)


def xla_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, masks: tuple[jax.Array, ...], causal_layout: bool
) -> jax.Array:
    """Attend; arguments are those of `attention.attention`, with positions and segments as four masks in its order."""
    batch, length, heads, size = q.shape
    groups = k.shape[1]
    scaled = (q * (1.0 / math.sqrt(size))).reshape(batch, length, groups, heads // groups, size)
    grouped = scaled.transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    out = _xla(causal_layout, grouped, k, v, *masks)
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
    seen = visible(q_pos, k_pos, q_seg, k_seg)  # [B, t, s]
    batch, length, keys = seen.shape
    seen = jnp.broadcast_to(seen[:, None, None], (batch, 1, per_head, length, keys))
    scores = jnp.einsum("bkqh,bksh->bkqs", q, k, preferred_element_type=jnp.float32)
    return jnp.where(seen.reshape(batch, 1, per_head * length, keys), scores, MASKED)


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
