"""Mixture of experts: route, sort by expert, one grouped product per projection, combine.

Router logits go in, each token's experts and weights come out; tokens and weights go in, outputs come out. The
balancing loss is returned per token, never stored on the side. No token is dropped unless a capacity is asked for.
Everything here is the layer of one device; `expert_parallel` runs it on a mesh.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

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
        kept: `[M, k]` which assignments their expert has room for; None if all.
    """

    experts: jax.Array
    weights: jax.Array
    scores: jax.Array
    logits: jax.Array
    kept: jax.Array | None = None


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


def expert_capacities(length: int, config: ModelConfig) -> np.ndarray | None:
    """Assignments that one expert takes from a row, by the row's number n of tokens: `ceil(factor * n * k / E)`.

    Args:
        length: of a row, T.
        config: its `expert_capacity_factor`.

    Returns:
        `[T + 1]` int32, or None where there is no limit.
    """
    if config.expert_capacity_factor is None:
        return None
    even = np.arange(length + 1) * config.num_experts_per_tok / config.num_experts
    # 1.1 * 50 is a little more than 55; such a remainder is no reason for one place more.
    return np.ceil(np.round(config.expert_capacity_factor * even, 6)).astype(np.int32)


def limit_to_capacity(
    routing: Routing, segment_ids: jax.Array, config: ModelConfig
) -> tuple[Routing, jax.Array | None]:
    """Drop what exceeds an expert's capacity (GShard, arXiv:2006.16668; Switch, arXiv:2101.03961).

    GShard's groups are the rows of the batch here: a row is never split over devices or micro-batches, so what is
    dropped depends on neither. Earlier tokens come first, so that a token never pushes out one before it. Padding
    takes no place and is not sent anywhere.

    Args:
        routing: of the M = B * T tokens of a batch.
        segment_ids: `[B, T]`; padding is 0.
        config: the factor; with None for it everything stays as it is.

    Returns:
        The routing with `kept`, and the share of assignments that were dropped; None if there is no limit.
    """
    batch, length = segment_ids.shape
    capacities = expert_capacities(length, config)
    if capacities is None:
        return routing, None
    real = segment_ids > 0
    experts = routing.experts.reshape(batch, length, -1)
    chosen = jax.nn.one_hot(experts, config.num_experts, dtype=jnp.int32).sum(2) * real[..., None]  # [B, T, E]
    before = jnp.cumsum(chosen, axis=1) - chosen
    place = jnp.take_along_axis(before, experts, axis=2)  # [B, T, k]
    capacity = jnp.asarray(capacities)[real.sum(1)]  # [B]
    kept = (place < capacity[:, None, None]) & real[..., None]
    total = jnp.maximum(real.sum() * config.num_experts_per_tok, 1)
    return dataclasses.replace(routing, kept=kept.reshape(routing.experts.shape)), 1.0 - kept.sum() / total


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
    most: int | None = None,
) -> jax.Array:
    """Send tokens through their experts' SwiGLU layers and sum the weighted results.

    Args:
        x: `[M, D]`.
        gate: `[E, D, F]`.
        up: `[E, D, F]`.
        down: `[E, F, D]`.
        routing: k experts and weights per token; what is not `kept` adds nothing and may name any expert.
        adapters: what is added to the three products.
        most: upper bound of the assignments kept, which is how many rows are laid out; None for M * k.

    Returns:
        `[M, D]` in the dtype of `x`.
    """
    tokens, k = routing.experts.shape
    sort = sort_by_expert(routing, gate.shape[0])
    rows = dispatch(x, sort, k, most)

    def adapted(adapter: LowRank, rows: jax.Array, product: Product) -> jax.Array:
        if adapter.a.ndim == 4:  # [B, E, in, r]: a row of the batch has an adapter of its own
            place = sort.order[: rows.shape[0]]
            mine = place // k * adapter.a.shape[0] // tokens, routing.experts.reshape(-1)[place]
            return LowRank(adapter.a[mine], adapter.b[mine])(rows, rowwise_matmul)
        return adapter(rows, product)

    all_in_use = routing.kept is None
    return combine(expert_mlps(rows, (gate, up, down), sort.sizes, adapters, adapted, all_in_use), sort, routing)


