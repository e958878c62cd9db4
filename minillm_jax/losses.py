"""Token log-probabilities, cross-entropy and masked reductions.

Every loss keeps its sum and its weight apart, `(loss_sum, (weight, metrics))`, with metrics as `(sum, weight)` pairs,
so that adding micro-batches or shards and dividing once at the end gives exactly the loss of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from minillm_jax.config import ComputeConfig, ModelConfig
from minillm_jax.model import ModelOutput, Params, forward_hidden, unembed

Batch = dict[str, jax.Array]
Metrics = dict[str, tuple[jax.Array, jax.Array]]
LossFn = Callable[[Params, Any, Batch, jax.Array | None], tuple[jax.Array, tuple[jax.Array, Metrics]]]
"""`loss_fn(params, frozen, batch, key) -> (loss_sum, (weight, metrics))`; no key means no dropout."""

LOGITS_BYTES = 2**30
"""Logits larger than this are computed in chunks of tokens and recomputed in the backward pass."""


def logprobs_from_logits(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Log-probability of each target.

    Args:
        logits: `[..., V]` float32.
        targets: `[...]` ints.

    Returns:
        `[...]` float32.
    """
    # A comparison fuses with the reduction both ways; a gather would scatter into all logits on the way back.
    hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    chosen = jnp.where(hit, logits, 0.0).sum(-1)
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def token_logprobs(params: Params, config: ModelConfig, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """Log-probability of each target token from final hidden states.

    Args:
        params: model parameters (the output head is read).
        config: the model's shape.
        hidden: `[B, T, D]`.
        targets: `[B, T]` ints.

    Returns:
        `[B, T]` float32.
    """

    def logprobs(hidden: jax.Array, targets: jax.Array) -> jax.Array:
        return logprobs_from_logits(unembed(params, config, hidden), targets)

    return map_tokens(logprobs, (hidden, targets), config.vocab_size)


def token_logprobs_and_entropy(
    params: Params, config: ModelConfig, hidden: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target token, and the entropy in nats of the distribution that it is drawn from.

    Arguments are those of `token_logprobs`; both results are `[B, T]` float32.
    """

    def measure(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = unembed(params, config, hidden)
        mean_logit = (jax.nn.softmax(logits, axis=-1) * logits).sum(-1)
        return logprobs_from_logits(logits, targets), jax.nn.logsumexp(logits, axis=-1) - mean_logit

    return map_tokens(measure, (hidden, targets), config.vocab_size)


def map_tokens(function: Callable[..., Any], arrays: tuple[jax.Array, ...], logits_per_token: int) -> Any:
    """Apply a function that makes logits on the way, in chunks of tokens when they would exceed LOGITS_BYTES.

    Args:
        function: takes arrays `[..., *]` and returns a tree of arrays `[..., *]`, token by token.
        arrays: its arguments, `[B, T, *]` each.
        logits_per_token: floats that it makes per token.

    Returns:
        The tree of arrays `[B, T, *]`.
    """
    batch, length = arrays[0].shape[:2]
    chunks = math.ceil(batch * length * logits_per_token * 4 / LOGITS_BYTES)
    if chunks <= 1:
        return function(*arrays)
    size = math.ceil(batch * length / chunks)

    def split(x: jax.Array) -> jax.Array:
        flat = x.reshape(batch * length, *x.shape[2:])
        padded = jnp.pad(flat, [(0, chunks * size - batch * length)] + [(0, 0)] * (flat.ndim - 1))
        return padded.reshape(chunks, size, *x.shape[2:])

    def join(x: jax.Array) -> jax.Array:
        return x.reshape(chunks * size, *x.shape[2:])[: batch * length].reshape(batch, length, *x.shape[2:])

    chunk = jax.checkpoint(lambda parts: function(*parts))
    return jax.tree.map(join, jax.lax.map(chunk, tuple(split(x) for x in arrays)))


def masked_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted mean over all elements; 0 where the weights sum to nothing."""
    total = weights.sum()
    return jnp.where(total > 0, (values * weights).sum() / jnp.where(total > 0, total, 1.0), 0.0)


def language_model_loss(config: ModelConfig, compute: ComputeConfig) -> LossFn:
    """Make the next-token loss of pretraining and SFT: weighted cross-entropy plus the router's auxiliary loss.

    The batch holds `tokens targets weights segment_ids positions`, each `[B, T]`. Both terms are per token and share
    the loss weights.
    """

    def loss_fn(
        params: Params, frozen: Any, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        output = forward_hidden(
            params,
            config,
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            dropout_key=key,
            branched=False,
            compute=compute,
        )
        weights = batch["weights"]
        weight = weights.sum()
        cross_entropy = -(token_logprobs(params, config, output.hidden, batch["targets"]) * weights).sum()
        metrics: Metrics = {"loss": (cross_entropy, weight)}
        router_loss, router_metrics = router_terms(output, weights)
        return cross_entropy + router_loss, (weight, metrics | router_metrics)

    return loss_fn


def router_terms(output: ModelOutput, weights: jax.Array) -> tuple[jax.Array | float, Metrics]:
    """Sum the router's auxiliary loss over tokens of weights `[B, T]`, with what to log; nothing for a dense model."""
    if output.router_loss is None or output.expert_load is None:
        return 0.0, {}
    weight = weights.sum()
    router_loss = (output.router_loss * weights).sum()
    metrics = {
        "router_loss": (router_loss, weight),
        "expert_load_max": (output.expert_load.max() * weight, weight),
    }
    if output.dropped_share is not None:
        metrics["dropped_share"] = (output.dropped_share.mean() * weight, weight)
    return router_loss, metrics


def reweighted(loss_fn: LossFn, token_ids: Sequence[int], factor: float) -> LossFn:
    """Make a loss in which targets among `token_ids` weigh `factor` times as much.

    The weight sum counts them `factor` times too, so the result is still a weighted mean, and untrained targets stay
    untrained.
    """
    ids = jnp.asarray(token_ids, jnp.int32)

    def reweighted_loss(
        params: Params, frozen: Any, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        factors = jnp.where(jnp.isin(batch["targets"], ids), factor, 1.0)
        return loss_fn(params, frozen, batch | {"weights": batch["weights"] * factors}, key)

    return reweighted_loss
