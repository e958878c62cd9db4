"""Does the server stay itself? Many clients for minutes, a third of whom vanish in mid-stream, and then a reckoning.

    python -m benchmarks.soak                         # the default model, 64 clients, five minutes
    python -m benchmarks.soak --preset tiny --clients 16 --seconds 30

In the end every other answer must have been complete, all slots be free, the queue be empty, nothing have been
compiled, and the memory of the server be flat after a warm-up. Prints one JSON line; the exit status is 1, with the
reasons on stderr, if anything of this does not hold.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import emit, machine
from benchmarks.load import LoadError, Server, complete, export_random_model, open_stream, serving
from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import ConfigError, ModelConfig, parse_cli
from minillm_jax.flops import count_params

MIB = 2**20
IDLE_SECONDS = 10
"""How long the server may take to be idle after its last client: a chunk, and noticing who has gone."""


@dataclass(frozen=True)
class SoakConfig:
    """How the server is used."""

    model: ModelConfig
    preset: str = "minillm"
    """Shape of the model: minillm, minimind3, minimind3_moe or tiny."""
    clients: int = 64
    """Clients at once; every third of them vanishes from each of its streams."""
    seconds: float = 300.0
    """How long clients send requests."""
    slots: int = 16
    """Completions that the server decodes at once."""
    context: int = 512
    """Most tokens of a prompt and its completion."""
    warmup: float = 0.4
    """Share of the time after which memory has to be flat: by then every buffer has had its largest size."""
    max_growth: float = 16.0
    """Growth of the server's memory, in MiB, that passes for flat."""

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ConfigError: naming the flag.
        """
        if self.clients < 3 or self.seconds <= 0 or not 0 < self.warmup < 1:
            raise ConfigError("--clients must be at least 3, --seconds positive, and --warmup lie between 0 and 1")
        if self.context < 32:
            raise ConfigError(f"--context {self.context}: must be at least 32")


@dataclass(frozen=True)
class Report:
    """What happened.

    Attributes:
        complete, vanished: streams that were read to their end, and those that were left.
        problems: what was wrong with answers, most frequent first.
        noticed: streams that the server knows to have been left; the others had been written to their end.
        slots_used, queued, cache_tokens_used: of the server, when all clients had gone.
        compilations: since the server was ready.
        resident_mib: memory of the server in the end.
        growth_mib: between the means of the first and the last tenth of the time after the warm-up.
        slope_mib_per_minute: of a line through all samples of that time.
        measured_seconds: that time.
    """

    complete: int
    vanished: int
    problems: dict[str, int]
    noticed: int
    slots_used: int
    queued: int
    cache_tokens_used: int
    compilations: int
    resident_mib: float
    growth_mib: float
    slope_mib_per_minute: float
    measured_seconds: float

    def failures(self, max_growth: float) -> list[str]:
        """Say what does not hold, in one sentence each.

        Args:
            max_growth: MiB by which memory may grow, as measured and as the slope has it.
        """
        found = [f"{count} answers were not complete: {problem}" for problem, count in self.problems.items()]
        if not (self.complete and self.vanished and self.noticed):
            found.append(f"nothing was tested: {self.complete} answers, {self.vanished} left, {self.noticed} noticed")
        for name in ("slots_used", "queued", "cache_tokens_used", "compilations"):
            if (value := getattr(self, name)) != 0:
                found.append(f"{name} is {value} in the end instead of 0")
        growth = max(self.growth_mib, self.slope_mib_per_minute * self.measured_seconds / 60)
        if growth > max_growth:
            found.append(f"memory grew by {growth:.1f} MiB, more than {max_growth:.1f}, after the warm-up")
        return found


class Clients:
    """What all clients do until a deadline, and what they have seen."""

    def __init__(self, port: int, config: SoakConfig) -> None:
        self.complete = self.vanished = 0
        self.problems: Counter[str] = Counter()
        self._port, self._config = port, config

    async def run(self, number: int, until: float) -> None:
        """Be a client: one request after the other."""
        rng = random.Random(number)
        half = self._config.context // 2
        while time.monotonic() < until:
            prompt = [rng.randrange(3, self._config.model.vocab_size) for _ in range(rng.randint(1, half))]
            try:
                if number % 3 == 0:
                    await self._vanish(prompt, half, rng)
                    self.vanished += 1
                else:
                    await complete(self._port, prompt, rng.randint(1, half // 2))
                    self.complete += 1
            except (LoadError, OSError) as error:
                self.problems[str(error)] += 1
                await asyncio.sleep(0.1)  # a server that is gone is not asked a thousand times a second

    async def _vanish(self, prompt: Sequence[int], max_tokens: int, rng: random.Random) -> None:
        """Leave after a few events, or in the queue before the first one."""
        async with open_stream(self._port, prompt, max_tokens) as events:
            if rng.random() < 0.25:
                await asyncio.sleep(rng.random() / 10)
                return
            for _ in range(rng.randint(1, 4)):
                await anext(events)


async def sample_memory(server: Server, until: float) -> list[tuple[float, float]]:
    """Return pairs of a time in seconds and the server's memory in MiB, four a second."""
    samples = []
    while (now := time.monotonic()) < until:
        samples.append((now, server.resident_bytes() / MIB))
        await asyncio.sleep(0.25)
    return samples


