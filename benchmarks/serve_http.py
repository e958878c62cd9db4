"""What HTTP costs: tokens a second of many streams through the API, as a share of what the engine draws by itself.

    python benchmarks/serve_http.py --model_path out/sft --clients 16

Engine and API share a process and the machine's cores, as in `python -m serve`; the clients are a process of their own.
Rounds alternate between the two ways and the best of each counts, so that a busy machine spoils the ratio less. The
last line printed is one JSON object.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import threading
import time
from dataclasses import dataclass

import uvicorn

from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import parse_cli
from minillm_jax.lm import load
from serve.api import create_app
from serve.config import ServeConfig
from serve.engine import Engine, EngineConfig
from serve.protocol import Event, Finished, Request


@dataclass(frozen=True)
class HttpBenchmark:
    """What is measured."""

    model_path: str
    """The model."""
    clients: int = 16
    """Streams at once."""
    tokens: int = 768
    """Tokens of each; enough that the streams' uneven beginnings do not count."""
    rounds: int = 3
    """Rounds of each way."""


def draw_directly(engine: Engine, clients: int, tokens: int) -> float:
    """Return the tokens a second of requests that no HTTP comes between."""
    ended = threading.Semaphore(0)

    def sink(event: Event) -> None:
        if isinstance(event, Finished):
            ended.release()

    begun = time.monotonic()
    for seed in range(clients):
        engine.submit(Request((1, seed % 50 + 40), tokens, ignore_eos=True, seed=seed), sink)
    for _ in range(clients):
        ended.acquire()
    return clients * tokens / (time.monotonic() - begun)


def read_streams(port: int, clients: int, tokens: int, results: multiprocessing.Queue[float]) -> None:
    """Open all streams, read them to their ends, and report tokens a second; runs in a process of its own."""
    begun = time.monotonic()
    threads = [threading.Thread(target=read_stream, args=(port, tokens, seed)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.put(clients * tokens / (time.monotonic() - begun))


def read_stream(port: int, tokens: int, seed: int) -> None:
    """Read one stream from a bare socket, so that the client costs little."""
    request = {"prompt": [1, seed % 50 + 40], "max_tokens": tokens, "ignore_eos": True, "seed": seed, "stream": True}
    body = json.dumps(request).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        tail = b""
        while not tail.endswith(b"0\r\n\r\n"):
            tail = (tail + connection.recv(65536))[-64:]


def through_http(port: int, clients: int, tokens: int) -> float:
    """Return the tokens a second of streams."""
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[float] = context.Queue()
    process = context.Process(target=read_streams, args=(port, clients, tokens, results))
    process.start()
    rate = results.get()
    process.join()
    return rate


def main() -> None:
    """Measure and print."""
    with user_errors():
        config = parse_cli(HttpBenchmark, "Measure what HTTP costs.")
        setup_jax()
        lm = load(config.model_path)
        engine = Engine(lm, EngineConfig(slots=config.clients), {})
        engine.start(wait=True)
        listener = socket.create_server(("127.0.0.1", 0))
        app = create_app(engine, lm.tokenizer, ServeConfig(config.model_path))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, lifespan="off"))
        threading.Thread(target=server.run, args=([listener],), daemon=True).start()
        direct, http = [], []
        for _ in range(config.rounds):
            direct.append(draw_directly(engine, config.clients, config.tokens))
            http.append(through_http(listener.getsockname()[1], config.clients, config.tokens))
        result = {
            "clients": config.clients,
            "tokens": config.tokens,
            "cores": os.cpu_count(),
            "engine_tokens_per_second": round(max(direct)),
            "http_tokens_per_second": round(max(http)),
            "share": round(max(http) / max(direct), 3),
        }
        print(json.dumps(result))
        server.should_exit = True


if __name__ == "__main__":
    main()
