"""Compile whole training steps for a TPU slice that is not there, and print what is in them as JSON.

Run as a command: `python tpu_programs.py MESH`. A process of its own, because the compiler for TPU changes the process
that loads it.
"""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from minillm_jax.config import ComputeConfig, ModelConfig, OptimConfig
from minillm_jax.losses import language_model_loss
from minillm_jax.model import init_params, param_axes
from minillm_jax.optim import make_optimizer, make_schedule
from minillm_jax.sharding import batch_sharding, make_mesh, optimizer_shardings, tree_shardings
from minillm_jax.trainer import init_state, make_train_step

DENSE = ModelConfig(
    vocab_size=512, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)  # fmt: skip
MODELS = {
    "dense": DENSE,
    "experts": dataclasses.replace(DENSE, use_moe=True, moe_intermediate_size=256, n_shared_experts=0),
}
ROWS, TOKENS = 16, 256


def compiled_text(config, spec):
    """The compiled program of one training step on a mesh of a v5e slice of 16 chips."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
    mesh = make_mesh(spec, list(topology.devices))
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    optimizer = make_optimizer(OptimConfig(), 10, shapes)
    lie = tree_shardings(mesh, param_axes(config))
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = {
        "params": lie,
        "opt_state": optimizer_shardings(mesh, optimizer, shapes, lie),
        "step": whole,
        "key": whole,
    }
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(lambda params: init_state(params, optimizer, 0), shapes),
        shardings,
    )
    batch = {
        name: jax.ShapeDtypeStruct((ROWS, TOKENS), dtype, sharding=batch_sharding(mesh))
        for name, dtype in dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), jnp.int32).items()
    } | {"weights": jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.float32, sharding=batch_sharding(mesh))}
    compute = ComputeConfig(dtype="bfloat16", remat="none")
    step = make_train_step(language_model_loss(config, compute), optimizer, make_schedule(OptimConfig(), 10))
    with jax.set_mesh(mesh):  # only now: what runs eagerly in here would run on devices that are not there
        program = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(state, None, batch)
        return program.compile({"exec_time_optimization_effort": -1.0}).as_text()


def kernels_of(config, spec):
    """Names of the kernels that a compiled training step calls."""
    calls = [line for line in compiled_text(config, spec).splitlines() if '"tpu_custom_call"' in line]
    return sorted({name for line in calls for name in re.findall(r"splash_mha_(?:fwd|dq|dkv)|\bt?gmm\b", line)})


if __name__ == "__main__":
    print(json.dumps({name: kernels_of(config, sys.argv[1]) for name, config in MODELS.items()}))
