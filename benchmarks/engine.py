"""How fast is the serving engine? Tokens per second for one client and for many, against `transformers.generate`.

    python benchmarks/engine.py --preset minillm --clients 1 16
    python benchmarks/engine.py --clients 1 16 --baseline

Random weights, random prompts, no end token, greedy, float32. Each client sends one request after the other. The
baseline serves as many clients one after another, as a plain loop around `generate` does, and is the same model by
shape. Rounds of both alternate, and the fastest of each counts. Prints one JSON line per number of clients.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np

from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import ModelConfig, parse_cli
from minillm_jax.flops import count_params
from minillm_jax.lm import LanguageModel
from minillm_jax.model import init_params
from minillm_jax.tokenizer import MissingTokenizer
from serve.client import generate
from serve.engine import Engine, EngineConfig
from serve.protocol import Request, Tokens


@dataclass(frozen=True)
class EngineBenchmark:
    """What is served."""

    model: ModelConfig
    preset: str = "minillm"
    """Shape of the model: minillm, minimind3, minimind3_moe or tiny."""
    clients: tuple[int, ...] = (1, 16)
    """Clients at once."""
    prompt_len: int = 32
    """Tokens of a prompt."""
    max_new_tokens: int = 64
    """Tokens of a completion."""
    rounds: int = 3
    """Measurements, of which the fastest counts."""
    weights: Literal["stored", "int8"] = "stored"
    """Weights of the engine."""
    baseline: bool = False
    """Measure `transformers.generate` as well."""


def engine_round(engine: Engine, config: EngineBenchmark, clients: int) -> tuple[float, float]:
    """Return tokens per second, and the mean seconds to the first token."""
    rng = np.random.default_rng()
    firsts: list[float] = []

    def client() -> None:
        prompt = rng.integers(3, config.model.vocab_size, config.prompt_len).tolist()
        began = time.perf_counter()
        first = None
        for event in generate(engine, Request(prompt, config.max_new_tokens, temperature=0.0)):
            if isinstance(event, Tokens) and first is None:
                first = time.perf_counter() - began
        firsts.append(first or 0.0)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return clients * config.max_new_tokens / (time.perf_counter() - began), sum(firsts) / clients


def transformers_round(config: EngineBenchmark) -> Callable[[int], float]:
    """Make a function that returns tokens per second of a batch, with the library's own defaults."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    c = config.model
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.mlp_size,
            num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads, tie_word_embeddings=c.tie_word_embeddings,
            max_position_embeddings=c.max_position_embeddings,
        )
    ).eval()  # fmt: skip

    def measure(rows: int) -> float:
        prompts = torch.randint(3, c.vocab_size, (rows, config.prompt_len))
        began = time.perf_counter()
        model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=config.max_new_tokens, do_sample=False,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        return rows * config.max_new_tokens / (time.perf_counter() - began)

    return measure


def main() -> int:
    """Measure; returns the exit status."""
    with user_errors():
        config = parse_cli(EngineBenchmark, str(__doc__))
        setup_jax()
        params = jax.jit(init_params, static_argnums=0)(config.model, jax.random.key(0))
        lm = LanguageModel(config.model, params, MissingTokenizer.for_model(config.model.vocab_size))
        began = time.perf_counter()
        engine = Engine(lm, EngineConfig(weights=config.weights))
        engine.start(wait=True)
        start_seconds = time.perf_counter() - began
        baseline = transformers_round(config) if config.baseline else None
        for clients in config.clients:
            ours: list[tuple[float, float]] = []
            alone, batched = [0.0], [0.0]
            for _ in range(config.rounds):
                ours.append(engine_round(engine, config, clients))
                if baseline is not None:
                    alone.append(baseline(1))
                    batched.append(baseline(clients))
            rate, first = max(ours)
            line = {
                "benchmark": "engine", "device": jax.devices()[0].device_kind, "cores": os.cpu_count(),
                "jax": jax.__version__, "parameters": count_params(config.model), "weights": config.weights,
                "clients": clients, "prompt_len": config.prompt_len, "max_new_tokens": config.max_new_tokens,
                "tokens_per_second": round(rate, 1), "seconds_to_first_token": round(first, 3),
                "start_seconds": round(start_seconds, 1), "compilations": engine.stats().compilations,
            }  # fmt: skip
            if baseline is not None:
                line |= {
                    "transformers_tokens_per_second": round(max(alone), 1), "ratio": round(rate / max(alone), 2),
                    "transformers_batched": round(max(batched), 1), "ratio_batched": round(rate / max(batched), 2),
                }  # fmt: skip
            print(json.dumps(line), flush=True)
        engine.drain(5)
    return 0


if __name__ == "__main__":
    sys.exit(main())
