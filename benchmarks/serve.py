"""How fast is the server? Tokens per second and time to the first token, for few clients and for many.

    python -m benchmarks.serve                        # the default model; needs the extra bench for the baseline
    python -m benchmarks.serve --preset tiny --clients 1 4 --no_baseline

Three ways to draw the same completions of random prompts, greedily and to a fixed length, from the same random model:
our server over HTTP, our engine without HTTP, and `transformers.generate` behind the same API, one request at a time.
Servers are processes of their own. Rounds alternate between the three, so that noise hits all of them, and ratios are
medians over rounds. Prints one JSON line per number of clients and way.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import emit, machine
from benchmarks.load import complete, export_random_model, serving
from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import ConfigError, ModelConfig, parse_cli
from minillm_jax.flops import count_params
from minillm_jax.lm import LanguageModel
from serve.client import generate
from serve.engine import Engine, EngineConfig
from serve.protocol import Request, Tokens

OURS, ENGINE, BASELINE = "serve", "engine", "transformers"
"""The three ways: our server, our engine without HTTP, `transformers` behind HTTP."""


@dataclass(frozen=True)
class ServeBenchmark:
    """What is served, and to how many."""

    model: ModelConfig
    preset: str = "minillm"
    """Shape of the model: minillm, minimind3, minimind3_moe or tiny."""
    clients: tuple[int, ...] = (1, 4, 16, 64)
    """Clients at once; each sends its next request when it has its answer."""
    min_requests: int = 8
    """Requests of a round, if there are fewer clients than that; otherwise each client sends one."""
    prompt_tokens: tuple[int, int] = (64, 192)
    """Shortest and longest prompt."""
    max_tokens: int = 64
    """Tokens of a completion."""
    rounds: int = 3
    """Rounds of each way."""
    baseline: bool = True
    """Measure `transformers` as well."""
    append: str | None = None
    """File that the lines are appended to as well."""
    engine: EngineConfig = EngineConfig()

    def prompts(self, clients: int, round_number: int) -> list[list[int]]:
        """Return the prompts of a round: the same for all ways, and new in each, so that no cache knows them."""
        rng = np.random.default_rng((clients, round_number))
        shortest, longest = self.prompt_tokens
        lengths = rng.integers(shortest, longest + 1, max(clients, self.min_requests))
        return [rng.integers(3, self.model.vocab_size, length).tolist() for length in lengths]


@dataclass(frozen=True)
class Round:
    """One measurement.

    Attributes:
        tokens_per_second: of all clients together.
        firsts: seconds to the first token, of each request.
        gaps: seconds between two events of a stream, of all requests.
    """

    tokens_per_second: float
    firsts: list[float]
    gaps: list[float]


Measure = Callable[[Sequence[Sequence[int]], int], Round]
"""Completes prompts for a number of clients."""


def round_of(arrivals: Sequence[Sequence[float]], seconds: float, max_tokens: int) -> Round:
    """Summarize a round.

    Args:
        arrivals: of each request, the seconds after which its events with tokens came.
        seconds: that the whole round took.
        max_tokens: tokens of each completion.
    """
    gaps = [gap for times in arrivals for gap in np.diff(times).tolist()]
    return Round(len(arrivals) * max_tokens / seconds, [times[0] for times in arrivals], gaps)


def http_round(port: int, max_tokens: int) -> Measure:
    """Measure a server."""

    async def run(prompts: Sequence[Sequence[int]], clients: int) -> list[list[float]]:
        waiting = iter(prompts)

        async def client() -> list[list[float]]:
            return [(await complete(port, prompt, max_tokens)).arrivals for prompt in waiting]

        answers = await asyncio.gather(*(client() for _ in range(clients)))
        return [arrivals for each in answers for arrivals in each]

    def measure(prompts: Sequence[Sequence[int]], clients: int) -> Round:
        began = time.perf_counter()
        arrivals = asyncio.run(run(prompts, clients))
        return round_of(arrivals, time.perf_counter() - began, max_tokens)

    return measure


def engine_round(engine: Engine, max_tokens: int) -> Measure:
    """Measure an engine in this process."""

    def one(prompt: Sequence[int]) -> list[float]:
        began = time.perf_counter()
        request = Request(prompt, max_tokens, temperature=0.0, ignore_eos=True)
        events = generate(engine, request)
        return [time.perf_counter() - began for event in events if isinstance(event, Tokens)]

    def measure(prompts: Sequence[Sequence[int]], clients: int) -> Round:
        with ThreadPoolExecutor(clients) as threads:
            began = time.perf_counter()
            arrivals = list(threads.map(one, prompts))
            return round_of(arrivals, time.perf_counter() - began, max_tokens)

    return measure


@contextmanager
def all_ways(config: ServeBenchmark, lm: LanguageModel, folder: Path) -> Iterator[dict[str, Measure]]:
    """Start everything that is measured; a model's folder is next to the servers' logs."""
    engine_flags = [f"--{f.name}={value}" for f in fields(EngineConfig) if (value := getattr(config.engine, f.name))]
    with ExitStack() as stack:
        log, model_path = folder / "serve.log", f"--model_path={folder / 'model'}"
        server = stack.enter_context(serving("serve", model_path, "--port=0", *engine_flags, log=log))
        engine = Engine(lm, config.engine)
        engine.start(wait=True)
        stack.callback(engine.drain, 5)
        ways = {OURS: http_round(server.port, config.max_tokens), ENGINE: engine_round(engine, config.max_tokens)}
        if config.baseline:
            log = folder / "transformers.log"
            theirs = stack.enter_context(serving("benchmarks.transformers_server", model_path, log=log))
            ways[BASELINE] = http_round(theirs.port, config.max_tokens)
        for measure in ways.values():
            measure(config.prompts(1, config.rounds)[:2], 1)  # first requests pay for what is set up late
        yield ways


def measure_clients(config: ServeBenchmark, ways: dict[str, Measure], clients: int) -> Iterator[dict[str, Any]]:
    """Measure one number of clients in all ways; yields a line of each."""
    rounds: dict[str, list[Round]] = {way: [] for way in ways}
    for number in range(config.rounds):
        prompts = config.prompts(clients, number)
        for way, measure in ways.items():
            rounds[way].append(measure(prompts, clients))
    rates = {way: [each.tokens_per_second for each in measured] for way, measured in rounds.items()}
    for way, measured in rounds.items():
        firsts = [first for each in measured for first in each.firsts]
        gaps = [gap for each in measured for gap in each.gaps]
        line = {
            "way": way, "clients": clients, "requests": len(firsts) // config.rounds,
            "tokens_per_second": round(statistics.median(rates[way]), 1), **percentiles("first_token_seconds", firsts),
            **percentiles("gap_seconds", gaps),
        }  # fmt: skip
        if way == OURS:
            line["share_of_engine"] = ratio(rates[OURS], rates[ENGINE])
            if config.baseline:
                line["ratio_to_transformers"] = ratio(rates[OURS], rates[BASELINE])
        yield line


def percentiles(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return median and 99th percentile of seconds, and how many times the median the latter is."""
    if not values:  # completions of a single chunk have no gaps
        return {}
    median, high = np.percentile(values, (50, 99)).tolist()
    return {f"{name}_p50": round(median, 4), f"{name}_p99": round(high, 4), f"{name}_ratio": round(high / median, 2)}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median, over rounds, of one rate over another of the same round."""
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def setting(config: ServeBenchmark) -> dict[str, Any]:
    """Return what a line must say for its numbers to mean anything."""
    packages = ("transformers", "torch") if config.baseline else ()
    return {
        "name": "serve", **machine(), **{package: version(package) for package in packages}, "preset": config.preset,
        "parameters": count_params(config.model), "weights": config.engine.weights, "slots": config.engine.slots,
        "chunk": config.engine.chunk, "prompt_tokens": config.prompt_tokens, "max_tokens": config.max_tokens,
        "rounds": config.rounds,
    }  # fmt: skip


def main() -> int:
    """Measure and print; returns the exit status."""
    with user_errors(), tempfile.TemporaryDirectory() as temporary:
        config = parse_cli(ServeBenchmark, str(__doc__))
        if min(config.clients) < 1 or min(config.rounds, config.min_requests) < 1:
            raise ConfigError("--clients, --rounds and --min_requests: must be at least 1")
        setup_jax()
        lm = export_random_model(config.model, Path(temporary) / "model")
        with all_ways(config, lm, Path(temporary)) as ways:
            for clients in config.clients:
                for line in measure_clients(config, ways, clients):
                    emit(setting(config) | line, config.append)
    return 0


if __name__ == "__main__":
    sys.exit(main())
