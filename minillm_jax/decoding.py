"""The model as a server runs it: layer after layer, each with arrays of its own, over a cache of slots.

The layers' weights come as a tuple, because cutting one layer out of a stack copies it, which takes as long as the
decoding product itself. The layers are those of `model.py`; one is traced, and called for all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from minillm_jax.config import ComputeConfig, ModelConfig
from minillm_jax.lora import choose_adapters
from minillm_jax.matmul import looped_products
from minillm_jax.model import GATE_UP, QKV, Block, Params, RMSNorm, Shared, compute_dtype, unembed
from minillm_jax.sharding import mesh_of
from minillm_jax.slots import Fresh, LayerSlots, SlotCache


def split_layers(params: Params, config: ModelConfig) -> Params:
    """Lay parameters out for `forward_slots`.

    The stack of layers `[L, …]` becomes a tuple of L trees. Tied embeddings are copied to a head `[D, V]` of their own:
    products of a few rows read a transposed matrix slowly.
    """
    stacked = params["layers"] if mesh_of(params) is not None else join_matrices(params["layers"])
    layers = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(config.num_hidden_layers))
    tied = {"lm_head": {"kernel": params["embed_tokens"]["embedding"].T}} if config.tie_word_embeddings else {}
    return params | tied | {"layers": layers}


def join_matrices(layer: Params) -> Params:
    """Put matrices that multiply the same input beside each other: fewer products of few rows take less time.

    Those with an adapter stay as they are.

    Args:
        layer: parameters of one layer, or of several `[L, …]`.
    """
    attention = _join(layer["self_attn"], ("q_proj", "k_proj", "v_proj"), QKV)
    mlp = _join(layer["mlp"], ("gate_proj", "up_proj"), GATE_UP)
    if "shared" in mlp:
        mlp = mlp | {"shared": _join(mlp["shared"], ("gate_proj", "up_proj"), GATE_UP)}
    return layer | {"self_attn": attention, "mlp": mlp}


def _join(tree: Params, names: tuple[str, ...], joined: str) -> Params:
    parts = [tree[name] for name in names if name in tree]  # experts have an MLP of their own, or none
    if not parts or any("lora" in key for part in parts for key in part):
        return tree
    rest = {key: value for key, value in tree.items() if key not in names}
    return rest | {joined: {key: jnp.concatenate([part[key] for part in parts], -1) for key in parts[0]}}


def choose(params: Params, adapters: jax.Array) -> Params:
    """Take the factors of the chosen adapters, a scalar or one a row `[B]`, out of parameters that hold several."""
    return params | {"layers": choose_adapters(params["layers"], adapters)}


@functools.partial(jax.jit, static_argnames=("config", "compute", "looped"))
def _layer(
    params: Params,
    x: jax.Array,
    slots: LayerSlots,
    shared: Shared,
    *,
    config: ModelConfig,
    compute: ComputeConfig,
    looped: bool,
) -> tuple[jax.Array, LayerSlots]:
    block = Block(config, compute, deterministic=True)
    with looped_products(looped):
        (x, slots), _ = block.apply({"params": params}, (x, slots), jnp.zeros((), jnp.int32), shared)
    return x, slots


def _run_picked(
    run: Callable[..., tuple[jax.Array, LayerSlots]], picked: jax.Array, layer: Params, x: jax.Array, slots: LayerSlots
) -> tuple[jax.Array, LayerSlots]:
    """Run a layer for picked tokens, and leave what came in in the places of the others."""
    some, slots = run(layer, x, dataclasses.replace(slots, picked=picked))
    return x.at[:, picked].set(some), dataclasses.replace(slots, picked=None)


def forward_slots(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    *,
    cache: SlotCache,
    fresh: Fresh,
    rows: jax.Array,
    lengths: jax.Array,
    index: jax.Array,
    blocks: jax.Array,
    rope: tuple[jax.Array, jax.Array],
    segment_ids: jax.Array | None = None,
    picked: jax.Array | None = None,
    whole: jax.Array | bool = True,
    compute: ComputeConfig = ComputeConfig(),
    looped: bool = False,
) -> tuple[jax.Array, Fresh]:
    """Run the transformer up to its final norm on tokens that follow what slots hold.

    Args:
        params: from `split_layers`, adapters chosen.
        config: the model's shape.
        tokens: `[B, T]` ints.
        cache: what was read before.
        fresh: tokens of this call, `index` of them so far in every row.
        rows: `[B]` slot of each row.
        lengths: `[B]` stored tokens of each row.
        index: scalar.
        blocks: scalar, blocks of `slots.BLOCK` tokens that cover the longest row.
        rope: cosines and sines `[B, T, 1, H/2]` of the tokens' positions, from `rope.rope_tables`; made outside of a
            loop that runs this, or XLA makes them anew in every layer.
        segment_ids: `[B, T]`, where the tokens of a row are several texts; see `slots.LayerSlots`.
        picked: `[P]` places of the tokens whose hidden states are wanted, unless `whole`: the last layer computes no
            others, which mean nothing.
        whole: scalar bool, whether all hidden states are wanted.
        compute: dtype of activations.
        looped: write products of few rows as loops, see `matmul.looped_products`.

    Returns:
        `[B, T, D]` final hidden states, normalised, those wanted among them, and the fresh tokens with these added.
    """
    ones = jnp.ones(tokens.shape, jnp.int32)  # in place of positions and segments, which `LayerSlots` knows itself
    shared = Shared(*rope, ones, ones, ones, ones, index, branched=False)
    x = params["embed_tokens"]["embedding"][tokens].astype(compute_dtype(compute))
    run = functools.partial(_layer, shared=shared, config=config, compute=compute, looped=looped)
    new = []
    for i, layer in enumerate(params["layers"]):
        slots = LayerSlots(cache.k[i], cache.v[i], fresh.k[i], fresh.v[i], rows, lengths, blocks, index, segment_ids)
        if picked is None or i + 1 < len(params["layers"]):
            x, slots = run(layer, x, slots)
        else:
            x, slots = jax.lax.cond(whole, run, functools.partial(_run_picked, run, picked), layer, x, slots)
        new.append((slots.fresh_k, slots.fresh_v))
    x = RMSNorm(config.rms_norm_eps).apply({"params": params["norm"]}, x)
    return x, Fresh(*zip(*new, strict=True))


def unembed_slots(params: Params, config: ModelConfig, hidden: jax.Array, looped: bool = False) -> jax.Array:
    """Turn hidden states `[..., D]` into float32 logits `[..., V]`; arguments as in `forward_slots`."""
    with looped_products(looped):
        return unembed(params, dataclasses.replace(config, tie_word_embeddings=False), hidden)
