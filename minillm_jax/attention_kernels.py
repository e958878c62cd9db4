"""Attention by kernels of other people: cuDNN's and tokamax's on GPU, splash attention on TPU.

Each takes what `attention.attention` takes and says by `refusal` what it cannot do, so that no mask is ever ignored:
splash attention knows segments, but not their branches, and no cache; cuDNN and tokamax take any mask, as a table
`[B, 1, T, S]`. Kernels are not partitioned by the compiler; on a mesh each device runs them on its own rows and heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from minillm_jax.attention_xla import CHECKPOINT_NAME, visible
from minillm_jax.cache import BRANCH
from minillm_jax.kernels import installed
from minillm_jax.sharding import RULES

LANES = 128
"""Splash attention takes rows in multiples of this many tokens."""
SPLASH_BLOCKS = (512, 384, 256, 128)
"""Sides of its square blocks, of which the largest that divides a row is taken."""

Masks = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""Positions of queries `[B, T]` and keys `[B, S]`, then their segments alike."""
Kernel = Callable[[jax.Array, jax.Array, jax.Array, Masks], jax.Array]


@dataclass(frozen=True)
class Call:
    """All that a choice depends on, and static.

    Attributes:
        platform: `cpu`, `gpu` or `tpu`.
        batch: rows B, over all devices; likewise the sizes that follow.
        length: queries T.
        keys: S.
        heads: N.
        groups: key-value heads K.
        size: of a head, H.
        dtype: of queries, keys and values, by name.
        causal_layout: see `attention.attention`.
        branched: see `attention.attention`.
    """

    platform: str
    batch: int
    length: int
    keys: int
    heads: int
    groups: int
    size: int
    dtype: str
    causal_layout: bool
    branched: bool


def refusal(impl: str, call: Call) -> str | None:
    """Say why a kernel cannot compute a call, or return None if it can."""
    wanted = {"splash": "tpu", "cudnn": "gpu", "tokamax": "gpu"}[impl]
    if call.platform != wanted:
        return f"it runs on {wanted.upper()}, and this is compiled for {call.platform.upper()}"
    if impl == "tokamax" and not installed("tokamax"):
        return "the package tokamax is not installed; pip install tokamax"
    rows, heads = (_parts(name) for name in ("batch", "heads"))
    if call.batch % rows:
        return f"{call.batch} rows cannot be split over {rows} devices"
    if call.heads % heads or (call.groups % heads and heads % call.groups):
        return f"{call.heads} heads with {call.groups} key-value heads cannot be split over {heads} devices"
    if impl == "splash":
        if not call.causal_layout:
            return "it has no form for a key-value cache"
        if call.branched:
            return "it cannot see that segments may have branches; callers whose segments have none say branched=False"
        return None
    if call.dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 or float16, not {call.dtype}"
    if impl == "cudnn" and (call.size % 8 or call.size > 256):
        return f"head size {call.size} is not a multiple of 8 up to 256"
    if impl == "cudnn" and (call.length % 2 or call.keys % 2):
        return f"with a mask it takes even numbers of tokens, not {call.length} and {call.keys}"
    return None


def run(
    impl: str, q: jax.Array, k: jax.Array, v: jax.Array, masks: Masks, causal_layout: bool, *, interpret: bool = False
) -> jax.Array:
    """Attend by a kernel that does not refuse.

    Args:
        impl: `splash`, `cudnn` or `tokamax`.
        q: `[B, T, N, H]`.
        k: `[B, K, S, H]`.
        v: `[B, K, S, H]`.
        masks: positions and segments.
        causal_layout: see `attention.attention`.
        interpret: step through splash attention's kernel with XLA operations, on any device and slowly.

    Returns:
        `[B, T, N, H]`; for queries that are padding, anything finite.
    """

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, masks: Masks) -> jax.Array:
        if impl == "splash":
            return splash(q, k, v, masks, interpret=interpret)
        return dense_mask(impl, q, k, v, masks, causal_layout)

    return _on_mesh(kernel, q, k, v, masks)


def _parts(logical: str) -> int:
    """Devices that a logical axis is split over, axes that are mapped already aside."""
    sizes = _open_axes()
    return math.prod(sizes.get(axis, 1) for axis in RULES[logical])


