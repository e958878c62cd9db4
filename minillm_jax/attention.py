"""Attention over packed, padded and cached tokens, behind one signature.

A query sees a key when both belong to the same non-zero segment and the key's position is not later. A segment may have
branches, whose ids are the segment's plus a multiple of `BRANCH`: they see the segment itself and their own tokens, not
one another, so that several continuations of a text can share its beginning in one row. Implementations
differ in speed only; one that cannot do this for what it is given refuses, and is never chosen.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from minillm_jax import attention_kernels
from minillm_jax.attention_kernels import Call, Masks
from minillm_jax.attention_xla import CHECKPOINT_NAME, MASKED, QUERY_BLOCK, xla_attention
from minillm_jax.kernels import announce, platform, present_platform, trial

__all__ = ["CHECKPOINT_NAME", "MASKED", "QUERY_BLOCK", "attention", "choose"]

IMPLEMENTATIONS = ("xla", "cudnn", "splash", "tokamax")
PREFERRED = {"cpu": (), "gpu": ("cudnn", "tokamax"), "tpu": ("splash",)}
"""What `auto` tries before `xla`."""
SHORTEST = 128
"""Rows of fewer tokens gain nothing from a kernel."""
LARGEST_TABLE = 1 << 29
"""Bytes of a mask's table on one device above which `auto` takes no kernel that needs one."""


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
    branched: bool = True,
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
        causal_layout: queries and keys are the same tokens, and within a segment positions rise with the index: true
            for rows of tokens, false with a cache.
        branched: segments may have branches. False, where the caller knows, admits implementations that know none.
        impl: `xla`, `cudnn` (NVIDIA GPU), `splash` (TPU), `tokamax` (NVIDIA GPU, where the package is installed), or
            `auto`, which chooses by platform, dtype and shape, and logs what it chose.

    Returns:
        `[B, T, N, H]` in the dtype of `q`; finite but arbitrary for queries that are padding.

    Raises:
        ValueError: an unknown implementation, or one that cannot compute this.
    """
    call = Call(
        platform(), q.shape[0], q.shape[1], k.shape[2], q.shape[2], k.shape[1], q.shape[3], q.dtype.name,
        causal_layout, branched,
    )  # fmt: skip
    choice = choose(call, impl)
    masks = (q_positions, kv_positions, q_segment_ids, kv_segment_ids)
    if choice == "xla":
        return xla_attention(q, k, v, masks, causal_layout)
    return attention_kernels.run(choice, q, k, v, masks, causal_layout)


def choose(call: Call, impl: str = "auto") -> str:
    """Choose the implementation of a call.

    Raises:
        ValueError: an unknown implementation, or one that cannot compute this call.
    """
    if impl == "xla":
        return impl
    if impl in IMPLEMENTATIONS:
        if (reason := attention_kernels.refusal(impl, call)) is not None:
            raise ValueError(f"attention_impl {impl} cannot be used here: {reason}; choose auto or xla")
        return impl
    if impl != "auto":
        raise ValueError(f"attention_impl {impl!r} is unknown; choose auto or {', '.join(IMPLEMENTATIONS)}")
    choice = next((name for name in PREFERRED[call.platform] if _pays(name, call)), "xla")
    if call.length >= SHORTEST:
        announce("attention", choice, call.platform, call.dtype, f"{call.length} x {call.keys} tokens")
    return choice


def _pays(impl: str, call: Call) -> bool:
    """Whether `auto` may take a kernel: it can do it, there is enough to do, and it was right on this machine."""
    if not call.causal_layout or call.length < SHORTEST or attention_kernels.refusal(impl, call) is not None:
        return False
    if impl != "splash" and 2 * attention_kernels.local_rows(call) * call.length * call.keys > LARGEST_TABLE:
        return False
    if call.platform != present_platform():
        return True  # compiled ahead for devices that this machine lacks
    key = (f"attention by {impl}", call.heads, call.groups, call.size, call.dtype)
    example = functools.partial(_example, call)
    return trial(key, functools.partial(example, impl), functools.partial(example, "xla"), 0.05) is None


def _example(call: Call, impl: str) -> tuple[jax.Array, ...]:
    """Outputs and gradients of real tokens of two packed, padded rows."""
    length = 2 * SHORTEST
    shapes = [(2, length, call.heads, call.size), *[(2, call.groups, length, call.size)] * 2]
    q, k, v, g = (
        jax.random.normal(jax.random.key(i), shape, call.dtype) for i, shape in enumerate([*shapes, shapes[0]])
    )
    ends = jnp.asarray([[100, 190, length], [0, 57, 203]])  # of two documents and of padding; the other way round
    index = jnp.arange(length)
    place = (index >= ends[:, :, None]).sum(1)  # [B, T] which part of its row a token is in
    segments = jnp.asarray([[1, 2, 0, 0], [0, 1, 2, 0]])[jnp.arange(2)[:, None], place]
    starts = jnp.pad(ends, [(0, 0), (1, 0)])[jnp.arange(2)[:, None], place]
    positions = jnp.broadcast_to(index, segments.shape) - starts
    masks: Masks = (positions, positions, segments, segments)

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if impl == "xla":
            out = xla_attention(q, k, v, masks, True)
        else:
            out = attention_kernels.run(impl, q, k, v, masks, True)
        return out * (segments > 0)[:, :, None, None]

    out, pull = jax.vjp(run, q, k, v)
    return out, *pull(g)
