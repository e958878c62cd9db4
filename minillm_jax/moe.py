"""Mixture of experts without dropped tokens: route, sort by expert, one grouped product per projection, combine.

The grouped product has one signature and several implementations. On CPU the rows of each expert are padded to whole
blocks and a loop runs over the blocks in use, so that the work is that of the tokens and not E times as much.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from minillm_jax.config import ModelConfig

BLOCK = 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Where each of M tokens goes.

    Attributes:
        experts: `[M, k]` chosen experts.
        weights: `[M, k]` float32 weights of their outputs.
        scores: `[M, E]` float32 scores of all experts, normalised to sum to one.
        logits: `[M, E]` float32 router logits.
    """

    experts: jax.Array
    weights: jax.Array
    scores: jax.Array
    logits: jax.Array


def route(logits: jax.Array, config: ModelConfig) -> Routing:
    """Choose experts from `[M, E]` router logits: top-k of softmax (Switch, Mixtral) or sigmoid (DeepSeek-V3) scores."""
    logits = logits.astype(jnp.float32)
    if config.scoring_func == "softmax":
        scores = jax.nn.softmax(logits, axis=-1)
        shares = scores
    else:
        scores = jax.nn.sigmoid(logits)
        shares = scores / (scores.sum(-1, keepdims=True) + 1e-20)
    weights, experts = jax.lax.top_k(scores, config.num_experts_per_tok)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return Routing(experts, weights, shares, logits)


