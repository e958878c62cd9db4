"""Matrix products with backward passes of their own: the plain one, and the grouped one of the experts.

Derived gradients are right but slow on CPU, where a product's operands are copied into the order that the kernel reads;
these choose which operand that happens to. The grouped product has one signature and several implementations, which
differ in speed only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from minillm_jax import matmul_kernels
from minillm_jax.kernels import announce, platform, present_platform, trial
from minillm_jax.matmul_blocked import blocked_matmul
from minillm_jax.matmul_kernels import KERNELS, refusal

FEW_ROWS = 32
"""Most rows of a product that are written as columns on CPU."""
LOOPED_ROWS, LOOPED_INT8_ROWS = 4, 8
"""Most rows of a product that can be written as a loop, with weights of float32 and of int8."""
UNROLL = 8
"""Rows of the weights that a loop reads side by side: more gain nothing, and of int8 are no longer vectorised."""
LOOPED_SIZE = 1024
"""Largest matrix of a batch whose product is written as a loop: calling YNNPACK takes longer."""
CONVERTED_COLUMNS = 256
"""Most columns of integers that are converted at once."""
LOOPED_OPTIONS: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}
"""Options of the compiler that keep loops over elements out of YNNPACK."""

_looped = ContextVar("looped", default=False)


@jax.custom_vjp
def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply `[..., D]` by `[D, F]`.

    The gradient of w contracts all leading axes, with the narrower of x and the incoming gradient as the transposed
    operand.
    """
    return product(x, w)


