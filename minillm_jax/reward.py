"""Reward models: a transformer with a scalar head, read at the last real token.

Their parameters are those of a language model with `score/kernel` `[D, 1]` beside them; where embeddings are not tied,
the output head is gone. Their shapes and axes are trees that follow the same rule.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from minillm_jax.config import ComputeConfig, ModelConfig
from minillm_jax.matmul import matmul
from minillm_jax.model import Params, forward_hidden, init_params, param_axes


def is_reward_model(params: Params) -> bool:
    """Tell whether a tree of parameters, shapes or axes is a reward model's."""
    return "score" in params


def scored(tree: Params, head: Any) -> Params:
    """Make a reward model's tree of a language model's, or of another reward model's.

    Args:
        tree: parameters, or their shapes, shardings or axes.
        head: the leaf at `score/kernel`.
    """
    return {name: branch for name, branch in tree.items() if name != "lm_head"} | {"score": {"kernel": head}}


def reward_shapes(config: ModelConfig) -> Params:
    """Abstract float32 parameters of a reward model."""
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    return scored(shapes, jax.ShapeDtypeStruct((config.hidden_size, 1), jnp.float32))


def reward_axes(config: ModelConfig) -> Params:
    """Tree like a reward model's parameters, with each leaf's tuple of logical axis names."""
    return scored(param_axes(config), ("embed", None))


def read_scores(params: Params, hidden: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Read the head at the last real token of each row.

    Args:
        params: of a reward model (its head is read).
        hidden: `[B, T, D]` final hidden states.
        segment_ids: `[B, T]`, 1 for real tokens and 0 for padding on the right.

    Returns:
        `[B]` float32; arbitrary for a row of nothing but padding.
    """
    last = jnp.maximum(segment_ids.sum(-1) - 1, 0)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]  # [B, D]
    return matmul(hidden, params["score"]["kernel"].astype(hidden.dtype))[:, 0].astype(jnp.float32)


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
    hidden = forward_hidden(params, config, tokens, segment_ids=segment_ids, branched=False, compute=compute).hidden
    return read_scores(params, hidden, segment_ids)
