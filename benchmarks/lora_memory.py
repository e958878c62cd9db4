"""Memory of adapter training against full fine-tuning: one JSON line.

    python -m benchmarks.lora_memory --preset minillm --lora_rank 8

Both are the very steps that `train.sft` compiles, never run: bytes of optimizer state and of gradients are those of the
arrays that the compiled functions return, and `temporary_bytes` is what XLA plans for the whole step beside its
arguments. `ratio` is (optimizer state + gradients) of the adapter over that of all parameters.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.common import emit, machine
from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import ComputeConfig, LoraConfig, ModelConfig, OptimConfig, parse_cli
from minillm_jax.flops import count_params
from minillm_jax.lora import adapted_loss, init_adapter
from minillm_jax.losses import LossFn, language_model_loss
from minillm_jax.model import init_params
from minillm_jax.optim import make_optimizer, make_schedule
from minillm_jax.trainer import accumulate_gradients, init_state, make_train_step


@dataclass(frozen=True)
class MemoryConfig:
    """What is measured; `--preset` and shape flags choose the model."""

    model: ModelConfig
    preset: str = "minillm"
    """Model shape to start from."""
    batch_size: int = 8
    """Rows B per step."""
    max_seq_len: int = 512
    """Tokens T per row."""
    optim: OptimConfig = OptimConfig()
    compute: ComputeConfig = ComputeConfig()
    lora: LoraConfig = LoraConfig(lora_rank=8)


def nbytes(tree: Any) -> int:
    """Bytes of a tree of arrays or abstract arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def measure_step(config: MemoryConfig, loss_fn: LossFn, params: Any, frozen: Any) -> dict[str, int]:
    """Compile one step on abstract arrays, and count."""
    optimizer = make_optimizer(config.optim, 1000, params)
    state = jax.eval_shape(lambda p: init_state(p, optimizer, 0), params)
    shape = (config.batch_size, config.max_seq_len)
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32 if name == "weights" else jnp.int32)
        for name in ("tokens", "targets", "weights", "segment_ids", "positions")
    }
    step = make_train_step(loss_fn, optimizer, make_schedule(config.optim, 1000))
    compiled = jax.jit(step, donate_argnums=0).lower(state, frozen, batch).compile()
    gradient = jax.jit(lambda p, f, b, k: accumulate_gradients(loss_fn, p, f, b, k, 1)[0])
    planned = gradient.lower(params, frozen, batch, state["key"]).compile().memory_analysis()
    analysis = compiled.memory_analysis()
    return {
        "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "optimizer_bytes": nbytes(state["opt_state"]),
        "gradient_bytes": int(planned.output_size_in_bytes),
        "temporary_bytes": int(analysis.temp_size_in_bytes),
        "argument_bytes": int(analysis.argument_size_in_bytes),
    }


def measure(config: MemoryConfig) -> dict[str, Any]:
    """Measure both."""
    loss_fn = language_model_loss(config.model, config.compute)
    params = jax.eval_shape(partial(init_params, config.model), jax.random.key(0))
    adapter = jax.eval_shape(partial(init_adapter, params, config.lora), jax.random.key(0))
    full = measure_step(config, loss_fn, params, None)
    frozen = {"base": params, "rest": None}
    lora = measure_step(config, adapted_loss(loss_fn, config.lora), adapter, frozen)
    held = [row["optimizer_bytes"] + row["gradient_bytes"] for row in (lora, full)]
    return {
        "name": "lora_memory",
        **machine(),
        "preset": config.preset,
        "parameters": count_params(config.model),
        "batch_size": config.batch_size,
        "seq_len": config.max_seq_len,
        "lora_rank": config.lora.lora_rank,
        "lora": lora,
        "full": full,
        "ratio": round(held[0] / held[1], 4),
        "step_ratio": round(
            (lora["temporary_bytes"] + lora["argument_bytes"]) / (full["temporary_bytes"] + full["argument_bytes"]), 4
        ),
    }


def main() -> int:
    """Print the measurement; returns the exit status."""
    with user_errors():
        config = parse_cli(MemoryConfig, str(__doc__))
        setup_jax()
        emit(measure(config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
