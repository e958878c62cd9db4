"""What the server's benchmarks share: a model of random weights, servers in processes of their own, and clients.

Clients are coroutines over bare sockets, so that many of them cost the machine little. The scripts are run as modules
from the repository's root (`python -m benchmarks.serve`): run by its path, a script would find its neighbours
`serve.py` and `train.py` in place of the packages of these names.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from minillm_jax.config import ModelConfig
from minillm_jax.errors import UserError
from minillm_jax.hf import export_hf
from minillm_jax.lm import LanguageModel
from minillm_jax.model import init_params
from minillm_jax.tokenizer import train_tokenizer

ROOT = Path(__file__).parent.parent
START_SECONDS = 600
"""How long a server may take to become ready."""


class LoadError(UserError):
    """A server that did not start, or an answer that is not what was asked for."""


# --- Model ---------------------------------------------------------------------------------------------------------


def export_random_model(config: ModelConfig, folder: Path) -> LanguageModel:
    """Write a model of random weights that both we and `transformers` load, and return it.

    Its tokenizer spells nearly every token in ASCII letters, so that nearly every token can be sent as soon as it is
    drawn.
    """
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ("".join(rng.choice(letters, rng.integers(2, 8))) for _ in range(4 * config.vocab_size))
    tokenizer = train_tokenizer([" ".join(words)], config.vocab_size)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    lm = LanguageModel(config, params, tokenizer)
    export_hf(lm, folder)
    return lm


# --- Server --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """A server that takes requests.

    Attributes:
        port: on 127.0.0.1.
        pid: of its process.
        start_seconds: from the start of the process until it said that it is ready.
    """

    port: int
    pid: int
    start_seconds: float

    def get(self, path: str) -> str:
        """Return what the server answers to GET.

        Raises:
            OSError: it does not answer, or not with 200.
        """
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as response:
            return str(response.read().decode())

    def metrics(self, **labels: str) -> defaultdict[str, float]:
        """Return the server's metrics by name, summed up over labels that are not given; 0 for unknown ones."""
        values: defaultdict[str, float] = defaultdict(float)
        for family in text_string_to_metric_families(self.get("/metrics")):
            for sample in family.samples:
                if labels.items() <= sample.labels.items():
                    values[sample.name] += sample.value
        return values

    def resident_bytes(self) -> int:
        """Return the memory that the process has in RAM (Linux)."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def serving(module: str, *flags: str, log: Path, **env: str) -> Iterator[Server]:
    """Run `python -m module flags`, give it when it is ready, and kill it in the end.

    Args:
        module: a server that logs its address, such as `serve` with `--port 0`, and answers /ready.
        flags: its command line.
        log: file for what it writes to stderr.
        env: added to the environment.

    Raises:
        LoadError: it ended, or was not ready in time.
    """
    began = time.perf_counter()
    words = [sys.executable, "-m", module, *flags]
    with log.open("wb") as errors:
        process = subprocess.Popen(words, cwd=ROOT, env=os.environ | env, stdout=errors, stderr=errors)
    try:
        port = None
        while True:
            if process.poll() is not None or time.perf_counter() - began > START_SECONDS:
                raise LoadError(f"{' '.join(words[1:])} did not become ready; its last words: {_tail(log)}")
            port = port or _address(log)
            if port is not None and _is_ready(port):
                break
            time.sleep(0.02)
        yield Server(port, process.pid, time.perf_counter() - began)
    finally:
        process.kill()
        process.wait()


def _address(log: Path) -> int | None:
    found = re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text(errors="replace"))
    return int(found[1]) if found else None


def _is_ready(port: int) -> bool:
    try:
        Server(port, 0, 0.0).get("/ready")
    except OSError:  # nobody listens yet, or 503
        return False
    return True


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-5:])


# --- Clients -------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """One completion as its client saw it.

    Attributes:
        arrivals: seconds from the request to each event that brought new tokens.
        usage: the server's count of tokens.
        finish_reason, done: how it ended, and whether `[DONE]` came last.
        error: what the server said went wrong.
    """

    arrivals: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None
    done: bool = False
    error: str | None = None

    def problem(self, prompt_tokens: int, completion_tokens: int) -> str | None:
        """Say what is missing or wrong in the answer to a request with `ignore_eos`; None if nothing is."""
        if self.error is not None:
            return f"the server reported an error: {self.error}"
        if self.finish_reason != "length":
            return f"finish_reason is {self.finish_reason} instead of length"
        if not self.done:
            return "[DONE] did not come last"
        expected = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
        counted = {name: self.usage.get(name) for name in expected}
        return None if counted == expected else f"usage is {counted} instead of {expected}"

    def take(self, data: bytes, seconds: float) -> None:
        """Take the data of one event."""
        self.done = data == b"[DONE]"
        if self.done:
            return
        event = json.loads(data)
        if "error" in event:
            self.error = str(event["error"])
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices", ()):
            self.finish_reason = choice["finish_reason"]
            if self.finish_reason is None:
                self.arrivals.append(seconds)


async def complete(port: int, prompt: Sequence[int], max_tokens: int) -> Answer:
    """Ask for a greedy completion of fixed length, as a stream, and read it to its end.

    Raises:
        LoadError: the answer is not a complete one.
    """
    answer, began = Answer(), time.perf_counter()
    async with open_stream(port, prompt, max_tokens) as events:
        async for data in events:
            answer.take(data, time.perf_counter() - began)
    if (problem := answer.problem(len(prompt), max_tokens)) is not None:
        raise LoadError(f"the answer to {len(prompt)} tokens: {problem}")
    return answer


@asynccontextmanager
async def open_stream(port: int, prompt: Sequence[int], max_tokens: int) -> AsyncIterator[AsyncIterator[bytes]]:
    """Send a request to /v1/completions and give the data of its events; leaving drops the connection at once."""
    body = {"prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    payload = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
        await writer.drain()
        yield _events(reader)
    finally:
        writer.transport.abort()


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yield the data of server-sent events; each is written in one piece, so its line is never split by the framing."""
    status = await reader.readline()
    if b" 200 " not in status:
        raise LoadError(f"{status.decode().strip()}: {(await reader.read()).decode(errors='replace')[-300:]}")
    async for line in reader:
        if line.startswith(b"data: "):
            yield line[6:].strip()
