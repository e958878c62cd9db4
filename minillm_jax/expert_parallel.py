"""The experts of a MoE layer on a mesh: every device holds its share of the experts, and tokens travel to them.

`expert_layer` computes what `moe.moe_mlp` does. On a mesh it runs device by device (`jax.shard_map`): a device sorts
its own tokens only, so that the communication is what is written here and nothing else. Routing and the balancing loss
stay outside, where they see whole rows. Weights are never gathered over `expert`; their parts over `fsdp` are, layer by
layer, and their parts over `tensor` work on parts of the hidden width, whose results are added up at the end.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from minillm_jax.kernels import platform
from minillm_jax.matmul import LowRank
from minillm_jax.moe import Product, Routing, combine, dispatch, expert_mlps, moe_mlp, sort_by_expert
from minillm_jax.sharding import RULES

Weights = tuple[jax.Array, jax.Array, jax.Array]
Adapters = tuple[LowRank | None, ...]

AXES = (("experts", "embed", "mlp"), ("experts", "embed", "mlp"), ("experts", "mlp", "embed"))
"""Logical axes of gate, up and down."""


@dataclass(frozen=True)
class Capacity:
    """A limit that holds for every row of the batch: `per_row` assignments to one expert out of `length` tokens."""

    per_row: int
    length: int

    def most(self, tokens: int) -> int:
        """Assignments that one expert can have among consecutive tokens, whose number is the size of a shard."""
        rows = tokens // self.length
        # A shard that is not of whole rows has parts of rows at both ends.
        return self.per_row * (rows if tokens % self.length == 0 else rows + 2)


@dataclass(frozen=True)
class Plan:
    """How one layer is spread over the mesh.

    Attributes:
        tokens: mesh axes that tokens are split over.
        experts: mesh axes that experts are split over.
        embed: mesh axes that the width D of weights is split over, in storage only.
        mlp: mesh axes that the experts' hidden width is split over.
        ranks: devices along `experts`.
        exchange: how tokens meet their experts. "local": all experts are here; "ragged": rows are sent to the devices
            of their experts, and back; "gather": all tokens of the devices along `experts` come here, and what their
            experts here make of them is added up where they came from; "replicated": tokens are here already.
        most: bound of the rows that a device's experts get, which is what the arrays of a layer are made for.
    """

    tokens: tuple[str, ...]
    experts: tuple[str, ...]
    embed: tuple[str, ...]
    mlp: tuple[str, ...]
    ranks: int
    exchange: Literal["local", "ragged", "gather", "replicated"]
    most: int | None

    @property
    def partial(self) -> tuple[str, ...]:
        """Mesh axes along which devices make summands of the same outputs."""
        return self.mlp + (self.experts if self.exchange == "replicated" else ())

    def axes_of(self, name: str | None) -> tuple[str, ...] | None:
        """Mesh axes of a weight's logical axis."""
        return {"experts": self.experts, "embed": self.embed, "mlp": self.mlp}[name] or None if name else None