def auxiliary_loss(routing: Routing, segment_ids: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Load-balancing loss and router z-loss, spread over tokens.

    The balancing loss of a group of tokens is `E * sum_e f_e P_e` with `f_e` the share of assignments and `P_e` the mean
    score of expert e. A group is one segment (`seq_aux`, DeepSeek-V2, arXiv:2405.04434) or the whole batch (Switch,
    arXiv:2101.03961). Each token carries its group's loss, so that weighting tokens and summing is exact for packed rows and
    for accumulated micro-batches.

    Args:
        routing: of the M = B * T tokens of a batch.
        segment_ids: `[B, T]`; padding (0) does not count.
        config: coefficients and the choice of group.

    Returns:
        `[B, T]` float32 loss per token, coefficients included, and `[E]` the share of assignments each expert received.
    """
    batch, length = segment_ids.shape
    experts = config.num_experts
    real = (segment_ids.reshape(-1) > 0).astype(jnp.float32)  # [M]
    chosen = jax.nn.one_hot(routing.experts, experts, dtype=jnp.float32).sum(1) * real[:, None]  # [M, E]
    scores = routing.scores * real[:, None]
    total = jnp.maximum(real.sum(), 1.0)
    load = chosen.sum(0) / (total * config.num_experts_per_tok)
    if config.seq_aux:
        groups = (segment_ids + (length + 1) * jnp.arange(batch)[:, None]).reshape(-1)
        group_sum = functools.partial(jax.ops.segment_sum, segment_ids=groups, num_segments=batch * (length + 1))
        count = jnp.maximum(group_sum(real), 1.0)[:, None]
        share = group_sum(chosen) / (count * config.num_experts_per_tok)  # [B * (T + 1), E]
        balance = (experts * share * group_sum(scores) / count).sum(-1)[groups]
    else:
        balance = jnp.broadcast_to(experts * (load * scores.sum(0) / total).sum(), real.shape)
    z = jax.nn.logsumexp(routing.logits, axis=-1) ** 2
    loss = config.router_aux_loss_coef * balance + config.router_z_loss_coef * z
    return (loss * real).reshape(batch, length), jax.lax.stop_gradient(load)


def moe_mlp(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, routing: Routing) -> jax.Array:
    """Send tokens through their experts' SwiGLU layers and sum the weighted results.

    Args:
        x: `[M, D]`.
        gate: `[E, D, F]`.
        up: `[E, D, F]`.
        down: `[E, F, D]`.
        routing: k experts and weights per token.

    Returns:
        `[M, D]` in the dtype of `x`.
    """
    tokens, k = routing.experts.shape
    assigned = routing.experts.reshape(-1)  # [M * k]
    order = jnp.argsort(assigned, stable=True)
    inverse = jnp.argsort(order)
    sizes = jnp.bincount(assigned, length=gate.shape[0])
    rows = _dispatch(x, order, inverse, k)  # [M * k, D], grouped by expert
    hidden = jax.nn.silu(grouped_matmul(rows, gate, sizes)) * grouped_matmul(rows, up, sizes)
    outputs = _unsort(grouped_matmul(hidden, down, sizes), order, inverse)
    outputs = outputs.reshape(tokens, k, -1)
    return jnp.einsum("mkd,mk->md", outputs, routing.weights.astype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dispatch(x: jax.Array, order: jax.Array, inverse: jax.Array, k: int) -> jax.Array:
    """Copy each token k times, in sorted order. Its transpose is a gather as well, which a derived scatter is not."""
    return x[order // k]


def _dispatch_fwd(x: jax.Array, order: jax.Array, inverse: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    return x[order // k], inverse


def _dispatch_bwd(k: int, inverse: jax.Array, g: jax.Array) -> tuple[jax.Array, None, None]:
    return g[inverse].reshape(-1, k, g.shape[-1]).sum(1), None, None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def _unsort(y: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    return y[inverse]


def _unsort_fwd(y: jax.Array, order: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
    return y[inverse], order


def _unsort_bwd(order: jax.Array, g: jax.Array) -> tuple[jax.Array, None, None]:
    return g[order], None, None


_unsort.defvjp(_unsort_fwd, _unsort_bwd)


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
class _Blocks:
    """Layout in which every group starts on a block boundary."""

    source: jax.Array  # [P] row that fills each padded slot
    filled: jax.Array  # [P] whether it is a row at all
    target: jax.Array  # [M] padded slot of each row
    group: jax.Array  # [P / BLOCK] group of each block
    used: jax.Array  # scalar, blocks in use


def _layout(rows: int, sizes: jax.Array) -> _Blocks:
    groups = sizes.shape[0]
    blocks = -(-rows // BLOCK) + groups  # no layout needs more
    blocks_of = -(-sizes // BLOCK)
    first_block = jnp.cumsum(blocks_of) - blocks_of
    first_row = jnp.cumsum(sizes) - sizes
    group = jnp.minimum(jnp.searchsorted(jnp.cumsum(blocks_of), jnp.arange(blocks), side="right"), groups - 1)
    slot = jnp.arange(blocks * BLOCK)
    slot_group = jnp.repeat(group, BLOCK)
    within = slot - first_block[slot_group] * BLOCK
    row_group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows), side="right")
    return _Blocks(
        source=jnp.clip(first_row[slot_group] + within, 0, rows - 1),
        filled=within < sizes[slot_group],
        target=first_block[row_group] * BLOCK + jnp.arange(rows) - first_row[row_group],
        group=group,
        used=blocks_of.sum(),
    )


def _pad(x: jax.Array, layout: _Blocks) -> jax.Array:
    padded = jnp.where(layout.filled[:, None], x[layout.source], 0)
    return padded.reshape(-1, BLOCK, x.shape[-1])  # [P / BLOCK, BLOCK, D]


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


def _blocked_bwd(
    residuals: tuple[jax.Array, jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, w, sizes = residuals
    layout = _layout(x.shape[0], sizes)
    rows, grads = _pad(x, layout), _pad(g, layout)

    def body(i: jax.Array, dw: jax.Array) -> jax.Array:
        return dw.at[layout.group[i]].add(rows[i].T @ grads[i])

    dw = jax.lax.fori_loop(0, layout.used, body, jnp.zeros_like(w))
    return _multiply(g, w, layout, transpose=True), dw, None


_blocked_matmul.defvjp(_blocked_fwd, _blocked_bwd)