def _matmul_fwd(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x, w), (x, w)


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply `[..., D]` by `[D, F]`, which may be integers, or by a matrix for each row; its gradient is derived.

    On CPU few rows are written as columns. XLA hands products to YNNPACK there, which packs all weights anew for each:
    worth it where many rows use them. It does not take a transposed first operand, for which XLA's own product is up to
    1.8 times as fast with 4 to 32 rows. (64 rows take a fifth longer that way.)
    """
    rows = math.prod(x.shape[:-1]) if w.ndim == 2 else 0
    if 1 <= rows <= looped_rows(w.dtype) and _looped.get() and w.shape[0] % UNROLL == 0:
        return _looped_product(x.reshape(rows, -1), w).astype(x.dtype).reshape(*x.shape[:-1], -1)
    on_cpu = platform() == "cpu"
    if on_cpu and rows > 0 and jnp.issubdtype(w.dtype, jnp.integer) and jax.sharding.get_abstract_mesh().empty:
        return _converted_product(x.reshape(rows, -1), w).reshape(*x.shape[:-1], -1)
    w = w.astype(x.dtype)
    if not 1 < rows <= FEW_ROWS or not on_cpu:
        return x @ w
    return _columns_product(x.reshape(rows, -1), w).reshape(*x.shape[:-1], -1)


def _converted_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply `[R, D]` by integers `[D, F]`, which are converted some columns after the other.

    Converted at once, the weights of all layers lie in memory together, in pages that are new at every call: with 128
    rows and 26 M parameters that takes 1.7 times as long.
    """
    width = math.gcd(w.shape[1], CONVERTED_COLUMNS)
    if width < CONVERTED_COLUMNS // 4:
        width = w.shape[1]

    def part(i: jax.Array, y: jax.Array) -> jax.Array:
        columns = jax.lax.dynamic_slice_in_dim(w, i * width, width, 1)
        return jax.lax.dynamic_update_slice_in_dim(y, product(x, columns.astype(x.dtype)), i * width, 1)

    return jax.lax.fori_loop(0, w.shape[1] // width, part, jnp.zeros((x.shape[0], w.shape[1]), x.dtype))


def _columns_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply `[R, D]` by `[D, F]`, the former written as columns.

    From 16 rows on, long columns are multiplied in four parts, which saves 5 % of a decoding step's time.
    """
    columns = jax.lax.optimization_barrier(x.T)  # or the compiler takes the transposition back
    if x.shape[0] < 16 or w.shape[0] < 2 * w.shape[1] or w.shape[0] % 4 > 0:
        return jax.lax.dot_general(columns, w, (((0,), (0,)), ((), ())))
    columns, w = (each.reshape(4, -1, each.shape[1]) for each in (columns, w))
    parts = jax.lax.dot_general(columns, w, (((1,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)
    return parts.sum(0).astype(x.dtype)


def looped_rows(dtype: jnp.dtype) -> int:
    """Count the most rows of a product with weights of this dtype that can be written as a loop."""
    return LOOPED_INT8_ROWS if dtype == jnp.int8 else LOOPED_ROWS


@contextmanager
def looped_products(wanted: bool) -> Iterator[None]:
    """Write products of up to `looped_rows` as loops, in what is traced here.

    It must be compiled with `LOOPED_OPTIONS`. Such a product takes little longer than reading the weights, which XLA's
    own leaves to one core for a single row, and packs first for more. A loop over elements is shared by all cores, and
    converts what it reads: from int8, a single row takes half the time that it does from float32.
    """
    token = _looped.set(wanted)
    try:
        yield
    finally:
        _looped.reset(token)


def _looped_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply `[R, D]` by `[D, F]` in float32, `UNROLL` rows of w at once, which lie far apart.

    So memory is read in long streams, as many as there are rows of int8, whose products take three quarters of the time
    that neighbours would. Rows of float32 go in pairs, which saves a few percent.
    """
    x, w = jax.lax.optimization_barrier((x, w))  # or what made x is made again, and w converted outside, to be kept
    near = 1 if w.dtype == jnp.int8 else 2
    far = UNROLL // near
    factors = x.T.reshape(far, -1, near, x.shape[0], 1).astype(jnp.float32)
    rows = w.reshape(far, -1, near, 1, w.shape[1]).astype(jnp.float32)
    products = (factors[i, :, j] * rows[i, :, j] for i in range(far) for j in range(near))
    sums = functools.reduce(jnp.add, products)  # [D / 8, R, F]
    # A plain sum of few would become one loop with the products, which is then not vectorised.
    window = (math.gcd(sums.shape[0], 16), 1, 1)
    return jax.lax.reduce_window(sums, 0.0, jax.lax.add, window, window, "VALID").sum(0)


def batched_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply `[..., Q, D]` by `[..., D, F]` in float32; small matrices as a loop too, where those are wanted."""
    if _looped.get() and math.prod(w.shape[-2:]) <= LOOPED_SIZE:
        return (x.astype(jnp.float32)[..., None] * w.astype(jnp.float32)[..., None, :, :]).sum(-2)
    return jnp.matmul(x, w, preferred_element_type=jnp.float32)


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


def grouped_matmul(x: jax.Array, w: jax.Array, sizes: jax.Array, impl: str = "auto") -> jax.Array:
    """Multiply consecutive groups of rows by one matrix each.

    Inside `jax.shard_map` the arrays are one device's. Elsewhere on a mesh the kernels, which the compiler cannot
    partition, gather everything and run on every device alike: right, but no faster than one device.

    Args:
        x: `[M, D]` rows, group after group.
        w: `[E, D, F]`, one matrix a group.
        sizes: `[E]` ints that sum to M, or to less.
        impl: `blocked` (a loop, for CPU), `ragged_dot` (`jax.lax.ragged_dot`), `megablox` (TPU), `triton` (NVIDIA
            GPU), `tokamax` (NVIDIA GPU and TPU, where the package is installed), or `auto`, which chooses by platform,
            dtype and shape, and logs what it chose.

    Returns:
        `[M, F]`, row i being `x[i] @ w[group of i]`; rows behind the last group, and their gradients, are arbitrary.

    Raises:
        ValueError: an unknown implementation, or one that cannot compute this.
    """
    where = platform()
    if impl == "auto":
        impl = next((name for name in PREFERRED[where] if _pays(name, x, w, where)), "ragged_dot")
        if x.shape[0] >= SMALLEST:
            announce("grouped product", impl, where, x.dtype.name, " x ".join(map(str, w.shape)))
    elif impl in KERNELS and (reason := refusal(impl, x, w, where)) is not None:
        raise ValueError(f"the grouped product {impl} cannot be used here: {reason}; choose auto")
    if impl == "blocked":
        return blocked_matmul(x, w, sizes)
    if impl == "ragged_dot":
        return jax.lax.ragged_dot(x, w, sizes.astype(jnp.int32))
    if impl not in KERNELS:
        raise ValueError(f"the grouped product {impl!r} is unknown; choose auto or {', '.join(IMPLEMENTATIONS)}")
    return matmul_kernels.run(impl, x, w, sizes.astype(jnp.int32))


IMPLEMENTATIONS = ("blocked", "ragged_dot", *KERNELS)
PREFERRED = {"cpu": ("blocked",), "gpu": ("tokamax", "triton"), "tpu": ("megablox",)}
"""What `auto` tries before `ragged_dot`, which XLA expands to E times the work on CPU and GPU."""
SMALLEST = 128
"""With fewer rows, as in decoding, a kernel's blocks are mostly padding."""


def _pays(impl: str, x: jax.Array, w: jax.Array, where: str) -> bool:
    """Whether `auto` may take an implementation: it can do it, there is enough to do, and it was right here."""
    if impl == "blocked":
        return True
    if x.shape[0] < SMALLEST or refusal(impl, x, w, where) is not None:
        return False
    if where != present_platform():
        return True  # compiled ahead for devices that this machine lacks
    key = (f"the grouped product {impl}", w.shape, x.dtype.name)
    example = functools.partial(_example, w.shape, x.dtype)
    return trial(key, functools.partial(example, impl), functools.partial(example, "ragged_dot"), 0.05) is None


def _example(shape: tuple[int, ...], dtype: jnp.dtype, impl: str) -> tuple[jax.Array, ...]:
    """Outputs and gradients of rows of which the first group has none, and the others have more and more."""
    counts = [37 * i for i in range(shape[0])] if shape[0] > 1 else [SMALLEST]
    x, w, g = (
        jax.random.normal(jax.random.key(i), size, dtype)
        for i, size in enumerate([(sum(counts), shape[1]), shape, (sum(counts), shape[2])])
    )
    sizes = jnp.asarray(counts, jnp.int32)
    if impl == "ragged_dot":
        out, pull = jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, sizes), x, w)
    else:
        out, pull = jax.vjp(lambda x, w: matmul_kernels.run(impl, x, w, sizes), x, w)
    return out, *pull(g)


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
