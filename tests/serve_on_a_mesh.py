"""What `test_serve_mesh.py` starts in a subprocess with eight simulated devices.

    python tests/serve_on_a_mesh.py MODEL MESH

Serves the same requests by an engine on one device and by one on a mesh, and fails unless their tokens are the same.
"""

import dataclasses
import sys

import jax
from engines import DENSE, NEW, SMALL, model, started, together

from minillm_jax.config import LoraConfig
from minillm_jax.lora import Adapter, init_adapter
from minillm_jax.model import param_axes
from minillm_jax.sharding import check_mesh, make_mesh, tree_shardings
from serve.protocol import Request

BASE = dataclasses.replace(DENSE, vocab_size=96)
MODELS = {"dense": BASE, "moe": dataclasses.replace(BASE, use_moe=True, num_experts=4)}


def requests():
    """Greedy ones, sampled ones, and one of an adapter; prompts of all lengths."""
    prompts = [[(7 * i + j) % 90 + 1 for j in range(3 + 9 * i)] for i in range(5)]
    made = [Request(prompt, NEW, temperature=0.8 * (1 - i % 2), seed=i) for i, prompt in enumerate(prompts)]
    return [*made, Request(prompts[1], NEW, temperature=0.0, adapter="other")]


def adapter(lm):
    """An adapter whose products are not zero."""
    config = LoraConfig(lora_rank=2, lora_alpha=8.0)
    fresh = jax.jit(init_adapter, static_argnums=1)(lm.params, config, jax.random.key(3))
    drawn = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), fresh)
    return Adapter(jax.device_put(jax.device_get(drawn)), config)


def tokens(lm, other):
    """What an engine of this model and an adapter of it draws."""
    engine = started(lm, SMALL, adapters={"other": other})
    drawn = together(engine, requests())
    assert engine.stats().compilations == 0
    assert engine.drain(30)
    return drawn


def main(name, spec):
    """Serve both ways and compare."""
    alone, mesh = model(MODELS[name]), make_mesh(spec)
    check_mesh(mesh, alone.config)
    shardings = tree_shardings(mesh, param_axes(alone.config))
    spread = dataclasses.replace(alone, params=jax.device_put(alone.params, shardings))
    other = adapter(alone)
    expected = tokens(alone, other)
    assert expected[1] != expected[-1]  # the adapter changes something
    assert tokens(spread, other) == expected


if __name__ == "__main__":
    main(*sys.argv[1:])
