"""Speed of generation: reading prompts and drawing tokens, for several batch sizes. One JSON line per batch size.

    python -m benchmarks.decode --preset minillm --batch_sizes 1 16 64

It times the compiled functions that `generate` runs, `sampler.prefill` and `sampler.decode_chunk` (16 steps a call,
sampling included), on random weights and random prompts; no row ends. Prefill is held against the roofline of its FLOPs
and bytes, and so is a decode step, whose bytes are all weights and the cache of all rows: see `benchmarks/roofline.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import digits, emit, machine, peak_memory_gib, spread, timed
from benchmarks.roofline import Roofline, against, decode_work, prefill_work, roofline
from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import ComputeConfig, ConfigError, ModelConfig, parse_cli
from minillm_jax.flops import count_params
from minillm_jax.model import Params, compute_dtype, init_params
from minillm_jax.sampler import CHUNK, bucket, decode_chunk, prefill
from minillm_jax.sampling import SamplingParams, sampling_arrays


@dataclass(frozen=True)
class DecodeBenchmark:
    """What is generated; `--preset` and shape flags choose the model."""

    model: ModelConfig
    preset: str = "minillm"
    """Model shape to start from."""
    batch_sizes: tuple[int, ...] = (1, 16, 64)
    """Rows B at once, one line each."""
    prompt_len: int = 256
    """Tokens T of a prompt."""
    chunks: int = 8
    """Timed chunks of 16 tokens a row."""
    prefills: int = 8
    """Timed readings of the prompts."""
    temperature: float = 1.0
    """Of the sampling; 0 takes the likeliest token."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """Dtype that parameters are stored in: float32 as training leaves them, bfloat16 as in many foreign folders."""
    append: str | None = None
    """File that the lines are appended to as well."""
    compute: ComputeConfig = ComputeConfig()

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if min(*self.batch_sizes, self.prompt_len, self.chunks, self.prefills) < 1:
            raise ConfigError("--batch_sizes, --prompt_len, --chunks and --prefills must be at least 1")
        if self.cache_length > self.model.max_position_embeddings:
            raise ConfigError(
                f"--prompt_len and --chunks: {self.cache_length} slots are more than max_position_embeddings "
                f"({self.model.max_position_embeddings})"
            )

    @property
    def cache_length(self) -> int:
        """Slots S of the cache: the prompt, a chunk to warm up with, and those that are timed."""
        return bucket(self.prompt_len + (1 + self.chunks) * CHUNK)


def measure(config: DecodeBenchmark, params: Params, batch: int, peaks: Roofline | None) -> dict[str, Any]:
    """Time both parts for one batch size."""
    model, settings = config.model, sampling_arrays([SamplingParams(temperature=config.temperature)] * batch)
    tokens = np.random.default_rng(0).integers(3, model.vocab_size, (batch, config.prompt_len), np.int32)
    lengths = jnp.full(batch, config.prompt_len, jnp.int32)
    keys = jax.random.split(jax.random.key(0), batch)
    no_end = jnp.full((batch, 1), -1, jnp.int32)
    tokens, state = jax.device_put(tokens), None

    def read() -> None:
        nonlocal state
        state = prefill(
            params, model, tokens, lengths, keys,
            cache_length=config.cache_length, track_seen=False, compute=config.compute,
        )  # fmt: skip
        state.logits.block_until_ready()

    def draw() -> None:
        nonlocal state
        state, drawn, _ = decode_chunk(params, model, state, settings, no_end, steps=CHUNK, compute=config.compute)
        if int(jax.device_get(drawn).min()) < 0:
            raise ConfigError("a row ended in the benchmark's decoding, where none can; sampling is broken")

    prefill_seconds = spread("prefill_seconds", timed(read, config.prefills))
    steps = spread("step_seconds", [seconds / CHUNK for seconds in timed(draw, config.chunks)])
    itemsize, stored = np.dtype(compute_dtype(config.compute)).itemsize, jnp.dtype(config.weights).itemsize
    context = config.prompt_len + CHUNK + (config.chunks * CHUNK + 1) / 2  # mean over the timed steps
    reading = prefill_work(model, batch, config.prompt_len, itemsize, stored)
    drawing = decode_work(model, batch, context, itemsize, stored)
    prefill_median, step_median = prefill_seconds["prefill_seconds_median"], steps["step_seconds_median"]
    return {
        "batch_size": batch,
        **prefill_seconds,
        "prefill_tokens_per_second": digits(batch * config.prompt_len / prefill_median),
        "prefill": against(reading, prefill_median, peaks),
        **steps,
        "tokens_per_second": digits(batch / step_median),
        "mean_context": context,
        "decode": against(drawing, step_median, peaks),
        "peak_memory_gib": peak_memory_gib(),
    }


def lines(config: DecodeBenchmark) -> Iterator[dict[str, Any]]:
    """Measure every batch size; yields a line of each."""
    params = jax.jit(
        lambda key: jax.tree.map(lambda leaf: leaf.astype(config.weights), init_params(config.model, key))
    )(jax.random.key(0))
    peaks = roofline(jax.devices()[0])
    for batch in config.batch_sizes:
        yield {
            "name": "decode",
            **machine(),
            "dtype": np.dtype(compute_dtype(config.compute)).name,
            "weights": config.weights,
            "preset": config.preset,
            "parameters": count_params(config.model),
            "prompt_len": config.prompt_len,
            "cache_slots": config.cache_length,
            "chunk": CHUNK,
            "temperature": config.temperature,
            **measure(config, params, batch, peaks),
        }


def main() -> int:
    """Measure and print; returns the exit status."""
    with user_errors():
        config = parse_cli(DecodeBenchmark, str(__doc__))
        setup_jax()
        for line in lines(config):
            emit(line, config.append)
    return 0


if __name__ == "__main__":
    sys.exit(main())