def local_rows(call: Call) -> int:
    """Rows of a call on one device."""
    return -(-call.batch // _parts("batch"))


def _open_axes() -> dict[str, int]:
    """Axes of the mesh, with their sizes, that no surrounding `shard_map` has mapped."""
    mesh = jax.sharding.get_abstract_mesh()
    return {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind != AxisType.Manual
    }


def _on_mesh(kernel: Kernel, q: jax.Array, k: jax.Array, v: jax.Array, masks: Masks) -> jax.Array:
    """Run a kernel on each device's rows and heads; key-value heads that are too few are copied to whom needs them."""
    axes = _open_axes()
    if not axes:
        return kernel(q, k, v, masks)
    rows, heads = (tuple(axis for axis in RULES[name] if axis in axes) or None for name in ("batch", "heads"))
    if (parts := _parts("heads")) % k.shape[1] == 0:
        k, v = (jnp.repeat(x, parts // k.shape[1], axis=1) for x in (k, v))
    q_spec, kv_spec, mask_spec = (
        PartitionSpec(rows, None, heads), PartitionSpec(rows, heads), PartitionSpec(rows)
    )  # fmt: skip
    mapped = jax.shard_map(
        kernel,
        in_specs=(q_spec, kv_spec, kv_spec, mask_spec),
        out_specs=q_spec,
        axis_names=frozenset(axes),
        check_vma=False,  # kernels do not say over which axes their results vary
    )
    return mapped(q, k, v, masks)


def splash(q: jax.Array, k: jax.Array, v: jax.Array, masks: Masks, *, interpret: bool = False) -> jax.Array:
    """Splash attention (in JAX itself, `jax.experimental.pallas.ops.tpu`): causal, within equal segment ids.

    It compares indices where we compare positions, and knows no branches. Both come to the same for what
    `causal_layout` and `branched=False` promise; if the promise is broken, every result is NaN rather than wrong.
    Padding is one more segment. Rows are padded to whole blocks. Arguments are those of `run`.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention  # slow to import

    length, heads, size = q.shape[1:]
    positions, _, segments, _ = masks
    adjacent = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    backwards = adjacent & (positions[:, 1:] <= positions[:, :-1])
    promised = ~(backwards.any() | (segments >= BRANCH).any())
    scale = jnp.where(promised, 1.0 / math.sqrt(size), jnp.nan).astype(q.dtype)
    padded = -(-length // LANES) * LANES
    side = next(side for side in SPLASH_BLOCKS if padded % side == 0)
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([splash_attention.CausalMask((padded, padded))] * heads),
        block_sizes=splash_attention.BlockSizes(*(side,) * 8),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=CHECKPOINT_NAME,
        interpret=interpret,
    )
    fill = padded - length
    widen = [(0, 0), (0, 0), (0, fill), (0, 0)]
    q, k, v = (jnp.pad(x, widen) for x in ((q * scale).swapaxes(1, 2), k, v))
    ids = jnp.pad(segments, [(0, 0), (0, fill)])
    out = jax.vmap(kernel)(q, k, v, splash_attention.SegmentIds(ids, ids))  # [B, N, T, H]
    return out[:, :, :length].swapaxes(1, 2).astype(q.dtype)


def dense_mask(impl: str, q: jax.Array, k: jax.Array, v: jax.Array, masks: Masks, causal_layout: bool) -> jax.Array:
    """Attention under a table of who sees whom, by `jax.nn.dot_product_attention` or tokamax's function of that name.

    The table takes B * T * S elements, whatever the number of heads. Padding sees everything, so that no query is
    without a key.

    Args:
        impl: `cudnn`, `tokamax`, or `xla` for JAX's own operations, which tests compare.
        q: `[B, T, N, H]`.
        k: `[B, K, S, H]`.
        v: `[B, K, S, H]`.
        masks: positions and segments.
        causal_layout: lets the kernel skip what is to the right of the diagonal.
    """
    table = (visible(*masks) | (masks[2] == 0)[:, :, None])[:, None]  # [B, 1, T, S]
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    if impl == "tokamax":
        import tokamax  # optional, and slow to import

        out: jax.Array = tokamax.dot_product_attention(
            q, keys, values, mask=table, is_causal=causal_layout, implementation=("mosaic", "triton")
        )
        return out
    implementation: Callable[..., jax.Array] = jax.nn.dot_product_attention
    return implementation(q, keys, values, mask=table, is_causal=causal_layout, implementation=impl)
