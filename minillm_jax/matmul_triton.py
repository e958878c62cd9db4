"""The grouped product by Triton, through Pallas: one program makes one tile of one block of rows, all of one group.

Imported only where it is used, because Pallas takes a while.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from minillm_jax.matmul_blocked import Blocks, block_layout, pad_to_blocks

SIDES = (64, 32, 16)
"""Sides of tiles, of which the largest that divides is taken; 16 is the least that Triton's products take."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def triton(x: jax.Array, w: jax.Array, sizes: jax.Array, interpret: bool = False) -> jax.Array:
    """Multiply as `matmul.grouped_matmul` does; `interpret` steps through the kernels on any device."""
    layout = block_layout(x.shape[0], sizes)
    return _rows_times_matrices(x, w, layout, transpose=False, interpret=interpret)


def _triton_fwd(
    x: jax.Array, w: jax.Array, sizes: jax.Array, interpret: bool = False
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return triton(x, w, sizes, interpret), (x, w, sizes)


def _triton_bwd(
    interpret: bool, residuals: tuple[jax.Array, jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, w, sizes = residuals
    layout = block_layout(x.shape[0], sizes)
    dx = _rows_times_matrices(g, w, layout, transpose=True, interpret=interpret)
    return dx, _rows_times_rows(x, g, w, layout, interpret=interpret), None


triton.defvjp(_triton_fwd, _triton_bwd)


def _side(width: int) -> int:
    return next(side for side in SIDES if width % side == 0)


def _rows_times_matrices(x: jax.Array, w: jax.Array, layout: Blocks, transpose: bool, interpret: bool) -> jax.Array:
    """Multiply `[M, D]` by each row's matrix of `[E, D, F]`, or `[M, F]` by its transpose."""
    padded = pad_to_blocks(x, layout)  # [P / size, size, D]
    blocks, size, depth = padded.shape
    width = w.shape[1 if transpose else 2]
    across, along = _side(width), _side(depth)

    def kernel(group_ref: Any, x_ref: Any, w_ref: Any, out_ref: Any) -> None:
        block, tile = pl.program_id(0), pl.program_id(1)
        group = group_ref[block]
        columns = pl.ds(tile * across, across)

        def body(step: jax.Array, total: jax.Array) -> jax.Array:
            inner = pl.ds(step * along, along)
            matrix = w_ref[group, columns, inner].T if transpose else w_ref[group, inner, columns]
            return total + jnp.dot(x_ref[block, :, inner], matrix, preferred_element_type=jnp.float32)

        total = jax.lax.fori_loop(0, depth // along, body, jnp.zeros((size, across), jnp.float32))
        out_ref[block, :, columns] = total.astype(out_ref.dtype)

    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((blocks, size, width), x.dtype),
        grid=(blocks, width // across),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="grouped_matmul_transposed" if transpose else "grouped_matmul",
    )(layout.group.astype(jnp.int32), padded, w)
    return out.reshape(-1, width)[layout.target]


def _rows_times_rows(x: jax.Array, g: jax.Array, w: jax.Array, layout: Blocks, interpret: bool) -> jax.Array:
    """Sum the outer products of the rows of `[M, D]` and `[M, F]` over each group: `[E, D, F]`, like w."""
    rows, grads = pad_to_blocks(x, layout), pad_to_blocks(g, layout)
    down, across = _side(w.shape[1]), _side(w.shape[2])

    def kernel(first_ref: Any, count_ref: Any, x_ref: Any, g_ref: Any, out_ref: Any) -> None:
        group = pl.program_id(0)
        left, right = pl.ds(pl.program_id(1) * down, down), pl.ds(pl.program_id(2) * across, across)
        first = first_ref[group]

        def body(block: jax.Array, total: jax.Array) -> jax.Array:
            return total + jnp.dot(x_ref[block, :, left].T, g_ref[block, :, right], preferred_element_type=jnp.float32)

        total = jax.lax.fori_loop(first, first + count_ref[group], body, jnp.zeros((down, across), jnp.float32))
        out_ref[group, left, right] = total.astype(out_ref.dtype)

    out: jax.Array = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(w.shape, w.dtype),
        grid=(w.shape[0], w.shape[1] // down, w.shape[2] // across),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="grouped_matmul_weights",
    )(layout.first.astype(jnp.int32), layout.count.astype(jnp.int32), rows, grads)
    return out
