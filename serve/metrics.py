"""Numbers for Prometheus: requests, latencies as clients feel them, and the engine's state at the time of asking.

Each application has a registry of its own, so that several can live in one process. Labels have few values: the path
of an endpoint as it is declared, never one that somebody made up.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.protocol import EngineLike

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_GAUGES = {
    "slots": "Completions that can be decoded at once",
    "slots_used": "Completions that are being decoded",
    "queued": "Requests that wait",
    "queued_tokens": "Tokens of the prompts and longest completions that wait",
    "cache_tokens": "Tokens that the cache can hold",
    "cache_tokens_used": "Tokens that the cache holds for live requests",
}
_COUNTERS = {
    "requests": "Completions taken by the engine",
    "prompt_tokens": "Tokens of prompts read or found in the cache",
    "cached_tokens": "Tokens of prompts found in the cache",
    "generated_tokens": "Tokens drawn",
    "compilations": "Programs compiled since the engine became ready; anything but 0 is a defect",
}


class _EngineCollector(Collector):
    """Asks the engine when Prometheus asks us."""

    def __init__(self, engine: EngineLike) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's numbers of this moment."""
        stats = self._engine.stats()
        for name, help_text in _GAUGES.items():
            yield GaugeMetricFamily(f"minillm_engine_{name}", help_text, value=getattr(stats, name))
        for name, help_text in _COUNTERS.items():
            yield CounterMetricFamily(f"minillm_engine_{name}", help_text, value=getattr(stats, name))


class Metrics:
    """The counters and histograms of one application."""

    def __init__(self, engine: EngineLike) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        self.requests = Counter(
            "minillm_http_requests", "Requests answered", ["endpoint", "status"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "minillm_http_request_seconds",
            "Time from a request's arrival to its last byte",
            ["endpoint"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first_token_seconds = Histogram(
            "minillm_time_to_first_token_seconds",
            "Time from submission to the first tokens, the queue included",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.chunk_seconds = Histogram(
            "minillm_time_between_chunks_seconds",
            "Time between two chunks of one completion's tokens",
            buckets=SECONDS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)
