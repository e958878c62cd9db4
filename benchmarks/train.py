"""Training throughput of a preset: one JSON line with seconds per step, tokens per second and MFU.

    python benchmarks/train.py --preset minillm --batch_size 8 --max_seq_len 512

It times the very step that the stages run (`trainer.make_train_step`, AdamW, clipping, donated state) on rows of
random tokens that are already on the device. `benchmarks/torch_baseline.py` measures the same step in plain PyTorch.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import ComputeConfig, ModelConfig, OptimConfig, parse_cli
from minillm_jax.flops import count_params, flops_per_token, peak_flops
from minillm_jax.losses import language_model_loss
from minillm_jax.model import compute_dtype, init_params
from minillm_jax.optim import make_optimizer, make_schedule
from minillm_jax.trainer import init_state, make_train_step


@dataclass(frozen=True)
class BenchmarkConfig:
    """What is measured; `--preset` and shape flags choose the model."""

    model: ModelConfig
    preset: str = "minillm"
    """Model shape to start from."""
    batch_size: int = 8
    """Rows B per step."""
    max_seq_len: int = 512
    """Tokens T per row."""
    steps: int = 8
    """Timed steps."""
    warmup: int = 2
    """Steps before the clock starts."""
    optim: OptimConfig = OptimConfig()
    compute: ComputeConfig = ComputeConfig()


def random_batch(config: BenchmarkConfig) -> dict[str, np.ndarray]:
    """Full rows of random tokens, `[B, T]`."""
    shape = (config.batch_size, config.max_seq_len)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (shape[0], shape[1] + 1), np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones(shape, np.float32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
    }


def measure(config: BenchmarkConfig) -> dict[str, object]:
    """Time the training step."""
    schedule = make_schedule(config.optim, 1000)
    params = jax.jit(partial(init_params, config.model))(jax.random.key(0))
    optimizer = make_optimizer(config.optim, 1000, params)
    state = jax.jit(lambda p: init_state(p, optimizer, 0), donate_argnums=0)(params)
    step = make_train_step(language_model_loss(config.model, config.compute), optimizer, schedule)
    batch = jax.device_put(random_batch(config))
    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, None, batch).compile()
    compile_seconds = time.perf_counter() - began
    seconds = []
    for _ in range(config.warmup + config.steps):
        began = time.perf_counter()
        state, metrics = compiled(state, None, batch)
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - began)
    timed = seconds[config.warmup :]
    median = statistics.median(timed)
    quartiles = statistics.quantiles(timed, n=4) if len(timed) > 1 else [median] * 3
    tokens_per_second = config.batch_size * config.max_seq_len / median
    peak = peak_flops(jax.devices()[0])
    flops = flops_per_token(config.model, config.max_seq_len)
    return {
        "name": "train",
        "hardware": f"{jax.devices()[0].device_kind} {platform.machine()}",
        "jax": jax.__version__,
        "dtype": np.dtype(compute_dtype(config.compute)).name,
        "preset": config.preset,
        "batch_size": config.batch_size,
        "seq_len": config.max_seq_len,
        "parameters": count_params(config.model),
        "step_seconds_median": round(median, 4),
        "step_seconds_iqr": round(quartiles[2] - quartiles[0], 4),
        "compile_seconds": round(compile_seconds, 2),
        "tokens_per_second": round(tokens_per_second, 1),
        "flops_per_token": flops,
        "mfu": None if peak is None else round(tokens_per_second * flops / peak, 4),
        "loss": round(loss, 4),
    }


def main() -> int:
    """Print the measurement; returns the exit status."""
    with user_errors():
        config = parse_cli(BenchmarkConfig, str(__doc__))
        setup_jax()
        print(json.dumps(measure(config)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
