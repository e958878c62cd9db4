"""Meshes and the one table that says where every array lives.

Parameters and activations name their axes logically ("embed", "heads", …); `RULES` maps those names to mesh axes. A
new mesh is a new string for `make_mesh`, a new layout is a new table: model code never changes.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from minillm_jax.config import ConfigError

MESH_AXES = ("data", "fsdp", "tensor", "expert")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),  # rows of a batch
    "vocab": ("tensor",),
    "embed": ("fsdp",),  # model width of parameters; activations keep theirs whole
    "heads": ("tensor",),  # query heads times head size
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
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
    sizes = dict.fromkeys(MESH_AXES, 1)
    for part in filter(None, (p.strip() for p in spec.split(","))):
        axis, _, size = part.partition("=")
        if axis not in sizes or not size.lstrip("-").isdigit():
            raise ConfigError(
                f"--mesh {spec}: cannot read {part!r}; write axis=size with axis in {', '.join(MESH_AXES)}"
            )
        sizes[axis] = int(size)
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(f"--mesh {spec}: sizes are positive, and only one may be -1")
    if free:
        sizes[free[0]] = max(1, len(devices) // -math.prod(sizes.values()))
    if math.prod(sizes.values()) != len(devices):
        raise ConfigError(
            f"--mesh {spec}: the sizes multiply to {math.prod(sizes.values())}, but there are {len(devices)} devices"
        )
    return jax.make_mesh(
        tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices
    )


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Translate logical axis names into a PartitionSpec by `RULES`."""
    return PartitionSpec(*(RULES.get(name) or None if name is not None else None for name in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation's layout by logical axis names; outside a mesh this is the identity."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


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
