"""Low-rank adapters (LoRA, arXiv:2106.09685) as pure functions of two trees, the base's and the adapter's.

An adapter mirrors the paths of the projections that it adapts: `layers/self_attn/q_proj/{a, b}` are the factors
`[L, in, r]` and `[L, r, out]` of what is added to that kernel, and experts have theirs with an axis E. `combine` lays
the factors beside the weights, where the model multiplies by them one after the other, so that training never makes
anything of a weight's size; `merge` adds their product to the weights, which leaves a plain model.

    python -m minillm_jax.lora merge --model_path out/sft_lora --out_dir out/merged
    python -m minillm_jax.lora export --model_path out/sft_lora --to out/peft
    python -m minillm_jax.lora import --from out/peft --model_path out/pretrain --out_dir out/imported
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from minillm_jax.config import ConfigError, LoraConfig
from minillm_jax.losses import Batch, LossFn, Metrics
from minillm_jax.model import Params

FACTORS = frozenset({"a", "b"})


@dataclass(frozen=True)
class Adapter:
    """An adapter with what is needed to use it.

    Attributes:
        params: factors, from `init_adapter` or a run.
        config: its scale.
    """

    params: Params
    config: LoraConfig


def init_adapter(shapes: Params, config: LoraConfig, key: jax.Array) -> Params:
    """Draw an adapter whose product is zero: A uniform within 1 / sqrt(in), as PEFT draws it, and B zero.

    Args:
        shapes: the base's parameters, or their abstract shapes.
        config: rank and targets.
        key: randomness of A.

    Returns:
        Float32 adapter.

    Raises:
        ConfigError: the rank is 0, or a target names no projection of the model.
    """
    keys = iter(jax.random.split(key, len(jax.tree.leaves(shapes))))

    def draw(weight: Any) -> dict[str, jax.Array]:
        *stack, width, features = weight.shape
        bound = 1.0 / math.sqrt(width)
        a = jax.random.uniform(next(keys), (*stack, width, config.lora_rank), jnp.float32, -bound, bound)
        return {"a": a, "b": jnp.zeros((*stack, config.lora_rank, features), jnp.float32)}

    return _for_targets(shapes, shapes, config, draw)


def adapter_axes(axes: Params, shapes: Params, config: LoraConfig) -> Params:
    """Name the axes of an adapter: A has the weight's axes but its last, B all but the one before; ranks are whole.

    Args:
        axes: `model.param_axes` of the base.
        shapes: the base's parameters, or their abstract shapes.
        config: rank and targets.

    Raises:
        ConfigError: see `init_adapter`.
    """

    def name(names: tuple[str | None, ...]) -> dict[str, tuple[str | None, ...]]:
        *stack, width, features = names
        return {"a": (*stack, width, None), "b": (*stack, None, features)}

    return _for_targets(shapes, axes, config, name)


def combine(base: Params, adapter: Params, config: LoraConfig) -> Params:
    """Lay an adapter beside the weights of its base, as the model reads it: an exact union, nothing is added up.

    A weight `kernel` gets the neighbours `kernel_lora_a`, `kernel_lora_b` (scaled) and, for dropout,
    `kernel_lora_dropout`. Leaves of the adapter that are no factors, such as the head of a reward model, join as
    they are.

    Args:
        base: parameters.
        adapter: from `init_adapter`.
        config: of the adapter.
    """

    def beside(name: str, weight: jax.Array, factors: Params) -> Params:
        union = {name: weight, f"{name}_lora_a": factors["a"], f"{name}_lora_b": factors["b"] * config.lora_scale}
        if config.lora_dropout > 0:
            union[f"{name}_lora_dropout"] = jnp.full(weight.shape[:1], config.lora_dropout, jnp.float32)  # [L]
        return union

    return _join(base, adapter, beside)


def merge(base: Params, adapter: Params, config: LoraConfig) -> Params:
    """Add an adapter to the weights of its base: `W + scale A B`, computed in float32 and kept in W's dtype.

    Args and what becomes of leaves that are no factors are those of `combine`.

    Returns:
        Parameters of a plain model.
    """

    def add(name: str, weight: jax.Array, factors: Params) -> Params:
        product = jnp.matmul(factors["a"], factors["b"], precision="highest", preferred_element_type=jnp.float32)
        return {name: (weight.astype(jnp.float32) + config.lora_scale * product).astype(weight.dtype)}

    return _join(base, adapter, add)


def lay_beside(base: Params, adapters: Sequence[Adapter]) -> Params:
    """Lay several adapters beside the weights of their base, so that each row of a batch can choose one.

    Adapter 0 is none at all: its factors are zero. Smaller ranks, and projections that an adapter leaves alone, are
    filled up with zeros.

    Args:
        base: parameters.
        adapters: A of them; the i-th becomes number i + 1.

    Returns:
        Parameters with `kernel_lora_a` `[L, A + 1, in, r]` and `kernel_lora_b` `[L, A + 1, r, out]` beside each kernel
        that some adapter adapts, scale included, and with an axis E before the last two beside experts.

    Raises:
        ValueError: an adapter adapts something that the base does not have.
    """
    rank = max((adapter.config.lora_rank for adapter in adapters), default=0)
    scaled = [_factors(adapter) for adapter in adapters]
    known = dict(projections(base))
    if strange := [name for factors in scaled for name in factors if name not in known]:
        raise ValueError(f"an adapter is for {strange[0]}, which this model does not have")
    stacks: Params = {}
    for name in dict.fromkeys(name for factors in scaled for name in factors):
        *stack, width, features = _leaf(base, known[name]).shape
        empty = (jnp.zeros((*stack, width, 0)), jnp.zeros((*stack, 0, features)))
        a, b = zip(*[_pad_rank(*factors.get(name, empty), rank) for factors in [{}, *scaled]], strict=True)
        node = stacks
        for key in (keys := ("layers", *name.split(".")))[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = {"a": jnp.stack(a, 1), "b": jnp.stack(b, 1)}

    def beside(name: str, weight: jax.Array, factors: Params) -> Params:
        return {name: weight, f"{name}_lora_a": factors["a"], f"{name}_lora_b": factors["b"]}

    return _join(base, stacks, beside)


def choose_adapters(layers: Any, chosen: jax.Array) -> Any:
    """Take the chosen adapters' factors out of layers that `lay_beside` made, stacks split up.

    Args:
        layers: tree with factors `[A + 1, …, in, r]` and `[A + 1, …, r, out]`.
        chosen: scalar, or `[B]` for one a row.

    Returns:
        The tree with factors `[…, in, r]`, or `[B, …, in, r]`.
    """

    def choose(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf[chosen] if str(getattr(path[-1], "key", "")).endswith(("_lora_a", "_lora_b")) else leaf

    return jax.tree_util.tree_map_with_path(choose, layers)


def _factors(adapter: Adapter) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The scaled factors of an adapter by the dotted names of `projections`."""
    found: dict[str, dict[str, jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(adapter.params)[0]:
        keys = [entry.key for entry in path]
        if keys[-1] in FACTORS:
            found.setdefault(".".join(keys[1:-1]), {})[keys[-1]] = leaf.astype(jnp.float32)
    return {name: (pair["a"], pair["b"] * adapter.config.lora_scale) for name, pair in found.items()}


def _pad_rank(a: jax.Array, b: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    missing = rank - a.shape[-1]
    still = [(0, 0)] * (a.ndim - 2)
    return jnp.pad(a, [*still, (0, 0), (0, missing)]), jnp.pad(b, [*still, (0, missing), (0, 0)])


def _leaf(tree: Params, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def adapted_loss(loss_fn: LossFn, config: LoraConfig) -> LossFn:
    """Make a loss of all parameters a loss of an adapter.

    Args:
        loss_fn: `(params, frozen, batch, key)`, see `losses.LossFn`.
        config: of the adapter.

    Returns:
        `(adapter, {"base": params, "rest": frozen}, batch, key)`, the same loss. `rest` is handed on; it may hold the
        base once more, as a reference model: the two are the same buffers.
    """

    def loss(
        adapter: Params, frozen: Any, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        return loss_fn(combine(frozen["base"], adapter, config), frozen["rest"], batch, key)

    return loss


# --- Trees -------------------------------------------------------------------------------------------------------


def projections(shapes: Params) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield what can be adapted: the dotted name of each projection in the layers, and the path of its weight."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        keys = tuple(entry.key for entry in path)
        if keys[0] == "layers" and len(leaf.shape) > 2:  # [L, in, out] or [L, E, in, out]; biases and norms are [L, D]
            yield ".".join(keys[1:]).removesuffix(".kernel"), keys


def target_paths(shapes: Params, config: LoraConfig) -> list[tuple[str, ...]]:
    """List the paths of the weights that an adapter is for; raises like `init_adapter`."""
    if config.lora_rank < 1:
        raise ConfigError("lora_rank is 0: an adapter has a rank of at least 1")
    known = dict(projections(shapes))
    hit = {target: [n for n in known if n == target or n.endswith("." + target)] for target in config.lora_targets}
    if unknown := [target for target, names in hit.items() if not names]:
        raise ConfigError(f"lora_targets: {unknown[0]} names no projection of this model; it has {', '.join(known)}")
    chosen = {name for names in hit.values() for name in names}
    return [path for name, path in known.items() if name in chosen]


def _for_targets(shapes: Params, tree: Params, config: LoraConfig, make: Callable[[Any], Params]) -> Params:
    """Build a tree with `make(leaf)` at the place of each adapted projection of `tree`."""
    made: Params = {}
    for path in target_paths(shapes, config):
        leaf, node = tree, made
        for key in path:
            leaf = leaf[key]
        for key in (keys := path[:-1] if path[-1] == "kernel" else path)[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = make(leaf)
    return made


def _join(base: Params, adapter: Params, attach: Callable[[str, jax.Array, Params], Params]) -> Params:
    """Unite two trees; `attach(name, weight, factors)` gives what stands where both have a projection."""
    union = dict(base)
    for name, part in adapter.items():
        if not isinstance(part, dict):
            union[name] = part
        elif part.keys() != FACTORS:
            union[name] = _join(base.get(name, {}), part, attach)
        elif isinstance(base[name], dict):
            union[name] = base[name] | attach("kernel", base[name]["kernel"], part)
        else:  # a stack of experts, which is a leaf
            union |= attach(name, base[name], part)
    return union


if __name__ == "__main__":
    from minillm_jax.lora_commands import main

    sys.exit(main())
