"""Rotary position embedding and its extensions to longer contexts.

Positions go in, tables of cosines and sines come out, and heads are turned by them. Frequencies are computed in
float64 on the
host: they are constants of the compiled program.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from minillm_jax.config import ModelConfig, RopeScaling


def rope_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Rotary frequencies `[H/2]` in radians per token, and the factor on cos and sin.

    Plain RoPE (arXiv:2104.09864), or rescaled as `config.rope_scaling` says.
    """
    size = config.head_size
    frequencies = config.rope_theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies.astype(np.float32), 1.0
    if scaling.rope_type == "linear":
        return (frequencies / scaling.factor).astype(np.float32), 1.0
    if scaling.rope_type == "llama3":
        return _llama3_frequencies(frequencies, scaling).astype(np.float32), 1.0
    attention_factor = scaling.attention_factor
    if attention_factor is None:
        attention_factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return _yarn_frequencies(frequencies, scaling, size, config.rope_theta).astype(np.float32), attention_factor


def _yarn_frequencies(frequencies: np.ndarray, scaling: RopeScaling, size: int, theta: float) -> np.ndarray:
    def dimension(rotations: float) -> float:
        """Index of the dimension that turns this often within the original context."""
        wavelength = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return size * math.log(wavelength) / (2 * math.log(theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), size - 1)
    ramp = np.clip((np.arange(size // 2) - low) / max(high - low, 1e-3), 0, 1)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)


def _llama3_frequencies(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0, 1)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def rope_tables(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines `[B, T, 1, H/2]` float32 for `[B, T]` positions."""
    frequencies, factor = rope_frequencies(config)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate `[B, T, N, H]` heads; element i is paired with i + H/2, as in Llama checkpoints."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
