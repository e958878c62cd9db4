"""The grouped product by kernels: ours in Triton on GPU, megablox on TPU, tokamax's where it is installed.

Each has a backward pass of two more kernels: rows times transposed matrices, and for each group its rows transposed
times the incoming gradients.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from minillm_jax.kernels import installed

KERNELS = ("megablox", "triton", "tokamax")
PLATFORMS = {"megablox": ("tpu",), "triton": ("gpu",), "tokamax": ("gpu", "tpu")}
TILE = 512
"""Most rows and columns of a tile of megablox."""
LEAST = 16
"""What Triton's products take: multiples of this many rows and columns."""


def refusal(impl: str, x: jax.Array, w: jax.Array, platform: str) -> str | None:
    """Say why a kernel cannot multiply `[M, D]` by `[E, D, F]`, or return None if it can."""
    if platform not in PLATFORMS[impl]:
        return f"it runs on {' and '.join(PLATFORMS[impl]).upper()}, and this is compiled for {platform.upper()}"
    if impl == "tokamax" and not installed("tokamax"):
        return "the package tokamax is not installed; pip install tokamax"
    if x.dtype != w.dtype:
        return f"rows are {x.dtype.name} and matrices {w.dtype.name}"
    allowed = ("bfloat16", "float32") if impl == "megablox" else ("bfloat16", "float16")
    if x.dtype.name not in allowed:
        return f"it computes in {' or '.join(allowed)}, not {x.dtype.name}"
    if impl == "triton" and any(width % LEAST for width in w.shape[1:]):
        return f"matrices of {w.shape[1]} x {w.shape[2]} are no multiples of {LEAST}"
    if impl == "triton" and x.shape[0] < LEAST:
        return f"{x.shape[0]} rows are fewer than {LEAST}"
    return None


def run(impl: str, x: jax.Array, w: jax.Array, sizes: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Multiply by a kernel that does not refuse; arguments are those of `matmul.grouped_matmul`.

    With `interpret` the kernels of megablox and Triton are stepped through by XLA operations, on any device and slowly.
    """

    def kernel(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        if impl == "tokamax":
            return _tokamax(x, w, sizes)
        if impl == "megablox":
            return megablox(x, w, sizes, interpret)
        from minillm_jax.matmul_triton import triton  # slow to import

        return triton(x, w, sizes, interpret)

    mesh = jax.sharding.get_abstract_mesh()
    axes = frozenset(
        name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual
    )
    if not axes:
        return kernel(x, w, sizes)
    whole = PartitionSpec()
    return jax.shard_map(
        kernel, in_specs=(whole, whole, whole), out_specs=whole, axis_names=axes, check_vma=False
    )(x, w, sizes)  # fmt: skip


def megablox(x: jax.Array, w: jax.Array, sizes: jax.Array, interpret: bool = False) -> jax.Array:
    """Multiply by JAX's own kernels for TPU, `jax.experimental.pallas.ops.tpu.megablox`; rows fill whole tiles."""
    from jax.experimental.pallas.ops.tpu.megablox import gmm  # slow to import

    rows = x.shape[0]
    tile = TILE if rows >= 8 * TILE else 128
    fill = -rows % tile
    padded = jnp.pad(x, [(0, fill), (0, 0)])
    tiling = (tile, *(min(TILE, -(-width // 128) * 128) for width in w.shape[1:]))
    return gmm(padded, w, sizes, x.dtype, tiling, interpret=interpret)[:rows]


def _tokamax(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    import tokamax  # optional, and slow to import

    out: jax.Array = tokamax.ragged_dot(
        x, w, sizes, preferred_element_type=x.dtype, implementation=("mosaic", "triton")
    )
    return out
