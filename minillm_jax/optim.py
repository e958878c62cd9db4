"""Learning-rate schedules and optimizers.

`OptimConfig` and the parameters' names go in, an optax transformation comes out. Which rule a parameter follows is read
off its path, so the same code serves full models, adapters and value heads; schedule, clipping and decay are shared by
AdamW and Muon, so that one learning rate fits both.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from minillm_jax.config import ConfigError, OptimConfig

MATRIX_NAMES = frozenset({"kernel", "gate_proj", "up_proj", "down_proj", "a", "b"})
"""Last path component of weights that multiply activations: dense kernels, expert stacks, an adapter's factors."""
ADAPTER_NAMES = frozenset({"a", "b"})

MUON_MOMENTUM = 0.95
MUON_RMS = 0.2
"""Root mean square of a Muon update at rate 1, close to AdamW's own (arXiv:2502.16982)."""
_LAST_TWO_AXES = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)


def make_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Make the learning rate as a function of the number of steps already taken.

    The rate rises linearly for `warmup_ratio` of all steps and takes its peak at the last of them; step 0 already
    moves. Then `cosine` falls to `min_lr_ratio` of the peak at the last step, `wsd` stays and falls linearly to the
    same rate over the last `decay_ratio` of all steps (arXiv:2404.06395), and `constant` stays. Later steps keep the
    last step's rate.

    Args:
        config: peak rate, shape and ratios.
        total_steps: optimizer steps of the whole run.

    Returns:
        Function from a step count (an int or an int32 scalar, traced or not) to a float32 scalar.

    Raises:
        ConfigError: a ratio is out of range, or warm-up and decay overlap.
    """
    _check_schedule(config, total_steps)
    warmup = max(1, round(config.warmup_ratio * total_steps))
    decay = min(round(config.decay_ratio * total_steps), total_steps - warmup)
    final = config.min_lr_ratio

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.minimum(jnp.asarray(count), total_steps - 1).astype(jnp.float32)
        rise = jnp.minimum((step + 1) / warmup, 1.0)
        if config.schedule == "cosine":
            progress = jnp.clip((step + 1 - warmup) / max(1, total_steps - warmup), 0.0, 1.0)
            fall = final + (1 - final) * 0.5 * (1 + jnp.cos(math.pi * progress))
        elif config.schedule == "wsd":
            progress = jnp.clip((step + 1 - (total_steps - decay)) / max(1, decay), 0.0, 1.0)
            fall = 1 - (1 - final) * progress
        else:
            fall = jnp.ones(())
        return config.learning_rate * rise * fall

    return schedule


def _check_schedule(config: OptimConfig, total_steps: int) -> None:
    if total_steps < 1:
        raise ConfigError(f"a run needs at least one step, not {total_steps}")
    for name in ("warmup_ratio", "decay_ratio", "min_lr_ratio"):
        if not 0.0 <= getattr(config, name) <= 1.0:
            raise ConfigError(f"{name} must lie in [0, 1], not {getattr(config, name)}")
    if config.schedule == "wsd" and config.warmup_ratio + config.decay_ratio > 1.0:
        raise ConfigError(
            f"warmup_ratio ({config.warmup_ratio}) and decay_ratio ({config.decay_ratio}) overlap; "
            "their sum may be 1 at most"
        )


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm of all elements of a tree, accumulated in float32 whatever the leaves' dtype."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale gradients down to `max_norm` where their global norm is larger, and leave them as they are where not."""

    def clip(updates: Any, params: Any) -> Any:
        norm = global_norm(updates)
        factor = jnp.where(norm > max_norm, max_norm / norm, 1.0)
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates)

    return optax.stateless(clip)


def decay_mask(params: Any) -> Any:
    """Mark what weight decay shrinks: every matrix that multiplies activations, the head and the router included.

    Norm scales, biases and embedding tables are left alone: a row of an embedding is looked up, not multiplied, and
    decaying rare tokens' rows between their few gradients would erase them.

    Args:
        params: tree of parameters, or of anything else at their places.

    Returns:
        Tree of bools like `params`.
    """
    return jax.tree.map_with_path(lambda path, _: _names(path)[-1] in MATRIX_NAMES, params)


def muon_mask(params: Any) -> Any:
    """Mark what Muon moves: the matrices inside the layers, except routers and adapters.

    The output head, value heads and routers are classifiers, whose outputs are scores of single classes rather than
    features; like embeddings they stay with AdamW, as the author of Muon advises (github.com/KellerJordan/Muon).
    Factors of an adapter stay too: orthogonalising each alone says nothing about their product.

    Args:
        params: tree of parameters, or of anything else at their places.

    Returns:
        Tree of bools like `params`.
    """

    def hidden_matrix(path: Any, _: Any) -> bool:
        *parents, name = _names(path)
        return name in MATRIX_NAMES - ADAPTER_NAMES and "layers" in parents and "router" not in parents

    return jax.tree.map_with_path(hidden_matrix, params)


def _names(path: Any) -> list[str]:
    return [str(getattr(entry, "key", entry)) for entry in path]


def make_optimizer(config: OptimConfig, total_steps: int, params: Any) -> optax.GradientTransformation:
    """Make the optimizer: clip, precondition (Adam or Muon), decay, scale by the schedule.

    Adam is arXiv:1412.6980 with bias correction; decay is decoupled and multiplied by the learning rate
    (arXiv:1711.05101). Muon orthogonalises Nesterov momentum by five Newton-Schulz steps, for each layer and each
    expert alone, and scales it by 0.2 sqrt(max(in, out)) (arXiv:2502.16982), so that AdamW's rate and decay carry over.

    Args:
        config: which optimizer, and its numbers.
        total_steps: optimizer steps of the whole run.
        params: float32 parameters, or their abstract shapes; only their paths are read.

    Returns:
        Transformation whose `update` needs the parameters, and whose state is a pytree of arrays with float32 moments.

    Raises:
        ConfigError: see `make_schedule`.
    """
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.adam_eps, mu_dtype=jnp.float32)
    if config.optimizer == "muon":
        labels = jax.tree.map(lambda is_muon: "muon" if is_muon else "adam", muon_mask(params))
        precondition = optax.partition({"muon": _orthogonalized_momentum(), "adam": adam}, labels)
    else:
        precondition = adam
    return optax.chain(
        *([clip_by_global_norm(config.grad_clip)] if config.grad_clip > 0 else []),
        precondition,
        optax.add_decayed_weights(config.weight_decay, decay_mask(params)),
        optax.scale_by_learning_rate(make_schedule(config, total_steps)),
    )


def _orthogonalized_momentum() -> optax.GradientTransformation:
    """Muon on leaves `[..., in, out]`: all axes but the last two are a batch of independent matrices."""

    def like_adam(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u: MUON_RMS * math.sqrt(max(u.shape[-2:])) * u, updates)

    return optax.chain(
        optax.contrib.scale_by_muon(
            beta=MUON_MOMENTUM,
            mu_dtype=jnp.float32,
            # A function, because inside a partition the tree has holes where other parameters are.
            weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: _LAST_TWO_AXES, tree),
        ),
        optax.stateless(like_adam),
    )
