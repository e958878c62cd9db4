"""The grouped product a block of rows at a time: the rows of each group are padded to whole blocks.

A loop runs over the blocks in use, so that the work is that of the rows and not E times as much. The layout serves
other implementations as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

BLOCK = 128
"""Most rows of one step of the grouped product; a decoding step has fewer rows than this in all."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blocks:
    """Layout in which every group starts on a block boundary."""

    source: jax.Array  # [P] row that fills each padded slot
    filled: jax.Array  # [P] whether it is a row at all
    target: jax.Array  # [M] padded slot of each row
    group: jax.Array  # [P / size] group of each block
    first: jax.Array  # [E] first block of each group
    count: jax.Array  # [E] blocks of each group


def block_size(rows: int) -> int:
    """Rows of a block: a power of two."""
    return min(BLOCK, 1 << (rows - 1).bit_length())


def block_layout(rows: int, sizes: jax.Array) -> Blocks:
    """Lay out M `rows` in groups of `[E]` sizes."""
    groups, size = sizes.shape[0], block_size(rows)
    blocks = -(-rows // size) + groups  # no layout needs more
    blocks_of = -(-sizes // size)
    first_block = jnp.cumsum(blocks_of) - blocks_of
    first_row = jnp.cumsum(sizes) - sizes
    group = jnp.minimum(jnp.searchsorted(jnp.cumsum(blocks_of), jnp.arange(blocks), side="right"), groups - 1)
    slot = jnp.arange(blocks * size)
    slot_group = jnp.repeat(group, size)
    within = slot - first_block[slot_group] * size
    row_group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows), side="right")
    return Blocks(
        source=jnp.clip(first_row[slot_group] + within, 0, rows - 1),
        filled=within < sizes[slot_group],
        target=first_block[row_group] * size + jnp.arange(rows) - first_row[row_group],
        group=group,
        first=first_block,
        count=blocks_of,
    )


def pad_to_blocks(x: jax.Array, layout: Blocks) -> jax.Array:
    """Copy rows `[M, D]` to where they lie: `[P / size, size, D]`, zeros between them."""
    padded = jnp.where(layout.filled[:, None], x[layout.source], 0)
    return padded.reshape(-1, block_size(x.shape[0]), x.shape[-1])


def _multiply(x: jax.Array, w: jax.Array, layout: Blocks, transpose: bool) -> jax.Array:
    """Rows times their group's matrix, or its transpose, a block at a time."""
    padded = pad_to_blocks(x, layout)
    width = w.shape[1 if transpose else 2]

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        matrix = w[layout.group[i]]
        return out.at[i].set(padded[i] @ (matrix.T if transpose else matrix))

    out = jax.lax.fori_loop(0, layout.count.sum(), body, jnp.zeros((*padded.shape[:2], width), x.dtype))
    return out.reshape(-1, width)[layout.target]


@jax.custom_vjp
def blocked_matmul(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """Multiply as `matmul.grouped_matmul` does, by a loop over blocks."""
    return _multiply(x, w, block_layout(x.shape[0], sizes), transpose=False)


def _blocked_fwd(
    x: jax.Array, w: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return blocked_matmul(x, w, sizes), (x, w, sizes)


def _blocked_bwd(residuals: tuple[jax.Array, jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, w, sizes = residuals
    layout = block_layout(x.shape[0], sizes)
    rows, grads = pad_to_blocks(x, layout), pad_to_blocks(g, layout)

    def body(i: jax.Array, dw: jax.Array) -> jax.Array:
        return dw.at[layout.group[i]].add(rows[i].T @ grads[i])

    dw = jax.lax.fori_loop(0, layout.count.sum(), body, jnp.zeros_like(w))
    return _multiply(g, w, layout, transpose=True), dw, None


blocked_matmul.defvjp(_blocked_fwd, _blocked_bwd)
