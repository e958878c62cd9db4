"""Token log-probabilities, cross-entropy and masked reductions.

Every loss keeps its sum and its weight apart, `(loss_sum, (weight, metrics))`, with metrics as `(sum, weight)` pairs,
so that adding micro-batches or shards and dividing once at the end gives exactly the loss of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from minillm_jax.config import ComputeConfig, ModelConfig
from minillm_jax.model import Params, forward_hidden, unembed

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
    batch, length = targets.shape
    chunks = math.ceil(batch * length * config.vocab_size * 4 / LOGITS_BYTES)
    if chunks <= 1:
        return logprobs_from_logits(unembed(params, config, hidden), targets)
    size = math.ceil(batch * length / chunks)
    padding = chunks * size - batch * length
    flat = jnp.pad(hidden.reshape(batch * length, -1), ((0, padding), (0, 0))).reshape(chunks, size, -1)
    ids = jnp.pad(targets.reshape(-1), (0, padding)).reshape(chunks, size)

    @jax.checkpoint
    def chunk(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        return logprobs_from_logits(unembed(params, config, args[0]), args[1])

    return jax.lax.map(chunk, (flat, ids)).reshape(-1)[: batch * length].reshape(batch, length)


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
            compute=compute,
        )
        weights = batch["weights"]
        weight = weights.sum()
        cross_entropy = -(token_logprobs(params, config, output.hidden, batch["targets"]) * weights).sum()
        metrics: Metrics = {"loss": (cross_entropy, weight)}
        if output.router_loss is None or output.expert_load is None:
            return cross_entropy, (weight, metrics)
        router_loss = (output.router_loss * weights).sum()
        metrics["router_loss"] = (router_loss, weight)
        metrics["expert_load_max"] = (output.expert_load.max() * weight, weight)
        return cross_entropy + router_loss, (weight, metrics)

    return loss_fn