Product = Callable[[jax.Array, jax.Array], jax.Array]
"""Multiplies rows `[R, in]`, expert after expert, by one matrix each of `[E, in, out]`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sorted:
    """M * k assignments, expert after expert; those that are not kept come last.

    Attributes:
        order: `[M * k]` assignment in each place.
        inverse: `[M * k]` place of each assignment.
        sizes: `[E]` kept assignments of each expert.
    """

    order: jax.Array
    inverse: jax.Array
    sizes: jax.Array


def sort_by_expert(routing: Routing, num_experts: int) -> Sorted:
    """Sort assignments by expert, and by token within one."""
    assigned = routing.experts.reshape(-1)  # [M * k]
    if routing.kept is not None:
        assigned = jnp.where(routing.kept.reshape(-1), assigned, num_experts)
    order = jnp.argsort(assigned, stable=True)
    return Sorted(order, jnp.argsort(order), jnp.bincount(assigned, length=num_experts))


def dispatch(x: jax.Array, sort: Sorted, k: int, most: int | None = None) -> jax.Array:
    """Copy tokens `[M, D]` into the first `most` places of the order (all M * k for None): `[most, D]`."""
    places = sort.order.shape[0]
    return _dispatch(x, sort.order, sort.inverse, k, places if most is None else min(most, places))


def combine(outputs: jax.Array, sort: Sorted, routing: Routing) -> jax.Array:
    """Sum the outputs `[R, D]` of the first R places over each token's experts, weighted: `[M, D]`."""
    outputs = _unsort(outputs, sort.order, sort.inverse)
    if routing.kept is not None:
        outputs = jnp.where(routing.kept.reshape(-1, 1), outputs, 0)
    outputs = outputs.reshape(*routing.experts.shape, -1)
    return jnp.einsum("mkd,mk->md", outputs, routing.weights.astype(outputs.dtype))


def expert_mlps(
    rows: jax.Array,
    weights: tuple[jax.Array, ...],
    sizes: jax.Array,
    adapters: tuple[LowRank | None, ...],
    adapted: Callable[[LowRank, jax.Array, Product], jax.Array],
    all_in_use: bool,
) -> jax.Array:
    """Run each expert's SwiGLU layer on its rows.

    Args:
        rows: `[R, D]`, expert after expert.
        weights: gate and up `[E, D, F]`, and down `[E, F, D]`.
        sizes: `[E]` rows of each expert.
        adapters: what is added to the three products.
        adapted: applies one of them to rows, given the grouped product.
        all_in_use: whether the sizes sum to R; rows behind them cost no product, and come out as zeros.

    Returns:
        `[R, D]`.
    """
    used = None if all_in_use else (jnp.arange(rows.shape[0]) < sizes.sum())[:, None]
    grouped = functools.partial(grouped_matmul, sizes=sizes)

    def tidy(y: jax.Array) -> jax.Array:  # what a product leaves in rows of no group is anything, both ways
        return y if used is None else jnp.where(used, y, 0)

    def project(rows: jax.Array, weight: jax.Array, adapter: LowRank | None) -> jax.Array:
        y = grouped(rows, weight)
        return tidy(y if adapter is None else y + adapted(adapter, rows, grouped))

    rows = tidy(rows)
    hidden = jax.nn.silu(project(rows, weights[0], adapters[0])) * project(rows, weights[1], adapters[1])
    return project(hidden, weights[2], adapters[2])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _dispatch(x: jax.Array, order: jax.Array, inverse: jax.Array, k: int, most: int) -> jax.Array:
    """Copy each token k times, in sorted order. Its transpose is a gather as well, which a derived scatter is not."""
    return x[order[:most] // k]


def _dispatch_fwd(x: jax.Array, order: jax.Array, inverse: jax.Array, k: int, most: int) -> tuple[jax.Array, jax.Array]:
    return x[order[:most] // k], inverse


def _dispatch_bwd(k: int, most: int, inverse: jax.Array, g: jax.Array) -> tuple[jax.Array, None, None]:
    copies = g[inverse] if most == inverse.shape[0] else g.at[inverse].get(mode="fill", fill_value=0)
    return copies.reshape(-1, k, g.shape[-1]).sum(1), None, None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def _unsort(y: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    return y.at[inverse].get(mode="clip") if y.shape[0] < inverse.shape[0] else y[inverse]


def _unsort_fwd(y: jax.Array, order: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _unsort(y, order, inverse), order[: y.shape[0]]


def _unsort_bwd(order: jax.Array, g: jax.Array) -> tuple[jax.Array, None, None]:
    return g[order], None, None


_unsort.defvjp(_unsort_fwd, _unsort_bwd)