def expert_layer(
    x: jax.Array,
    weights: Weights,
    routing: Routing,
    adapters: Adapters = (None, None, None),
    capacity: Capacity | None = None,
) -> jax.Array:
    """Send tokens through their experts and sum the weighted results, on the mesh of `jax.set_mesh` if there is one.

    Without a limit nothing is dropped, and shapes are fixed, so arrays are made for the worst case: all tokens of the
    R devices along `expert` choose this device. With m tokens a device that is `R m min(k, E / R)` rows of width D in
    and out and of width F between, where an even load would fill `m k`; the products do the work of the rows that
    came. A capacity factor f bounds the rows by `E / R * ceil(f T k / E)` for each row of the batch in the R devices,
    about `f m k`.

    Adapters that differ from row to row (a server's) leave the partitioning to the compiler.

    Args:
        x: `[M, D]` tokens; split over data, fsdp and expert if their number divides, and else over fewer axes.
        weights: gate and up `[E, D, F]`, and down `[E, F, D]`.
        routing: k experts and weights per token.
        adapters: what is added to the three products; `[E, in, r]` and `[E, r, out]`.
        capacity: the limit that `routing.kept` observes; None where nothing is dropped.

    Returns:
        `[M, D]` in the dtype of `x`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {name: mesh.shape[name] for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
            if kind == AxisType.Auto}  # fmt: skip
    used = {axis for name in ("batch", "experts", "embed", "mlp") for axis in RULES[name]}
    sizes = {name: size for name, size in free.items() if name in used and size > 1}
    experts, k = weights[0].shape[0], routing.experts.shape[1]
    if not sizes or any(adapter is not None and adapter.a.ndim == 4 for adapter in adapters):
        return moe_mlp(x, *weights, routing, adapters, _most_rows(x.shape[0], k, experts, capacity))
    plan = make_plan(sizes, x.shape, weights[0].shape, k, capacity)
    token_spec = PartitionSpec(plan.tokens or None)
    mapped = jax.shard_map(
        functools.partial(_on_device, plan),
        in_specs=(token_spec, tuple(map(functools.partial(_spec, plan), AXES)), token_spec,
                  tuple(_adapter_spec(plan, *pair) for pair in zip(AXES, adapters, strict=True))),
        out_specs=PartitionSpec(plan.partial or None, plan.tokens or None),
        axis_names=set(free),
        check_vma=False,  # the grouped product's loops mix what varies over devices with what does not
    )  # fmt: skip
    # Summands are added out here, where the transpose is a copy; inside, it would be a second sum over devices.
    return mapped(x, weights, routing, adapters).sum(0)


def make_plan(
    sizes: dict[str, int], tokens: tuple[int, ...], weight: tuple[int, ...], k: int, capacity: Capacity | None
) -> Plan:
    """Decide how a layer is spread.

    An axis that does not divide its array leaves it whole. Few tokens, as in decoding, may be too few for all of data,
    fsdp and expert; they are then split over data and fsdp, or not at all.

    Args:
        sizes: devices along each mesh axis.
        tokens: `(M, D)`.
        weight: `(E, D, F)`.
        k: experts per token.
        capacity: see `expert_layer`.
    """

    def present(name: str) -> tuple[str, ...]:
        return tuple(axis for axis in RULES[name] if axis in sizes)

    def ways(axes: tuple[str, ...]) -> int:
        return math.prod(sizes[axis] for axis in axes)

    experts, embed, mlp = (
        axes if size % ways(axes) == 0 else ()
        for axes, size in zip(map(present, AXES[0]), weight, strict=True)
    )  # fmt: skip
    batch, ranks = present("batch"), ways(experts)
    without = tuple(axis for axis in batch if axis not in experts)
    split = next(axes for axes in (batch, without, ()) if tokens[0] % ways(axes) == 0)
    exchange: Literal["local", "ragged", "gather", "replicated"]
    if ranks == 1:
        exchange = "local"
    elif not set(experts) <= set(split):
        exchange = "replicated"
    else:  # with k >= R, sending k copies of a token is no less than sending it to everyone
        exchange = "ragged" if has_ragged_exchange() and k < ranks else "gather"
    met = tokens[0] // ways(split) * (ranks if exchange in ("ragged", "gather") else 1)
    return Plan(split, experts, embed, mlp, ranks, exchange, _most_rows(met, k, weight[0] // ranks, capacity))


def has_ragged_exchange() -> bool:
    """Whether the devices have `ragged_all_to_all`; XLA's CPU backend has not."""
    return platform() in ("gpu", "tpu")


def _most_rows(tokens: int, k: int, experts: int, capacity: Capacity | None) -> int:
    """Most assignments that so many experts can get from so many tokens."""
    dropless = tokens * min(k, experts)
    return dropless if capacity is None else min(dropless, experts * capacity.most(tokens))


# --- What one device does ----------------------------------------------------------------------------------------


