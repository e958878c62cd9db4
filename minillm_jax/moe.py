"""Mixture of experts without dropped tokens: route, sort by expert, one grouped product per projection, combine.

Router logits go in, each token's experts and weights come out; tokens and weights go in, outputs come out. The
balancing loss is returned per token, never stored on the side.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from minillm_jax.cache import BRANCH
from minillm_jax.config import ModelConfig
from minillm_jax.matmul import LowRank, grouped_matmul, rowwise_matmul


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
    """Choose experts from `[M, E]` router logits: top-k of softmax (Mixtral) or sigmoid (DeepSeek-V3) scores."""
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


def auxiliary_loss(
    routing: Routing, segment_ids: jax.Array, config: ModelConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Load-balancing loss and router z-loss of one layer, spread over tokens.

    The balancing loss of a group of tokens is `E * sum_e f_e P_e` with `f_e` the share of assignments and `P_e` the
    mean score of expert e. A group is one segment (DeepSeek-V2, arXiv:2405.04434) or the whole batch (Switch,
    arXiv:2101.03961), as `router_aux_loss_scope` says; `model` leaves balancing to `model_balancing_loss`. Each token
    carries its group's loss, so that weighting tokens and summing is exact for packed rows and for accumulated
    micro-batches.

    Args:
        routing: of the M = B * T tokens of a batch.
        segment_ids: `[B, T]`; padding (0) does not count.
        config: coefficients and the choice of group.

    Returns:
        `[B, T]` float32 loss per token, coefficients included; `[E]` the share of assignments each expert received;
        `[E]` each expert's mean score.
    """
    batch, length = segment_ids.shape
    experts = config.num_experts
    real = (segment_ids.reshape(-1) > 0).astype(jnp.float32)  # [M]
    chosen = jax.nn.one_hot(routing.experts, experts, dtype=jnp.float32).sum(1) * real[:, None]  # [M, E]
    scores = routing.scores * real[:, None]
    total = jnp.maximum(real.sum(), 1.0)
    load, mean_scores = chosen.sum(0) / (total * config.num_experts_per_tok), scores.sum(0) / total
    if config.router_aux_loss_scope == "sequence":
        groups = (segment_ids % BRANCH + (length + 1) * jnp.arange(batch)[:, None]).reshape(-1)
        group_sum = functools.partial(jax.ops.segment_sum, segment_ids=groups, num_segments=batch * (length + 1))
        count = jnp.maximum(group_sum(real), 1.0)[:, None]
        share = group_sum(chosen) / (count * config.num_experts_per_tok)  # [B * (T + 1), E]
        balance = (experts * share * group_sum(scores) / count).sum(-1)[groups]
    elif config.router_aux_loss_scope == "batch":
        balance = jnp.broadcast_to(experts * (load * mean_scores).sum(), real.shape)
    else:
        balance = jnp.zeros_like(real)
    z = jax.nn.logsumexp(routing.logits, axis=-1) ** 2
    loss = config.router_aux_loss_coef * balance + config.router_z_loss_coef * z
    return (loss * real).reshape(batch, length), jax.lax.stop_gradient(load), mean_scores


def model_balancing_loss(
    load: jax.Array, mean_scores: jax.Array, segment_ids: jax.Array, config: ModelConfig
) -> jax.Array:
    """Load-balancing loss over all layers at once, as `transformers` has it for Mixtral and Qwen3-MoE.

    `E * sum_e f_e P_e`, where `f_e` and `P_e` are means over all layers and tokens, and `f_e` counts assignments: it
    sums to `num_experts_per_tok` instead of 1.

    Args:
        load: `[L, E]` from `auxiliary_loss`; likewise mean_scores.
        mean_scores: `[L, E]`.
        segment_ids: `[B, T]`; padding (0) does not count.
        config: the coefficient.

    Returns:
        `[B, T]` float32, the same for every token that counts.
    """
    counts = config.num_experts_per_tok * load.mean(0)
    balance = config.num_experts * (counts * mean_scores.mean(0)).sum()
    return config.router_aux_loss_coef * balance * (segment_ids > 0)


def moe_mlp(
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    routing: Routing,
    adapters: tuple[LowRank | None, ...] = (None, None, None),
) -> jax.Array:
    """Send tokens through their experts' SwiGLU layers and sum the weighted results.

    Args:
        x: `[M, D]`.
        gate: `[E, D, F]`.
        up: `[E, D, F]`.
        down: `[E, F, D]`.
        routing: k experts and weights per token.
        adapters: what is added to the three products.

    Returns:
        `[M, D]` in the dtype of `x`.
    """
    tokens, k = routing.experts.shape
    assigned = routing.experts.reshape(-1)  # [M * k]
    order = jnp.argsort(assigned, stable=True)
    inverse = jnp.argsort(order)
    sizes = jnp.bincount(assigned, length=gate.shape[0])
    rows = _dispatch(x, order, inverse, k)  # [M * k, D], grouped by expert
    grouped = functools.partial(grouped_matmul, sizes=sizes)

    def project(rows: jax.Array, weight: jax.Array, adapter: LowRank | None) -> jax.Array:
        y = grouped(rows, weight)
        if adapter is None:
            return y
        if adapter.a.ndim == 4:  # [B, E, in, r]: a row of the batch has an adapter of its own
            mine = order // k * adapter.a.shape[0] // tokens, assigned[order]
            return y + LowRank(adapter.a[mine], adapter.b[mine])(rows, rowwise_matmul)
        return y + adapter(rows, grouped)

    hidden = jax.nn.silu(project(rows, gate, adapters[0])) * project(rows, up, adapters[1])
    outputs = _unsort(project(hidden, down, adapters[2]), order, inverse)
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