async def use(server: Server, config: SoakConfig) -> tuple[Clients, list[tuple[float, float]]]:
    """Run all clients at once; returns what they saw, and memory over time."""
    clients, until = Clients(server.port, config), time.monotonic() + config.seconds
    memory = asyncio.create_task(sample_memory(server, until))
    await asyncio.gather(*(clients.run(number, until) for number in range(config.clients)))
    return clients, await memory


def metrics_when_idle(server: Server) -> dict[str, float]:
    """Return the server's metrics as soon as nothing runs or waits any more, or after a while as they are then."""
    until = time.monotonic() + IDLE_SECONDS
    while True:
        metrics = server.metrics()
        busy = metrics["minillm_engine_slots_used"] or metrics["minillm_engine_queued"]
        if not busy or time.monotonic() > until:
            return metrics
        time.sleep(0.1)


def growth_of(memory: Sequence[tuple[float, float]], warmup: float) -> tuple[float, float, float]:
    """Return growth in MiB, slope in MiB a minute, and the seconds that both are about.

    Args:
        memory: pairs of seconds and MiB.
        warmup: share of the time that does not count.
    """
    seconds, mib = np.asarray(memory).T
    late = seconds >= seconds[0] + warmup * (seconds[-1] - seconds[0])
    seconds, mib = seconds[late], mib[late]
    tenth = max(len(mib) // 10, 1)
    slope = np.polyfit(seconds - seconds[0], mib, 1)[0] if len(mib) > 1 else 0.0
    return float(mib[-tenth:].mean() - mib[:tenth].mean()), float(slope * 60), float(seconds[-1] - seconds[0])


def soak(config: SoakConfig, folder: Path) -> Report:
    """Serve a random model, use it, and report.

    Args:
        config: how.
        folder: empty; takes the model and the server's log.
    """
    export_random_model(config.model, folder / "model")
    flags = [f"--model_path={folder / 'model'}", "--port=0", f"--slots={config.slots}", f"--context={config.context}"]
    with serving("serve", *flags, log=folder / "serve.log") as server:
        clients, memory = asyncio.run(use(server, config))
        metrics = metrics_when_idle(server)
        growth, slope, measured = growth_of(memory, config.warmup)
        return Report(
            complete=clients.complete,
            vanished=clients.vanished,
            problems=dict(clients.problems.most_common(5)),
            noticed=int(server.metrics(status="499")["minillm_http_requests_total"]),
            slots_used=int(metrics["minillm_engine_slots_used"]),
            queued=int(metrics["minillm_engine_queued"]),
            cache_tokens_used=int(metrics["minillm_engine_cache_tokens_used"]),
            compilations=int(metrics["minillm_engine_compilations_total"]),
            resident_mib=round(server.resident_bytes() / MIB, 1),
            growth_mib=round(growth, 2),
            slope_mib_per_minute=round(slope, 3),
            measured_seconds=round(measured, 1),
        )


def main() -> int:
    """Soak and print; returns the exit status."""
    with user_errors(), tempfile.TemporaryDirectory() as temporary:
        config = parse_cli(SoakConfig, str(__doc__))
        config.check()
        setup_jax()
        report = soak(config, Path(temporary))
        failures = report.failures(config.max_growth)
        line = {
            "name": "soak", **machine(), "preset": config.preset, "parameters": count_params(config.model),
            "clients": config.clients, "seconds": config.seconds, "slots": config.slots, "context": config.context,
            **asdict(report), "failures": failures,
        }  # fmt: skip
        emit(line)
        for failure in failures:
            print(failure, file=sys.stderr)
        return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
