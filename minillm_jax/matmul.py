"""Matrix products with backward passes of their own: the plain one, and the grouped one of the experts.

Derived gradients are right but slow on CPU, where a product's operands are copied into the order that the kernel reads;
these choose which operand that happens to. The grouped product has one signature and several implementations. On CPU
the rows of each group are padded to whole blocks and a loop runs over the blocks in use, so that the work is that of
the rows and not E times as much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

BLOCK = 128
"""Most rows of one step of the grouped product on CPU; a decoding step has fewer rows than this in all."""


@jax.custom_vjp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply `[..., D]` by `[D, F]`.

    The gradient of w contracts all leading axes, with the narrower of x and the incoming gradient as the transposed
    operand.
    """
    return x @ w


def _matmul_fwd(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ w, (x, w)


def _matmul_bwd(residuals: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = residuals
    rows, grads = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    over_rows = (((0,), (0,)), ((), ()))
    if rows.shape[1] <= grads.shape[1]:
        dw = jax.lax.dot_general(rows, grads, over_rows)
    else:
        dw = jax.lax.dot_general(grads, rows, over_rows).T
    return (grads @ w.T).reshape(x.shape), dw


matmul.defvjp(_matmul_fwd, _matmul_bwd)


def grouped_matmul(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """Multiply consecutive groups of rows by one matrix each.

    Args:
        x: `[M, D]` rows, group after group.
        w: `[E, D, F]`, one matrix a group.
        sizes: `[E]` ints that sum to M.

    Returns:
        `[M, F]`, row i being `x[i] @ w[group of i]`.
    """
    if jax.default_backend() == "cpu":
        return _blocked_matmul(x, w, sizes)
    return jax.lax.ragged_dot(x, w, sizes.astype(jnp.int32))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a product with W: `dropout(x) A B` (LoRA, arXiv:2106.09685).

    Two thin products: nothing of W's size is made, forward or backward.

    Attributes:
        a: `[in, r]`, or `[E, in, r]` for experts; with an axis B in front, every row of the batch has its own.
        b: `[r, out]`, or `[E, r, out]`, the adapter's scale included; likewise.
        rate: scalar, probability of dropping an element of x; read only when there is a key.
        key: randomness of this call's dropout; None for none.
    """

    a: jax.Array
    b: jax.Array
    rate: jax.Array | None = None
    key: jax.Array | None = None

    def __call__(self, x: jax.Array, product: Callable[[jax.Array, jax.Array], jax.Array] = matmul) -> jax.Array:
        """Map `[..., in]` to `[..., out]` in the dtype of `x`; `product` multiplies rows by one factor."""
        y = x
        if self.key is not None and self.rate is not None:
            keep = 1.0 - self.rate
            y = jnp.where(jax.random.bernoulli(self.key, keep, x.shape), x / keep.astype(x.dtype), 0.0)
        if product is matmul and self.a.ndim == 3:  # [B, in, r]; tokens may have been flattened
            y = y.reshape(self.a.shape[0], -1, y.shape[-1])
        y = product(product(y, self.a.astype(x.dtype)), self.b.astype(x.dtype))
        return y.reshape(*x.shape[:-1], y.shape[-1])


def rowwise_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply each of `[M, D]` rows by its own matrix of `[M, D, F]`."""
    return jnp.einsum("md,mdf->mf", x, w)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Blocks:
    """Layout in which every group starts on a block boundary."""

    source: jax.Array  # [P] row that fills each padded slot
    filled: jax.Array  # [P] whether it is a row at all
    target: jax.Array  # [M] padded slot of each row
    group: jax.Array  # [P / size] group of each block
    used: jax.Array  # scalar, blocks in use


def _block_size(rows: int) -> int:
    return min(BLOCK, 1 << (rows - 1).bit_length())


def _layout(rows: int, sizes: jax.Array) -> _Blocks:
    groups, size = sizes.shape[0], _block_size(rows)
    blocks = -(-rows // size) + groups  # no layout needs more
    blocks_of = -(-sizes // size)
    first_block = jnp.cumsum(blocks_of) - blocks_of
    first_row = jnp.cumsum(sizes) - sizes
    group = jnp.minimum(jnp.searchsorted(jnp.cumsum(blocks_of), jnp.arange(blocks), side="right"), groups - 1)
    slot = jnp.arange(blocks * size)
    slot_group = jnp.repeat(group, size)
    within = slot - first_block[slot_group] * size
    row_group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows), side="right")
    return _Blocks(
        source=jnp.clip(first_row[slot_group] + within, 0, rows - 1),
        filled=within < sizes[slot_group],
        target=first_block[row_group] * size + jnp.arange(rows) - first_row[row_group],
        group=group,
        used=blocks_of.sum(),
    )


def _pad(x: jax.Array, layout: _Blocks) -> jax.Array:
    padded = jnp.where(layout.filled[:, None], x[layout.source], 0)
    return padded.reshape(-1, _block_size(x.shape[0]), x.shape[-1])  # [P / size, size, D]


def _multiply(x: jax.Array, w: jax.Array, layout: _Blocks, transpose: bool) -> jax.Array:
    """Rows times their group's matrix, or its transpose, a block at a time."""
    padded = _pad(x, layout)
    width = w.shape[1 if transpose else 2]

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        matrix = w[layout.group[i]]
        return out.at[i].set(padded[i] @ (matrix.T if transpose else matrix))

    out = jax.lax.fori_loop(0, layout.used, body, jnp.zeros((*padded.shape[:2], width), x.dtype))
    return out.reshape(-1, width)[layout.target]


@jax.custom_vjp
def _blocked_matmul(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return _multiply(x, w, _layout(x.shape[0], sizes), transpose=False)


def _blocked_fwd(
    x: jax.Array, w: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _blocked_matmul(x, w, sizes), (x, w, sizes)


def _blocked_bwd(residuals: tuple[jax.Array, jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, w, sizes = residuals
    layout = _layout(x.shape[0], sizes)
    rows, grads = _pad(x, layout), _pad(g, layout)

    def body(i: jax.Array, dw: jax.Array) -> jax.Array:
        return dw.at[layout.group[i]].add(rows[i].T @ grads[i])

    dw = jax.lax.fori_loop(0, layout.used, body, jnp.zeros_like(w))
    return _multiply(g, w, layout, transpose=True), dw, None


_blocked_matmul.defvjp(_blocked_fwd, _blocked_bwd)