def _on_device(plan: Plan, x: jax.Array, weights: Weights, routing: Routing, adapters: Adapters) -> jax.Array:
    """From this device's tokens `[m, D]` and parts of the weights to its summand `[1, m, D]` of the outputs."""
    adapters = tuple(
        _own_randomness(adapter, plan.tokens + (plan.mlp if names[1] == "mlp" else ()))
        for names, adapter in zip(AXES, adapters, strict=True)
    )

    def run(x: jax.Array, weights: Weights, adapters: Adapters) -> jax.Array:
        weights, adapters = _whole(plan, weights, adapters)
        if plan.exchange == "ragged":
            return _send_rows(plan, x, weights, routing, adapters)
        if plan.exchange == "local":
            return moe_mlp(x, *weights, routing, adapters, plan.most)
        if plan.exchange == "replicated":
            return _own_experts(plan, x, weights, routing, adapters)
        gather = functools.partial(jax.lax.all_gather, axis_name=plan.experts, tiled=True)
        kept = None if routing.kept is None else gather(routing.kept)
        met = replace(routing, experts=gather(routing.experts), weights=gather(routing.weights), kept=kept)
        y = _own_experts(plan, gather(x), weights, met, adapters)
        return jax.lax.psum_scatter(y, plan.experts, tiled=True)

    if plan.embed:  # what was gathered is gathered again for the backward pass: keeping it is what fsdp avoids
        run = jax.checkpoint(run, policy=lambda primitive, *_, **__: primitive.name != "all_gather")
    return run(x, weights, adapters)[None]


def _own_experts(plan: Plan, x: jax.Array, weights: Weights, routing: Routing, adapters: Adapters) -> jax.Array:
    """What this device's experts add to the outputs of tokens `[n, D]`, which all devices along `experts` have."""
    here = routing.experts - jax.lax.axis_index(plan.experts) * weights[0].shape[0]
    mine = (here >= 0) & (here < weights[0].shape[0])
    kept = mine if routing.kept is None else mine & routing.kept
    return moe_mlp(x, *weights, replace(routing, experts=here, kept=kept), adapters, plan.most)


def _send_rows(plan: Plan, x: jax.Array, weights: Weights, routing: Routing, adapters: Adapters) -> jax.Array:
    """Send each assignment's row to the device of its expert, run the experts here, send the results back."""
    k, experts = routing.experts.shape[1], weights[0].shape[0]
    sort = sort_by_expert(routing, plan.ranks * experts)
    rows = dispatch(x, sort, k)  # [m * k, D]
    counts = jax.lax.all_gather(sort.sizes.astype(jnp.int32), plan.experts)  # [R, E]
    here = jax.lax.axis_index(plan.experts)
    sizes = counts.reshape(plan.ranks, plan.ranks, experts)[:, here].sum(0)  # [E / R]
    assert plan.most is not None
    shape = (plan.experts, rows.shape[0], plan.most)
    outputs = expert_mlps(_to_experts(rows, counts, *shape), weights, sizes, adapters, _adapted, all_in_use=False)
    return combine(_from_experts(outputs, counts, *shape), sort, routing)


def _adapted(adapter: LowRank, rows: jax.Array, product: Product) -> jax.Array:
    return adapter(rows, product)


def _whole(plan: Plan, weights: Weights, adapters: Adapters) -> tuple[Weights, Adapters]:
    """Gather the parts of weights and factors that are only stored apart."""

    def gather(x: jax.Array, axis: int) -> jax.Array:
        return jax.lax.all_gather(x, plan.embed, axis=axis, tiled=True) if plan.embed else x

    def factors(adapter: LowRank | None, names: tuple[str, ...]) -> LowRank | None:
        if adapter is None:
            return None
        return replace(adapter, a=gather(adapter.a, 1)) if names[1] == "embed" else replace(
            adapter, b=gather(adapter.b, 2)
        )  # fmt: skip

    gate, up, down = (gather(weight, names.index("embed")) for weight, names in zip(weights, AXES, strict=True))
    return (gate, up, down), tuple(factors(adapter, names) for adapter, names in zip(adapters, AXES, strict=True))


def _own_randomness(adapter: LowRank | None, axes: tuple[str, ...]) -> LowRank | None:
    """Let devices with rows (or columns) of their own drop elements of their own."""
    if adapter is None or adapter.key is None or not axes:
        return adapter
    return replace(adapter, key=jax.random.fold_in(adapter.key, jax.lax.axis_index(axes)))


