"""Reward models: a transformer with a scalar head, read at the last real token.

Their parameters are those of a language model with `score/kernel` `[D, 1]` beside them; where embeddings are not tied,
the output head is gone.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from minillm_jax.config import ComputeConfig, ModelConfig
from minillm_jax.matmul import matmul
from minillm_jax.model import Params, forward_hidden


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def reward_scores(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    segment_ids: jax.Array | None = None,
    compute: ComputeConfig = ComputeConfig(),
) -> jax.Array:
    """Score whole sequences.

    Args:
        params: of a reward model.
        config: its shape.
        tokens: `[B, T]` ints, one sequence a row.
        segment_ids: `[B, T]`, 1 for real tokens and 0 for padding on the right; None means no padding.
        compute: dtype and attention implementation.

    Returns:
        `[B]` float32, the head's value at each row's last real token.
    """
    segment_ids = jnp.ones(jnp.shape(tokens), jnp.int32) if segment_ids is None else segment_ids
    hidden = forward_hidden(params, config, tokens, segment_ids=segment_ids, compute=compute).hidden
    last = jnp.maximum(segment_ids.sum(-1) - 1, 0)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]  # [B, D]
    return matmul(hidden, params["score"]["kernel"].astype(hidden.dtype))[:, 0].astype(jnp.float32)
