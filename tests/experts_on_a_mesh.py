"""What eight simulated devices make of a MoE layer, held against one: run as a program, it prints one JSON object.

`test_expert_parallel` runs it in a process of its own, where XLA can be told to simulate devices, and judges the
numbers: largest differences, relative to the largest value.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import dataclasses
import functools
import json
import re
import sys
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm_jax import expert_parallel, moe
from minillm_jax.cache import init_cache
from minillm_jax.config import ComputeConfig, ModelConfig, OptimConfig
from minillm_jax.expert_parallel import Capacity, expert_layer
from minillm_jax.losses import language_model_loss
from minillm_jax.matmul import LowRank
from minillm_jax.model import forward_hidden, init_params, param_axes, unembed
from minillm_jax.optim import make_optimizer, make_schedule
from minillm_jax.sharding import batch_sharding, make_mesh, optimizer_shardings, tree_shardings
from minillm_jax.trainer import init_state, make_train_step

D, F, E = 8, 16, 8
LAYER = ModelConfig(hidden_size=D, num_attention_heads=2, num_key_value_heads=1, use_moe=True, num_experts=E)
MODEL = ModelConfig(
    vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    intermediate_size=16, use_moe=True, num_experts=E, moe_intermediate_size=12, initializer_range=0.2,
    expert_capacity_factor=1.0,
)  # fmt: skip
EXPERT_WEIGHT = re.compile(r"(^|,)8,(16|8),(12|6)$|(^|,)8,(12|6),(16|8)$")
"""Shapes of MODEL's stacks of experts with all of them, or of their parts over fsdp and tensor."""


