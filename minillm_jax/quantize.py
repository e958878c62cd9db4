"""Weights as 8-bit integers: symmetric, with one scale for each output of a matrix.

A tree of parameters goes in, and the same tree comes out with int8 in place of its matrices and their scales beside
them; the model multiplies by the integers and scales the product, which is the same thing. Embeddings, norms, biases
and routers, small or read in other ways, stay as they are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from minillm_jax.model import Params

LARGEST = 127


def quantize_matrix(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Round `[…, in, out]` to int8 and float32 scales `[…, out]`; no element is off by more than half its scale."""
    scale = jnp.abs(weight).max(-2).astype(jnp.float32) / LARGEST
    steps = jnp.round(weight / jnp.where(scale > 0, scale, 1.0)[..., None, :])
    return steps.astype(jnp.int8), scale


def dequantize_matrix(steps: jax.Array, scale: jax.Array) -> jax.Array:
    """Return the float32 matrix that `quantize_matrix` rounded to."""
    return steps.astype(jnp.float32) * scale[..., None, :]


def quantize(params: Params) -> Params:
    """Quantise the matrices of all layers, those of experts included, and an untied head.

    A weight `kernel` becomes int8 and gets the neighbour `kernel_scale`; an expert's likewise by its own name.
    """
    return _walk(params, inside=False)


def _walk(tree: Params, inside: bool) -> Params:
    out: dict[str, Any] = {}
    for name, part in tree.items():
        if isinstance(part, dict):
            out[name] = part if name == "router" else _walk(part, inside or name in ("layers", "lm_head"))
        elif inside and (name == "kernel" or name.endswith("_proj")):
            out[name], out[f"{name}_scale"] = quantize_matrix(part)
        else:
            out[name] = part
    return out


def dequantize(params: Params) -> Params:
    """Return plain parameters with the values that `quantize` rounded to."""
    out: dict[str, Any] = {}
    for name, part in params.items():
        if isinstance(part, dict):
            out[name] = dequantize(part)
        elif f"{name}_scale" in params:
            out[name] = dequantize_matrix(part, params[f"{name}_scale"])
        elif not (name.endswith("_scale") and name.removesuffix("_scale") in params):
            out[name] = part
    return out
