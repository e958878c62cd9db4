"""Meshes and the one table that says where every array lives.

Parameters, activations, the cache and batches name their axes logically ("embed", "heads", …); `RULES` maps those names
to mesh axes, and optimizer state lies where its parameter does. A new mesh is a new string for `make_mesh`, a new
layout is a new table: model code never changes. What cannot be split is explained by `check_mesh` and `check_rows`
before anything is loaded or compiled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from minillm_jax.config import ConfigError, ModelConfig

MESH_AXES = ("data", "fsdp", "tensor", "expert")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),  # rows of batches, activations and caches
    "vocab": ("tensor",),  # of embeddings, heads and logits
    "embed": ("fsdp",),  # model width of parameters; activations keep theirs whole
    "heads": ("tensor",),  # query heads, in parameters times the head size
    "kv_heads": ("tensor",),  # the same of keys and values, the cache's included
    "mlp": ("tensor",),  # hidden width of MLPs and experts
    "experts": ("expert",),
    "layers": (),
    "norm": (),
}
"""Logical axis name → mesh axes it is split over; names that are absent are not split."""


def make_mesh(spec: str = "data=-1", devices: list[jax.Device] | None = None) -> Mesh:
    """Build the device mesh of a `--mesh` flag.

    Args:
        spec: comma-separated `axis=size` over data, fsdp, tensor and expert; one size may be -1 and takes what is left.
        devices: devices to use; None takes all.

    Raises:
        ConfigError: unknown axis, or sizes whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in spec.split(","))):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES or not size.removeprefix("-").isdecimal():
            raise ConfigError(
                f"--mesh {spec}: cannot read {part!r}; write axis=size with axis in {', '.join(MESH_AXES)}"
            )
        if axis in sizes:
            raise ConfigError(f"--mesh {spec}: names {axis} twice")
        sizes[axis] = int(size)
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(f"--mesh {spec}: sizes are positive, and only one may be -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed or (not free and fixed != len(devices)):
        raise ConfigError(
            f"--mesh {spec}: the sizes multiply to {fixed}, but there are {len(devices)} devices; choose sizes whose "
            f"product is {len(devices)}" + ("" if len(devices) % fixed else ", or let data=-1 take what is left")
        )
    sizes = dict.fromkeys(MESH_AXES, 1) | sizes | dict.fromkeys(free, len(devices) // fixed)
    return jax.make_mesh(
        tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices
    )


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Translate logical axis names into a PartitionSpec by `RULES`."""
    return PartitionSpec(*(RULES.get(name) or None if name is not None else None for name in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation's layout by logical axis names; outside a mesh this is the identity.

    An axis is split over as many of its mesh axes as divide it, from the first on: a batch of few rows, or fewer keys
    than there are tensor-parallel devices, is kept whole where it cannot be split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec = [
        _dividing(mesh.shape, size, RULES.get(name, ()) if name else ())
        for size, name in zip(x.shape, axes, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def _dividing(sizes: Mapping[str, int], length: int, mesh_axes: tuple[str, ...]) -> tuple[str, ...] | None:
    """Keep the first mesh axes whose sizes together divide a length."""
    kept: tuple[str, ...] = ()
    for axis in mesh_axes:
        if length % math.prod(sizes[name] for name in (*kept, axis)):
            break
        kept = (*kept, axis)
    return kept or None


def tree_shardings(mesh: Mesh, axes: Any) -> Any:
    """Map a tree of logical axis tuples to a tree of NamedShardings."""
    return jax.tree.map(
        lambda names: NamedSharding(mesh, partition_spec(names)), axes, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of batches `[B, ...]`: rows over every data-parallel axis."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def data_parallelism(mesh: Mesh) -> int:
    """Number of parts that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that a tree of arrays lies on; None where they lie on a device without one."""
    shardings = (leaf.sharding for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
    return next((s.mesh for s in shardings if isinstance(s, NamedSharding) and isinstance(s.mesh, Mesh)), None)


def on_mesh_of(tree: Any) -> AbstractContextManager[Any]:
    """Make a context that computes on the mesh that a tree of arrays lies on, where there is one."""
    mesh = mesh_of(tree)
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def replicate_rest(tree: Any) -> Any:
    """Put those arrays of a tree on every device of its mesh that do not lie on it yet; without a mesh, do nothing."""
    if (mesh := mesh_of(tree)) is None:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(leaf: jax.Array) -> jax.Array:
        return leaf if mesh_of(leaf) is not None else jax.device_put(leaf, everywhere)

    return jax.tree.map(place, tree)


def optimizer_shardings(mesh: Mesh, optimizer: optax.GradientTransformation, params: Any, param_shardings: Any) -> Any:
    """Shardings of the optimizer state: moments lie where their parameter lies, counters everywhere.

    Args:
        mesh: the device mesh.
        optimizer: the transformation whose `init` made (or will make) the state.
        params: parameters or their abstract shapes.
        param_shardings: a tree of shardings like `params`.
    """
    state = jax.eval_shape(optimizer.init, params)
    replicated = NamedSharding(mesh, PartitionSpec())
    return optax.tree_utils.tree_map_params(
        optimizer,
        lambda leaf, sharding: leaf if isinstance(leaf, optax.MaskedNode) else sharding,
        state,
        param_shardings,
        transform_non_params=lambda _: replicated,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )


# --- What a mesh can split --------------------------------------------------------------------------------------------


def _widths(config: ModelConfig) -> dict[str, dict[str, int]]:
    """Sizes of a model that each mesh axis has to divide, by their names."""
    tensor = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads * head_dim": config.num_key_value_heads * config.head_size,
        "vocab_size": config.vocab_size,
    }
    if config.use_moe:
        tensor["moe_intermediate_size"] = config.expert_size
    else:
        tensor["intermediate_size"] = config.mlp_size
    return {
        "tensor": tensor,
        "fsdp": {"hidden_size": config.hidden_size},
        "expert": {"num_experts": config.num_experts} if config.use_moe else {},
    }


def _fits(config: ModelConfig, axis: str, size: int) -> bool:
    """Tell whether a mesh axis of a size can split a model."""
    heads = config.num_key_value_heads
    grouped = axis != "tensor" or not heads % size or not size % heads
    return grouped and not any(width % size for width in _widths(config)[axis].values())


def check_mesh(mesh: Mesh, config: ModelConfig, path: str | None = None) -> None:
    """Refuse a mesh that cannot split a model, before anything is loaded or compiled.

    Tensor parallelism splits query heads, the vocabulary and the hidden width of MLPs or experts; `fsdp` the model's
    width, `expert` the experts. Keys and values are split by heads where there are enough. Where tensor parallelism is
    a multiple of the key-value heads, several devices compute the same ones, as for grouped queries elsewhere.

    Args:
        mesh: from `make_mesh`.
        config: the model's shape.
        path: where the model comes from, for the message; None is the model of the run.

    Raises:
        ConfigError: a size is not divisible; the message says which, and what would work.
    """
    model = "the model" if path is None else path
    for axis, widths in _widths(config).items():
        size = mesh.shape[axis]
        if _fits(config, axis, size):
            continue
        working = [n for n in range(1, max(widths.values()) + 1) if _fits(config, axis, n)]
        culprits = [f"{name} {width}" for name, width in widths.items() if width % size]
        heads = config.num_key_value_heads
        if culprits:
            why = f"{' and '.join(culprits)} of {model} cannot be split over {size} devices"
        else:
            why = f"num_key_value_heads {heads} of {model} is neither a multiple nor a divisor of {size}"
        raise ConfigError(
            f"--mesh {axis}={size}: {why}; {axis} can be {_listed(working)}{_wider(culprits, config, size)}"
        )


def _wider(culprits: list[str], config: ModelConfig, size: int) -> str:
    """Say what a new model's vocabulary could be, where that alone stands in the way."""
    if len(culprits) != 1 or not culprits[0].startswith("vocab_size"):
        return ""
    return f", or a new model can have --vocab_size {size * -(-config.vocab_size // size)}"


def check_rows(mesh: Mesh, rows: int, flag: str = "--batch_size") -> None:
    """Refuse a batch whose rows cannot be shared evenly by the data-parallel devices of a mesh.

    Args:
        mesh: from `make_mesh`.
        rows: of one batch.
        flag: that sets them.

    Raises:
        ConfigError: they cannot; the message says what would work.
    """
    ways = data_parallelism(mesh)
    if rows % ways:
        below, above = rows - rows % ways, rows + ways - rows % ways
        near = f"{below} or {above}" if below else str(above)
        divisors = _listed([n for n in range(1, rows + 1) if not rows % n])
        split = " * ".join(f"{axis}={mesh.shape[axis]}" for axis in RULES["batch"] if mesh.shape[axis] > 1)
        raise ConfigError(
            f"{flag} {rows} cannot be split over {ways} devices ({split}); use a multiple of {ways} such as {near}, or "
            f"a --mesh whose {', '.join(RULES['batch'])} multiply to {divisors}"
        )


def _listed(numbers: list[int]) -> str:
    """`1, 2 or 4`."""
    words = [str(number) for number in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
