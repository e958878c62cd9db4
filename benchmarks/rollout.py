"""How fast are rollouts? Completions drawn in one batch against the same ones drawn one by one. One JSON line.

    python -m benchmarks.rollout --preset tiny

Random weights, random prompts, no end token, so that every completion has its full length. It times `sample_rollout`,
as the reinforcement stages call it: sorting, prefill, decoding and the way back to Python. Both are compiled before
they are timed. FLOPs and bytes are those of reading the prompts once and of all decode steps.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from benchmarks.common import digits, emit, machine, spread, timed
from benchmarks.roofline import Work, against, decode_work, prefill_work, roofline
from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import ComputeConfig, ConfigError, ModelConfig, parse_cli
from minillm_jax.flops import count_params
from minillm_jax.model import compute_dtype, init_params
from rl.rollout import sample_rollout


@dataclass(frozen=True)
class RolloutBenchmark:
    """What is drawn."""

    model: ModelConfig
    preset: str = "minillm"
    """Shape of the model: minillm, minimind3, minimind3_moe or tiny."""
    completions: int = 64
    """Completions, each of a prompt of its own."""
    prompt_len: int = 32
    """Tokens of a prompt."""
    max_new_tokens: int = 64
    """Tokens of a completion."""
    rounds: int = 3
    """Timed rollouts of the whole batch."""
    one_by_one: int = 64
    """Completions that are drawn one by one for comparison, at most; 0 leaves it out."""
    append: str | None = None
    """File that the line is appended to as well."""
    compute: ComputeConfig = ComputeConfig()

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if min(self.completions, self.prompt_len, self.max_new_tokens, self.rounds) < 1 or self.one_by_one < 0:
            raise ConfigError("--completions, --prompt_len, --max_new_tokens and --rounds must be at least 1")


def rollout_work(config: RolloutBenchmark) -> Work:
    """Count a whole rollout in one batch, from float32 parameters."""
    model, rows, itemsize = config.model, config.completions, np.dtype(compute_dtype(config.compute)).itemsize
    reading = prefill_work(model, rows, config.prompt_len, itemsize, 4)
    step = decode_work(model, rows, config.prompt_len + (config.max_new_tokens + 1) / 2, itemsize, 4)
    steps = config.max_new_tokens
    return Work(reading.flops + steps * step.flops, reading.bytes + steps * step.bytes)


def measure(config: RolloutBenchmark) -> dict[str, Any]:
    """Time both ways."""
    params = jax.jit(init_params, static_argnums=0)(config.model, jax.random.key(0))
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, config.model.vocab_size, (config.completions, config.prompt_len)).tolist()

    def draw(rows_at_once: int, count: int) -> None:
        rollout = sample_rollout(
            params, config.model, prompts[:count], (), temperature=1.0, max_new_tokens=config.max_new_tokens,
            rows_at_once=rows_at_once, seed=(0,), compute=config.compute,
        )  # fmt: skip
        if rollout.tokens != count * config.max_new_tokens:
            raise ConfigError(
                f"{count} completions have {rollout.tokens} tokens instead of {config.max_new_tokens} each"
            )

    seconds = spread("seconds", timed(lambda: draw(config.completions, config.completions), config.rounds))
    rate = config.completions * config.max_new_tokens / seconds["seconds_median"]
    alone = min(config.one_by_one, config.completions)
    rate_alone = None
    if alone:
        draw(1, 1)
        rate_alone = alone * config.max_new_tokens / timed(lambda: draw(1, alone), 1, warmup=0)[0]
    return {
        "name": "rollout",
        **machine(),
        "dtype": np.dtype(compute_dtype(config.compute)).name,
        "preset": config.preset,
        "parameters": count_params(config.model),
        "completions": config.completions,
        "prompt_len": config.prompt_len,
        "max_new_tokens": config.max_new_tokens,
        **seconds,
        "tokens_per_second": digits(rate),
        "tokens_per_second_one_by_one": None if rate_alone is None else digits(rate_alone),
        "ratio": None if rate_alone is None else round(rate / rate_alone, 2),
        **against(rollout_work(config), seconds["seconds_median"], roofline(jax.devices()[0])),
    }


def main() -> int:
    """Measure; returns the exit status."""
    with user_errors():
        config = parse_cli(RolloutBenchmark, str(__doc__))
        setup_jax()
        emit(measure(config), config.append)
    return 0


if __name__ == "__main__":
    sys.exit(main())
