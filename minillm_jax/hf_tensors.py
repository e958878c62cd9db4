"""Tensors of a Hugging Face folder and leaves of the parameter tree: one table of names, piece by piece both ways.

A leaf here stacks all layers (and experts) and multiplies from the right; a tensor there is one matrix `[out, in]`.
Tensors are memory-mapped and copied one at a time into leaves that already lie where they belong, each device reading
only its own part, so that nothing but the parameters ever exists as a whole.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open

from minillm_jax.config import ModelConfig
from minillm_jax.hf_config import HfError, architecture_of
from minillm_jax.model import Params, init_params
from minillm_jax.reward import is_reward_model, reward_shapes

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
REMAP_BYTES = 2**27
"""A file is mapped afresh after this many bytes, because pages once read count as resident until it is unmapped."""
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_LAYER = "model.layers.{}."
_NAMES = {
    "embed_tokens.embedding": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "lm_head.kernel": "lm_head.weight",
    "score.kernel": "score.weight",
    "layers.input_layernorm.scale": _LAYER + "input_layernorm.weight",
    "layers.post_attention_layernorm.scale": _LAYER + "post_attention_layernorm.weight",
    **{f"layers.self_attn.{name}_proj.kernel": f"{_LAYER}self_attn.{name}_proj.weight" for name in "qkvo"},
    **{f"layers.self_attn.{name}_proj.bias": f"{_LAYER}self_attn.{name}_proj.bias" for name in "qkv"},
    **{f"layers.self_attn.{name}_norm.scale": f"{_LAYER}self_attn.{name}_norm.weight" for name in "qk"},
    **{f"layers.mlp.{name}_proj.kernel": f"{_LAYER}mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
}
_EXPERT_NAMES = {
    "qwen3_moe": {
        "layers.mlp.router.kernel": _LAYER + "mlp.gate.weight",
        **{f"layers.mlp.experts.{n}_proj": f"{_LAYER}mlp.experts.{{}}.{n}_proj.weight" for n in ("gate", "up", "down")},
    },
    "mixtral": {
        "layers.mlp.router.kernel": _LAYER + "block_sparse_moe.gate.weight",
        "layers.mlp.experts.gate_proj": _LAYER + "block_sparse_moe.experts.{}.w1.weight",
        "layers.mlp.experts.up_proj": _LAYER + "block_sparse_moe.experts.{}.w3.weight",
        "layers.mlp.experts.down_proj": _LAYER + "block_sparse_moe.experts.{}.w2.weight",
    },
}
"""Path of a leaf to the name of its tensors; braces take the indices of the leading axes."""


@dataclass(frozen=True)
class Piece:
    """One tensor's place: `leaf[index]`, transposed for matrices."""

    name: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    transposed: bool


def param_shapes(config: ModelConfig, *, scored: bool = False) -> Params:
    """Abstract float32 parameters; a reward model (`scored`) has a scalar head in place of the output head."""
    if scored:
        return reward_shapes(config)
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def leaf_pieces(path: str, shape: tuple[int, ...], config: ModelConfig) -> list[Piece]:
    """List the tensors that make up one leaf.

    Args:
        path: dotted path of the leaf.
        shape: its shape.
        config: the model.
    """
    template = (_NAMES | _EXPERT_NAMES.get(architecture_of(config).model_type, {}))[path]
    stacked = template.count("{}")
    rest = shape[stacked:]
    transposed = len(rest) == 2 and not path.endswith("embedding")
    indices = product(*map(range, shape[:stacked]))
    return [Piece(template.format(*i), i, rest[::-1] if transposed else rest, transposed) for i in indices]


def _leaves(tree: Params) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


# --- Out ---------------------------------------------------------------------------------------------------------


