"""Training throughput of a preset: one JSON line with seconds per step, tokens per second and what limits them.

    python -m benchmarks.train --preset minillm --batch_size 8 --max_seq_len 512

It times the very step that the stages run (`trainer.make_train_step`, AdamW, clipping, donated state) on rows of
random tokens that are already on the device. FLOPs and bytes are counted in `benchmarks/roofline.py`; `mfu` is FLOPs
alone over the device's peak. `benchmarks/torch_baseline.py` measures the same step in plain PyTorch.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from benchmarks.common import digits, emit, machine, peak_memory_gib, spread, timed
from benchmarks.roofline import against, roofline, train_work
from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import ComputeConfig, ConfigError, ModelConfig, OptimConfig, parse_cli
from minillm_jax.flops import count_params, flops_per_token
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
    append: str | None = None
    """File that the line is appended to as well."""
    optim: OptimConfig = OptimConfig()
    compute: ComputeConfig = ComputeConfig()

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if min(self.batch_size, self.max_seq_len, self.steps) < 1 or self.warmup < 0:
            raise ConfigError("--batch_size, --max_seq_len and --steps must be at least 1, --warmup at least 0")


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
    model, schedule = config.model, make_schedule(config.optim, 1000)
    params = jax.jit(partial(init_params, model))(jax.random.key(0))
    optimizer = make_optimizer(config.optim, 1000, params)
    state = jax.jit(lambda p: init_state(p, optimizer, 0), donate_argnums=0)(params)
    step = make_train_step(language_model_loss(model, config.compute), optimizer, schedule)
    batch = jax.device_put(random_batch(config))
    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, None, batch).compile()
    compile_seconds = time.perf_counter() - began
    loss = 0.0

    def run() -> None:
        nonlocal state, loss
        state, metrics = compiled(state, None, batch)
        loss = float(metrics["loss"])

    seconds = spread("step_seconds", timed(run, config.steps, config.warmup))
    dtype = np.dtype(compute_dtype(config.compute))
    work = train_work(model, config.batch_size, config.max_seq_len, dtype.itemsize)
    peaks, median = roofline(jax.devices()[0]), seconds["step_seconds_median"]
    return {
        "name": "train",
        **machine(),
        "dtype": dtype.name,
        "preset": config.preset,
        "batch_size": config.batch_size,
        "seq_len": config.max_seq_len,
        "parameters": count_params(model),
        "active_parameters": count_params(model, active=True),
        **seconds,
        "steps": config.steps,
        "compile_seconds": round(compile_seconds, 2),
        "tokens_per_second": digits(config.batch_size * config.max_seq_len / median),
        "flops_per_token": flops_per_token(model, config.max_seq_len),
        **against(work, median, peaks),
        "mfu": None if peaks is None else round(work.flops / median / peaks.flops, 4),
        "peak_memory_gib": peak_memory_gib(),
        "loss": round(loss, 4),
    }


def main() -> int:
    """Print the measurement; returns the exit status."""
    with user_errors():
        config = parse_cli(BenchmarkConfig, str(__doc__))
        setup_jax()
        emit(measure(config), config.append)
    return 0


if __name__ == "__main__":
    sys.exit(main())
