"""How fast are rollouts? Completions drawn in one batch against the same ones drawn one by one.

    python benchmarks/rollout.py --preset tiny

Random weights, random prompts, no end token, so that every completion has its full length. Both are compiled before
they are timed. Prints one JSON line.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass

import jax
import numpy as np

from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import ModelConfig, parse_cli
from minillm_jax.flops import count_params
from minillm_jax.model import init_params
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


def main() -> int:
    """Measure; returns the exit status."""
    with user_errors():
        config = parse_cli(RolloutBenchmark, str(__doc__))
        setup_jax()
        params = init_params(config.model, jax.random.key(0))
        rng = np.random.default_rng(0)
        prompts = rng.integers(3, config.model.vocab_size, (config.completions, config.prompt_len)).tolist()

        def seconds(rows_at_once: int, count: int) -> float:
            began = time.perf_counter()
            rollout = sample_rollout(
                params, config.model, prompts[:count], (), temperature=1.0, max_new_tokens=config.max_new_tokens,
                rows_at_once=rows_at_once, seed=(0,),
            )  # fmt: skip
            assert rollout.tokens == count * config.max_new_tokens
            return time.perf_counter() - began

        seconds(config.completions, config.completions)
        seconds(1, 1)
        batch, alone = seconds(config.completions, config.completions), seconds(1, config.completions)
        tokens = config.completions * config.max_new_tokens
        print(json.dumps({
            "benchmark": "rollout", "device": jax.devices()[0].device_kind, "jax": jax.__version__,
            "parameters": count_params(config.model), "completions": config.completions,
            "max_new_tokens": config.max_new_tokens, "tokens_per_second": round(tokens / batch, 1),
            "tokens_per_second_one_by_one": round(tokens / alone, 1), "ratio": round(alone / batch, 2),
        }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