def hf_tensor_shapes(params: Params, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that `to_hf` gives, in its order."""
    return {
        piece.name: piece.shape for path, leaf in _leaves(params) for piece in leaf_pieces(path, leaf.shape, config)
    }


def to_hf(params: Params, config: ModelConfig, dtype: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Give the tensors of a parameter tree, or of a tree like it such as its gradient, one at a time.

    Args:
        params: the tree.
        config: the model.
        dtype: what to cast to; None keeps each leaf's own.

    Yields:
        Name and contiguous host array of each tensor.

    Raises:
        HfError: the model has no counterpart, see `architecture_of`.
    """
    for path, leaf in _leaves(params):
        for piece in leaf_pieces(path, leaf.shape, config):
            take = _take(leaf, jnp.asarray(piece.index, jnp.int32), piece.transposed, dtype or str(leaf.dtype))
            yield piece.name, np.ascontiguousarray(jax.device_get(take))


@functools.partial(jax.jit, static_argnames=("transposed", "dtype"))
def _take(leaf: jax.Array, index: jax.Array, transposed: bool, dtype: str) -> jax.Array:
    for i in index:
        leaf = jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False)
    return (leaf.T if transposed else leaf).astype(dtype)


# --- In ----------------------------------------------------------------------------------------------------------


class TensorFiles:
    """The `*.safetensors` files of a folder: shapes and dtypes by name, and slices of the tensors.

    Raises:
        HfError: no such file, one that the index names is missing, or one is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: tuple[str, Any] | None = None
        self._mapped = 0
        self.file_of: dict[str, str] = {}
        self.shape: dict[str, tuple[int, ...]] = {}
        self.dtype: dict[str, str] = {}
        for file in self._files():
            handle = self._handle(file)
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                view = handle.get_slice(name)
                self.file_of[name], self.shape[name], self.dtype[name] = file, tuple(view.get_shape()), view.get_dtype()
        self._check_index()

    def _files(self) -> list[str]:
        index = self.folder / INDEX_FILE
        if index.is_file():
            names = sorted(set(self._weight_map().values()))
        elif (self.folder / WEIGHTS_FILE).is_file():
            names = [WEIGHTS_FILE]
        else:
            names = sorted(path.name for path in self.folder.glob("*.safetensors"))
            if len(names) != 1:
                found = f"{len(names)} *.safetensors files and no {INDEX_FILE}" if names else "no *.safetensors file"
                hint = "" if names else "; weights in another format are rewritten by transformers' save_pretrained"
                raise HfError(f"{self.folder}: {found}{hint}")
        for name in names:
            if not (self.folder / name).is_file():
                raise HfError(f"{self.folder}: {name} is missing, though {INDEX_FILE} names it")
        return names

    def _weight_map(self) -> dict[str, str]:
        try:
            return dict(json.loads((self.folder / INDEX_FILE).read_text("utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise HfError(f"{self.folder / INDEX_FILE}: cannot be understood ({error!r})") from error

    def _check_index(self) -> None:
        if (self.folder / INDEX_FILE).is_file() and (gone := sorted(set(self._weight_map()) - set(self.file_of))):
            file = self._weight_map()[gone[0]]
            raise HfError(f"{self.folder}: tensor {gone[0]} is not in {file}, though {INDEX_FILE} says so")

    def _handle(self, file: str) -> Any:
        if self._open is None or self._open[0] != file or self._mapped > REMAP_BYTES:
            self._open, self._mapped = None, 0  # unmaps the last file before another is mapped
            try:
                self._open = file, safe_open(self.folder / file, framework="np")
            except (SafetensorError, OSError) as error:
                raise HfError(f"{self.folder / file}: is damaged or no safetensors file ({error})") from error
        return self._open[1]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Copy a slice of a tensor into host memory; no index takes all of it."""
        view = self._handle(self.file_of[name]).get_slice(name)
        array = view[index or tuple(slice(None) for _ in self.shape[name])]
        self._mapped += array.nbytes
        return array


def read_params(folder: Path, config: ModelConfig, *, scored: bool, dtype: Any = None, shardings: Any = None) -> Params:
    """Read the parameters of a folder.

    Args:
        folder: holds the files.
        config: the model, from its `config.json`.
        scored: whether it is a reward model.
        dtype: what to cast to while reading; None keeps what is stored.
        shardings: tree like the parameters; None puts them on the first device.

    Raises:
        HfError: a tensor is missing, left over, of another shape or not of a floating-point type; it is named.
    """
    files = TensorFiles(folder)
    shapes = param_shapes(config, scored=scored)
    leaves = [(path, leaf.shape, leaf_pieces(path, leaf.shape, config)) for path, leaf in _leaves(shapes)]
    _check_tensors(files, {piece.name: piece.shape for _, _, pieces in leaves for piece in pieces}, config)
    if shardings is not None and is_reward_model(shardings) != scored:
        is_one, needed = ("reward", "language") if scored else ("language", "reward")
        raise HfError(f"{folder}: is a {is_one} model, where a {needed} model is needed")
    device = SingleDeviceSharding(jax.local_devices()[0])
    placement = [device] * len(leaves) if shardings is None else jax.tree.leaves(shardings)
    arrays = [
        _read_leaf(files, shape, pieces, dtype, sharding)
        for (_, shape, pieces), sharding in zip(leaves, placement, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), arrays)


