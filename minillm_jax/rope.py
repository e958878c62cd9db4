"""Rotary position embedding and its extensions to longer contexts.

Positions go in, tables of cosines and sines come out, and heads are turned by them. Frequencies are computed on the
host, as constants of the compiled program, and in float32 step by step as `transformers` does: a frequency nearer to
the truth by one bit would turn a head at position 100,000 by a hundredth of a radian more than its training did.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from minillm_jax.config import ModelConfig, RopeScaling


def rope_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Rotary frequencies `[H/2]` float32 in radians per token, and the factor on cos and sin.

    Plain RoPE (arXiv:2104.09864), or rescaled as `config.rope_scaling` says.
    """
    size = config.head_size
    exponents = np.arange(0, size, 2).astype(np.float32) / np.float32(size)
    wavelengths = np.float32(config.rope_theta) ** exponents  # in tokens per radian
    scaling = config.rope_scaling
    if scaling is None:
        return 1 / wavelengths, 1.0
    if scaling.rope_type == "linear":
        return 1 / wavelengths / np.float32(scaling.factor), 1.0
    if scaling.rope_type == "llama3":
        return _llama3_frequencies(1 / wavelengths, scaling), 1.0
    attention_factor = scaling.attention_factor
    if attention_factor is None:
        attention_factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return _yarn_frequencies(wavelengths, scaling, config.rope_theta), attention_factor


def _yarn_frequencies(wavelengths: np.ndarray, scaling: RopeScaling, theta: float) -> np.ndarray:
    size = 2 * len(wavelengths)

    def dimension(rotations: float) -> float:
        """Index of the dimension that turns this often within the original context."""
        wavelength = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return size * math.log(wavelength) / (2 * math.log(theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), size - 1)
    ramp = (np.arange(len(wavelengths)) - low).astype(np.float32) / np.float32(high - low or 1e-3)
    kept = 1 - np.clip(ramp, 0, 1)
    return 1 / (np.float32(scaling.factor) * wavelengths) * (1 - kept) + 1 / wavelengths * kept


def _llama3_frequencies(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    turns = np.float32(scaling.original_max_position_embeddings) / (np.float32(2 * math.pi) / frequencies)
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - blend) * frequencies / np.float32(scaling.factor) + blend * frequencies


def rope_tables(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines `[B, T, 1, H/2]` float32 for `[B, T]` positions."""
    frequencies, factor = rope_frequencies(config)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate `[B, T, N, H]` heads; element i is paired with i + H/2, as in Llama checkpoints."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