def emulated_exchange(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`jax.lax.ragged_all_to_all` by its documentation, for a backend without it: everything is gathered, what is
    meant for this device is copied. Receivers that expect another number of rows than are sent get NaN."""
    here, ranks = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
    gather = functools.partial(jax.lax.all_gather, axis_name=axis_name)
    per_device = input_offsets.shape[0] // ranks
    mine = lambda x: jax.lax.dynamic_slice_in_dim(gather(x), here * per_device, per_device, axis=1).reshape(-1)
    begins, sizes, targets = mine(input_offsets), mine(send_sizes), mine(output_offsets)
    rows = jnp.repeat(gather(operand), per_device, axis=0)  # [R * per_device, rows, D]
    place = jnp.arange(operand.shape[0]) - begins[:, None]
    inside = (place >= 0) & (place < sizes[:, None])
    target = jnp.where(inside, targets[:, None] + place, output.shape[0])
    result = output.at[target.reshape(-1)].set(rows.reshape(-1, operand.shape[1]), mode="drop")
    return jnp.where((sizes == recv_sizes).all(), result, jnp.nan)


def on(exchange):
    """Choose the exchange for what is traced from here on."""
    expert_parallel.has_ragged_exchange = lambda: exchange == "ragged"
    jax.lax.ragged_all_to_all = emulated_exchange


def difference(ours, theirs):
    pairs = zip(jax.tree.leaves(jax.device_get(ours)), jax.tree.leaves(jax.device_get(theirs)), strict=True)
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in pairs)


# --- The layer ---------------------------------------------------------------------------------------------------


def inputs(tokens, rank=0, seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 12))
    draw = lambda *shape: jax.random.normal(next(keys), shape)
    arrays = {"x": draw(tokens, D), "weights": (draw(E, D, F), draw(E, D, F), draw(E, F, D)), "logits": draw(tokens, E)}
    if rank:
        pair = lambda width, out: LowRank(draw(E, width, rank), draw(E, rank, out))
        arrays["adapters"] = (pair(D, F), pair(D, F), pair(F, D))
    return arrays


@functools.cache
def layer_and_gradients(layer, exchange, mesh, k, length=0, factor=None):
    """Make the jitted `(arrays, cotangent, segment_ids) -> (output, gradients)`; a factor needs rows of a length.

    Exchange and mesh only keep what was traced under one apart from another.
    """
    # A single expert's normalised weight is always 1: its gradient is nothing but rounding.
    config = dataclasses.replace(LAYER, num_experts_per_tok=k, expert_capacity_factor=factor, norm_topk_prob=k > 1)

    def loss(arrays, cotangent, segment_ids):
        routing, _ = moe.limit_to_capacity(moe.route(arrays["logits"], config), segment_ids, config)
        capacities = moe.expert_capacities(length, config)
        capacity = None if capacities is None else Capacity(int(capacities[-1]), length)
        adapters = arrays.get("adapters", (None, None, None))
        y = layer(arrays["x"], arrays["weights"], routing, adapters, capacity)
        return (y * cotangent).sum(), y

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def plain_layer(x, weights, routing, adapters, capacity):
    return moe.moe_mlp(x, *weights, routing, adapters)


def compare(mesh, exchange, tokens, k, rank=0, length=0, factor=None, examples=1):
    """Largest difference of output and gradients over routings: even, all to one expert, some experts without any."""
    on(exchange)
    ours = layer_and_gradients(expert_layer, exchange, mesh, k, length, factor)
    theirs = layer_and_gradients(plain_layer, None, None, k, length, factor)
    arrays, cotangent = inputs(tokens, rank), jax.random.normal(jax.random.key(9), (tokens, D))
    mesh, found = make_mesh(mesh), []

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None)
    @given(
        bias=st.lists(st.sampled_from([0.0, 0.0, 30.0, -30.0]), min_size=E, max_size=E),
        padding=st.lists(st.booleans(), min_size=tokens, max_size=tokens),
    )
    def check(bias, padding):
        logits = arrays["logits"] + jnp.asarray(bias)
        segments = jnp.asarray(padding, jnp.int32).reshape(-1, length or tokens)
        case = (arrays | {"logits": logits}, cotangent, segments)
        with jax.set_mesh(mesh):
            here = ours(*case)
        found.append(difference(here, theirs(*case)))

    check()
    return max(found)


def layers():
    """The ways that tokens and experts can meet."""
    return {
        "all experts here": compare("data=2,fsdp=2,tensor=2", "gather", 16, 2, examples=8),
        "gathered": compare("data=2,tensor=2,expert=2", "gather", 16, 2, examples=8),
        "sent": compare("fsdp=2,expert=4", "ragged", 16, 2, examples=8),
        "too few tokens for the mesh": compare("data=2,fsdp=2,expert=2", "gather", 5, 2),
        "adapters": compare("tensor=2,expert=4", "ragged", 16, 2, rank=3),
    }


def more_layers():
    """Further meshes, shapes and numbers of experts per token."""
    return {
        "data=8": compare("data=8", "gather", 16, 2, examples=20),
        "tensor=8": compare("tensor=8", "gather", 16, 2, examples=20),
        "fsdp=4,expert=2": compare("fsdp=4,expert=2", "gather", 16, 2, examples=20),
        "data=2,expert=4": compare("data=2,expert=4", "ragged", 40, 3, examples=20),
        "expert=8, all experts for every token": compare("expert=8", "gather", 24, 8, examples=20),
        "expert=8, a limit and rows cut through": compare(
            "expert=8", "ragged", 24, 1, length=12, factor=0.5, examples=20
        ),
        "gathered adapters": compare("fsdp=2,tensor=2,expert=2", "gather", 16, 2, rank=3),
    }


def dropout():
    """Outputs of equal tokens, one a device, whose adapters drop elements: how many differ."""
    on("gather")
    arrays = inputs(8, rank=3)
    x = jnp.ones((8, D))
    routing = moe.route(jnp.zeros((8, E)).at[:, 0].set(9.0), dataclasses.replace(LAYER, num_experts_per_tok=1))
    drop = lambda a: dataclasses.replace(a, rate=jnp.float32(0.5), key=jax.random.key(1))
    with jax.set_mesh(make_mesh("data=8")):
        y = jax.jit(expert_layer)(x, arrays["weights"], routing, tuple(map(drop, arrays["adapters"])))
    return len(np.unique(np.asarray(y).round(4), axis=0))


# --- The model ---------------------------------------------------------------------------------------------------


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, MODEL.vocab_size, (8, 13))
    segment_ids = np.ones((8, 12), np.int32)
    segment_ids[:, 7:], segment_ids[::2, 10:] = 2, 0
    return {
        "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": (segment_ids > 0).astype(np.float32),
        "segment_ids": segment_ids, "positions": np.tile(np.arange(12), (8, 1)),
    }  # fmt: skip


def train_step(mesh=None):
    """One step: metrics, what it added to the parameters, the parameters, and the compiled program."""
    params = init_params(MODEL, jax.random.key(0))
    # With an epsilon this large Adam's update is in proportion to the gradient, so that its errors show.
    optim = OptimConfig(learning_rate=1.0, warmup_ratio=0.0, adam_eps=1.0, weight_decay=0.0)
    optimizer = make_optimizer(optim, 10, params)
    step = make_train_step(language_model_loss(MODEL, ComputeConfig()), optimizer, make_schedule(optim, 10))
    state, rows, out, scope = init_state(params, optimizer, seed=1), batch(), None, nullcontext()
    if mesh is not None:
        shardings = tree_shardings(mesh, param_axes(MODEL))
        moments = optimizer_shardings(mesh, optimizer, params, shardings)
        state |= {"params": jax.device_put(params, shardings), "opt_state": jax.device_put(state["opt_state"], moments)}
        rows, scope = jax.device_put(rows, batch_sharding(mesh)), jax.set_mesh(mesh)
        out = ({"params": shardings, "opt_state": moments, "step": None, "key": None}, None)
    with scope:
        compiled = jax.jit(step, out_shardings=out).lower(state, None, rows).compile()
        after, metrics = compiled(state, None, rows)
    added = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), after["params"], params)
    return metrics, added, after["params"], compiled


def gathered_experts(compiled):
    """Shapes of three or more axes that all-gathers of a program make, and those of stacks with all experts."""
    results = re.findall(r"= (\S+|\([^=]*?\)) all-gather(?:-start)?\(", compiled.as_text())
    shapes = {shape for result in results for shape in re.findall(r"\[([\d,]*)\]", result) if shape.count(",") > 1}
    return sorted(shapes), sorted(filter(EXPERT_WEIGHT.search, shapes))


def step():
    """A training step on a mesh and on one device."""
    on("gather")
    metrics, added, *_ = train_step()
    ours, ours_added, params, compiled = train_step(make_mesh("fsdp=2,tensor=2,expert=2"))
    experts = jax.tree.leaves(params["layers"]["mlp"]["experts"])
    shapes, whole = gathered_experts(compiled)
    here = sum(x.addressable_shards[0].data.size for x in experts)
    return {
        "metrics": {key: [float(ours[key]), float(value)] for key, value in metrics.items()},
        "added": difference(ours_added, added),
        "gathered": shapes,
        "whole stacks gathered": whole,
        "share of experts here": here / sum(x.size for x in experts),
    }


def scopes():
    """Forward passes with every scope of the balancing loss, all outputs compared."""
    params, rows, case = init_params(MODEL, jax.random.key(0)), batch(), {}
    for scope in ("sequence", "batch", "model"):
        config = dataclasses.replace(MODEL, router_aux_loss_scope=scope)
        run = jax.jit(lambda params, tokens, segments, config=config: dataclasses.astuple(
            forward_hidden(params, config, tokens, segment_ids=segments, dropout_key=jax.random.key(0))
        ))  # fmt: skip
        alone = run(params, rows["tokens"], rows["segment_ids"])
        with jax.set_mesh(make_mesh("data=2,expert=4")):
            case[scope] = difference(run(params, rows["tokens"], rows["segment_ids"]), alone)
    return case


def generation():
    """Greedy continuations of three prompts, whose number no mesh axis divides, on a mesh and on one device."""
    params = init_params(MODEL, jax.random.key(0))
    tokens = batch()["tokens"][:3]

    def run(params, tokens):
        cache = init_cache(MODEL, 3, 16)
        output = forward_hidden(params, MODEL, tokens, cache=cache)
        logits = [unembed(params, MODEL, output.hidden)]
        for _ in range(2):
            token = logits[-1][:, -1:].argmax(-1)
            output = forward_hidden(params, MODEL, token, cache=output.cache)
            logits.append(unembed(params, MODEL, output.hidden))
        return logits

    alone = jax.jit(run)(params, tokens)
    mesh = make_mesh("fsdp=2,tensor=2,expert=2")
    spread = jax.device_put(params, tree_shardings(mesh, param_axes(MODEL)))
    with jax.set_mesh(mesh):
        return difference(jax.jit(run)(spread, tokens), alone)


WANTED = {f.__name__: f for f in (layers, more_layers, dropout, step, scopes, generation)}

if __name__ == "__main__":
    print(json.dumps({name: WANTED[name]() for name in sys.argv[1:]}))