def _read_leaf(
    files: TensorFiles, shape: tuple[int, ...], pieces: list[Piece], dtype: Any, sharding: Sharding
) -> jax.Array:
    stored = [jnp.dtype(FLOATS[files.dtype[piece.name]]) for piece in pieces]
    dtype = jnp.dtype(functools.reduce(jnp.promote_types, stored) if dtype is None else dtype)
    leaf = jnp.zeros(shape, dtype, device=sharding)
    place = _placer(sharding)
    for piece in pieces:
        at = _piece_sharding(sharding, len(piece.index), len(piece.shape), piece.transposed)
        tensor = jax.make_array_from_callback(piece.shape, at, functools.partial(files.read, piece.name))
        leaf = place(leaf, tensor, jnp.asarray(piece.index, jnp.int32), piece.transposed)
        leaf.block_until_ready()  # else many tensors would wait in memory at once
    return leaf


@functools.lru_cache(maxsize=64)
def _placer(sharding: Sharding) -> Callable[[jax.Array, jax.Array, jax.Array, bool], jax.Array]:
    """Make the function that writes one tensor into a leaf, in place."""

    def place(leaf: jax.Array, tensor: jax.Array, index: jax.Array, transposed: bool) -> jax.Array:
        tensor = (tensor.T if transposed else tensor).astype(leaf.dtype)
        start = [*index, *[jnp.zeros((), jnp.int32)] * tensor.ndim]
        return jax.lax.dynamic_update_slice(leaf, tensor.reshape((1,) * len(index) + tensor.shape), start)

    return jax.jit(place, donate_argnums=0, static_argnums=3, out_shardings=sharding)


def _piece_sharding(leaf: Sharding, stacked: int, ndim: int, transposed: bool) -> Sharding:
    """Where a tensor goes so that writing it into the leaf moves nothing between devices."""
    if not isinstance(leaf, NamedSharding):
        return leaf
    spec = [*leaf.spec, *[None] * (stacked + ndim - len(leaf.spec))][stacked:]
    return NamedSharding(leaf.mesh, PartitionSpec(*(spec[::-1] if transposed else spec)))


def _check_tensors(files: TensorFiles, expected: Mapping[str, tuple[int, ...]], config: ModelConfig) -> None:
    found = dict(files.shape)
    for name in [name for name in found if name.endswith("rotary_emb.inv_freq")]:
        del found[name]  # a table that early releases of transformers stored with the weights
    if config.tie_word_embeddings and "lm_head.weight" in found:
        _check_tied_head(files)
        del found["lm_head.weight"]
    if missing := sorted(set(expected) - set(found)):
        raise HfError(f"{files.folder}: tensor {missing[0]} is missing{_more(missing)}")
    if extra := sorted(set(found) - set(expected)):
        raise HfError(f"{files.folder}: tensor {extra[0]} has no place in this architecture{_more(extra)}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise HfError(f"{files.folder}: tensor {name} has shape {list(found[name])}, not {list(shape)}")
        if files.dtype[name] not in FLOATS:
            raise HfError(f"{files.folder}: tensor {name} is {files.dtype[name]}; only {', '.join(FLOATS)} can be read")


def _check_tied_head(files: TensorFiles) -> None:
    head, table = files.shape["lm_head.weight"], files.shape.get("model.embed_tokens.weight")
    rows = 2**24 // max(1, math.prod(head[1:]))
    blocks = [(slice(i, min(i + rows, head[0])), slice(None)) for i in range(0, head[0], rows)]
    same = head == table and all(
        np.array_equal(files.read("lm_head.weight", b), files.read("model.embed_tokens.weight", b)) for b in blocks
    )
    if not same:
        raise HfError(
            f"{files.folder}: tensor lm_head.weight differs from model.embed_tokens.weight, though config.json says "
            "tie_word_embeddings"
        )


def _more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