def _spec(plan: Plan, names: tuple[str | None, ...]) -> PartitionSpec:
    return PartitionSpec(*map(plan.axes_of, names))


def _adapter_spec(plan: Plan, names: tuple[str, ...], adapter: LowRank | None) -> Any:
    if adapter is None:
        return None
    stack, width, features = names
    whole = PartitionSpec()
    return LowRank(
        a=_spec(plan, (stack, width, None)),  # type: ignore[arg-type]  # a tree of the same form, as shard_map wants
        b=_spec(plan, (stack, None, features)),  # type: ignore[arg-type]
        rate=None if adapter.rate is None else whole,  # type: ignore[arg-type]
        key=None if adapter.key is None else whole,  # type: ignore[arg-type]
    )


# --- The ragged exchange -----------------------------------------------------------------------------------------


class Slices(NamedTuple):
    """Arguments of `jax.lax.ragged_all_to_all` on one device, `[E]` int32 each, E / R slices for each of R devices.

    Attributes:
        input_offsets: where each slice that is sent begins here.
        send_sizes: its rows.
        output_offsets: where it begins there.
        recv_sizes: rows of each slice that comes, by the device that it comes from.
    """

    input_offsets: jax.Array
    send_sizes: jax.Array
    output_offsets: jax.Array
    recv_sizes: jax.Array


def slices_to_experts(counts: jax.Array, rank: jax.Array | int) -> tuple[Slices, Slices]:
    """Plan one device's part in the exchange that brings rows to their experts, and in the one back.

    Before, a device's rows lie expert after expert. After, a device's experts have theirs one after the other, and
    within an expert they lie by the device they came from: a slice is all that one device has for one expert, and it
    is written right where it belongs.

    Args:
        counts: `[R, E]` rows that each device has for each expert.
        rank: this device, of R; its experts are `rank * E / R` and those that follow.

    Returns:
        The slices of the exchange to the experts, and those of the exchange back.
    """
    ranks = counts.shape[0]
    by_owner = counts.reshape(ranks, ranks, -1)  # [from, to, E / R]
    at_source = (jnp.cumsum(counts, axis=1) - counts).reshape(by_owner.shape)  # where slices begin before
    totals = by_owner.sum(0)
    first = jnp.cumsum(totals, axis=1) - totals  # [to, E / R] where experts begin after
    at_expert = first + jnp.cumsum(by_owner, axis=0) - by_owner  # [from, to, E / R] where slices begin after
    out = [at_source[rank], by_owner[rank], at_expert[rank], by_owner[:, rank]]
    back = [at_expert[:, rank], by_owner[:, rank], at_source[:, rank], by_owner[rank]]
    return Slices(*(part.reshape(-1) for part in out)), Slices(*(part.reshape(-1) for part in back))


def _exchange(x: jax.Array, slices: Slices, axes: tuple[str, ...], rows: int) -> jax.Array:
    return jax.lax.ragged_all_to_all(x, jnp.zeros((rows, x.shape[1]), x.dtype), *slices, axis_name=axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _to_experts(x: jax.Array, counts: jax.Array, axes: tuple[str, ...], places: int, most: int) -> jax.Array:
    """Bring `[places, D]` rows to their experts, `[most, D]`; its transpose is the way back."""
    return _exchange(x, slices_to_experts(counts, jax.lax.axis_index(axes))[0], axes, most)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _from_experts(y: jax.Array, counts: jax.Array, axes: tuple[str, ...], places: int, most: int) -> jax.Array:
    """Bring `[most, D]` results back to where their rows came from, `[places, D]`."""
    return _exchange(y, slices_to_experts(counts, jax.lax.axis_index(axes))[1], axes, places)


_to_experts.defvjp(
    lambda x, counts, *shape: (_to_experts(x, counts, *shape), counts),
    lambda axes, places, most, counts, g: (_from_experts(g, counts, axes, places, most), None),
)
_from_experts.defvjp(
    lambda y, counts, *shape: (_from_experts(y, counts, *shape), counts),
    lambda axes, places, most, counts, g: (_to_experts(g, counts, axes, places, most), None),
)
