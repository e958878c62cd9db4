"""The model as a server runs it: layer after layer, each with arrays of its own, over a cache of slots.

The layers' weights come as a tuple, because cutting one layer out of a stack copies it, which takes as long as the
decoding product itself. The layers are those of `model.py`; one is traced, and called for all.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from minillm_jax.config import ComputeConfig, ModelConfig
from minillm_jax.lora import choose_adapters
from minillm_jax.matmul import looped_products
from minillm_jax.model import GATE_UP, QKV, Block, Params, RMSNorm, Shared, compute_dtype, unembed
from minillm_jax.rope import rope_tables
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
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
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
        positions: `[B, T]`; None counts on from each row's length.
        segment_ids: `[B, T]`, where the tokens of a row are several texts; see `slots.LayerSlots`.
        compute: dtype of activations.
        looped: write products of a single row as loops, see `matmul.looped_products`.

    Returns:
        `[B, T, D]` final hidden states, normalised, and the fresh tokens with these among them.
    """
    batch, length = tokens.shape
    if positions is None:
        positions = lengths[:, None] + index + jnp.arange(length)
    ones = jnp.ones((batch, length), jnp.int32)
    cos, sin = rope_tables(positions, config)
    shared = Shared(cos, sin, positions, ones, positions, ones, index, branched=False)
    x = params["embed_tokens"]["embedding"][tokens].astype(compute_dtype(compute))
    new_k, new_v = [], []
    for i, layer in enumerate(params["layers"]):
        slots = LayerSlots(cache.k[i], cache.v[i], fresh.k[i], fresh.v[i], rows, lengths, blocks, index, segment_ids)
        x, slots = _layer(layer, x, slots, shared, config=config, compute=compute, looped=looped)
        new_k.append(slots.fresh_k)
        new_v.append(slots.fresh_v)
    x = RMSNorm(config.rms_norm_eps).apply({"params": params["norm"]}, x)
    return x, Fresh(tuple(new_k), tuple(new_v))


def unembed_slots(params: Params, config: ModelConfig, hidden: jax.Array, looped: bool = False) -> jax.Array:
    """Turn hidden states `[..., D]` into float32 logits `[..., V]`; arguments as in `forward_slots`."""
    with looped_products(looped):
        return unembed(params, dataclasses.replace(config, tie_word_embeddings=False), hidden)
