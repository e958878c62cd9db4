"""Programs on simulated devices: what `test_meshes.py` starts in a subprocess with eight of them, and reads as JSON.

    python tests/mesh_programs.py FILE MODEL[+MODEL ...] MESH [MESH ...]

For each mesh: twenty steps of training, sampled completions, and where parameters and optimizer state lie. In the same
process the first device alone does the same, without a mesh.
"""

import dataclasses
import json
import os
import re
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from minillm_jax.config import ComputeConfig, ModelConfig, OptimConfig
from minillm_jax.losses import language_model_loss
from minillm_jax.model import init_params, param_axes
from minillm_jax.optim import make_optimizer, make_schedule
from minillm_jax.sampler import decode_stream
from minillm_jax.sampling import SamplingParams
from minillm_jax.sharding import make_mesh, mesh_of, optimizer_shardings, tree_shardings
from minillm_jax.trainer import init_state, make_train_step, put_batch

DENSE = ModelConfig(
    vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
    intermediate_size=48, initializer_range=0.1, max_position_embeddings=256, dropout=0.1,
)  # fmt: skip
MOE = dataclasses.replace(DENSE, use_moe=True, num_experts=4, moe_intermediate_size=24)
MODELS = {"dense": DENSE, "moe": MOE, "two_kv_heads": dataclasses.replace(DENSE, num_key_value_heads=2)}
STEPS, MICRO_BATCHES = 20, 2
OPTIM = OptimConfig(learning_rate=1e-2, adam_eps=1e-2)


def uneven_rows(step, rows=16, length=24):
    """Rows of two segments and padding, whose loss masks differ widely in size."""
    rng = np.random.default_rng(step)
    first, second = rng.integers(2, length // 2, (2, rows, 1))
    place = np.arange(length)
    segment_ids = np.where(place < first, 1, np.where(place < first + second, 2, 0)).astype(np.int32)
    keep = rng.random((rows, length)) < np.linspace(0.05, 1, rows)[:, None]
    tokens = rng.integers(0, DENSE.vocab_size, (rows, length + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": (keep & (segment_ids > 0)).astype(np.float32),
        "segment_ids": segment_ids,
        "positions": np.where(place < first, place, place - first).astype(np.int32),
    }


def first_state(config, optimizer, mesh):
    """Make the first state as a run does: drawn in place, on a mesh each device its part."""
    make = lambda key: init_state(init_params(config, key), optimizer, 3)
    shardings = None
    if mesh is not None:
        params = jax.eval_shape(partial(init_params, config), jax.random.key(0))
        where = tree_shardings(mesh, param_axes(config))
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        opt_state = optimizer_shardings(mesh, optimizer, params, where)
        shardings = {"params": where, "opt_state": opt_state, "step": everywhere, "key": everywhere}
    return jax.jit(make, out_shardings=shardings)(jax.random.key(1)), shardings


def train(config, mesh):
    """Losses and gradient norms of a few steps; the parameters at the end; and the compiled step."""
    shapes = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    optimizer = make_optimizer(OPTIM, STEPS, shapes)
    state, shardings = first_state(config, optimizer, mesh)
    step = make_train_step(
        language_model_loss(config, ComputeConfig()), optimizer, make_schedule(OPTIM, STEPS), MICRO_BATCHES
    )
    out = None if mesh is None else (shardings, None)
    place = (lambda rows: jax.device_put(rows, jax.devices()[0])) if mesh is None else partial(put_batch, mesh=mesh)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=out).lower(state, None, place(uneven_rows(0))).compile()
    found = []
    for i in range(STEPS):
        state, metrics = compiled(state, None, place(uneven_rows(i)))
        found.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return found, state, compiled


def sample(params, config):
    """Tokens of prompts of different lengths, some of them repeated, greedy and drawn."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, config.vocab_size, 3 + 2 * i).tolist() for i in range(3)]
    found = []
    for several, sampling, shrink in (
        (prompts, SamplingParams(max_new_tokens=12, temperature=0.0), False),
        ([p for p in prompts for _ in range(4)], SamplingParams(max_new_tokens=12, top_p=0.9), True),
        (prompts[:1], SamplingParams(max_new_tokens=12, repetition_penalty=1.3), False),
    ):
        stream = decode_stream(params, config, several, sampling, [0, 1, 2, 3], seed=5, shrink=shrink)
        found.append(np.concatenate([tokens for tokens, _ in stream], axis=1).tolist())
    return found


def largest_share(tree):
    """The largest part of its array that one device holds, by name, for arrays of a thousand elements and more."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): max(
            shard.data.size / leaf.size for shard in leaf.addressable_shards
        )
        for path, leaf in leaves
        if leaf.size >= 1000
    }


def device_bytes(tree):
    """Bytes of a tree that the first device holds."""
    first = jax.devices()[0]
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    return sum(s.data.nbytes for leaf in leaves for s in leaf.addressable_shards if s.device == first)


def measure(config, spec):
    """What one device measures (no spec) or a mesh of all."""
    mesh = None if spec is None else make_mesh(spec)
    with jax.set_mesh(mesh) if mesh is not None else jax.default_device(jax.devices()[0]):
        steps, state, compiled = train(config, mesh)
        memory = compiled.memory_analysis()
    found = {
        "steps": steps,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "state_bytes": device_bytes(state),
        "shares": largest_share({"params": state["params"], "opt_state": state["opt_state"]}),
        "gathers": gathers(compiled.as_text()),
    }
    assert (mesh_of(state["params"]) is None) == (mesh is None)
    found["tokens"] = sample(state["params"], dataclasses.replace(config, dropout=0.0))
    return found


def gathers(text):
    """Shapes of all arrays that a compiled program gathers from devices."""
    return re.findall(r"= (\S+\[[\d,]*\])\S* all-gather(?:-start)?\(", text)


def main():
    path, *meshes = sys.argv[1:]
    names = meshes.pop(0).split("+")
    found = {name: {str(spec): measure(MODELS[name], spec) for spec in (None, *meshes)} for name in names}
    Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
