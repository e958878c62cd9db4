"""`python -m serve` as a process: it starts or says in one line why not, drains on SIGTERM, and ends at a second one.

The engine is the scripted one, put in the place of the real engine; everything else is what users run.
"""

import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import fake_engine
import httpx
import pytest

from minillm_jax.config import ModelConfig
from minillm_jax.hf import export_hf
from minillm_jax.lm import LanguageModel
from minillm_jax.model import init_params

TESTS = Path(__file__).parent
PROGRAM = """
import sys, fake_engine
fake_engine.take_the_place(sys.modules)
from serve.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    import jax
    from example_tokenizers import TOKENIZER

    config = ModelConfig(
        vocab_size=TOKENIZER.vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    export_hf(LanguageModel(config, init_params(config, jax.random.key(0)), TOKENIZER), folder)
    return folder


class Process:
    """A server of its own; `url` is known once it listens."""

    def __init__(self, *flags, **env):
        path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *map(str, flags)],
            env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=TESTS.parent,
        )

    def __enter__(self):
        for line in self.process.stderr:
            if found := re.search(r"served at (http://\S+)", line):
                self.url = found[1]
                break
        while True:
            try:
                assert httpx.get(f"{self.url}/ready").status_code == 200
                return self
            except httpx.TransportError:
                time.sleep(0.02)

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def signal(self, number):
        self.process.send_signal(number)

    def ends(self, seconds=20):
        return self.process.wait(seconds)


@contextmanager
def stream(url, tokens):
    """An open stream of many tokens, of which the first has come."""
    body = {"prompt": "x", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as response:
        lines = response.iter_lines()
        assert response.status_code == 200 and next(lines).startswith("data: ")
        yield lines


@pytest.mark.slow  # the process imports JAX
def test_a_drained_server_finishes_what_runs_refuses_what_comes_and_exits_with_0(model):
    with Process("--model_path", model, "--port", 0) as server:
        names = [entry["id"] for entry in httpx.get(f"{server.url}/v1/models").json()["data"]]
        assert names == ["tiny"]
        with stream(server.url, 100) as lines:
            server.signal(signal.SIGTERM)
            time.sleep(0.2)
            work = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"})
            refusals = [work, httpx.get(f"{server.url}/ready")]
            assert [response.status_code for response in refusals] == [503, 503]
            assert all(response.headers["retry-after"] for response in refusals)
            assert httpx.get(f"{server.url}/health").status_code == 200
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert server.ends() == 0


@pytest.mark.slow  # the process imports JAX
def test_a_request_that_outlasts_the_drain_is_told_so(model):
    with Process("--model_path", model, "--port", 0, "--drain_timeout", 0.3) as server:
        with stream(server.url, 400) as lines:
            server.signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert json.loads(rest[-1][6:])["error"]["code"] == "unavailable"
        assert server.ends() == 0


@pytest.mark.slow  # the process imports JAX
def test_a_second_signal_ends_at_once(model):
    with Process("--model_path", model, "--port", 0) as server, stream(server.url, 400) as lines:
        server.signal(signal.SIGTERM)
        time.sleep(0.2)
        begun = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.ends() == 128 + signal.SIGTERM and time.monotonic() - begun < 2
        with pytest.raises(httpx.TransportError):
            list(lines)


@pytest.mark.slow  # the process imports JAX
def test_keys_of_the_environment_lock_the_process(model):
    with Process("--model_path", model, "--port", 0, MINILLM_API_KEYS="k1,k2") as server:
        url = f"{server.url}/v1/models"
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, headers={"Authorization": "Bearer k2"}).status_code == 200


def test_what_is_wrong_at_the_start_is_one_line(tmp_path, monkeypatch, capsys):
    for name in ("serve.engine", "serve.__main__"):
        monkeypatch.setitem(sys.modules, name, None)  # is put back at the end
    fake_engine.take_the_place(sys.modules)
    del sys.modules["serve.__main__"]
    command = importlib.import_module("serve.__main__")
    monkeypatch.setattr(command, "set_up_logs", lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for says, flags in (
            (f"--port {port}: cannot listen there: address already in use", ["--port", port]),
            ("nowhere", ["--port", 0]),
            ("--api_key_file", ["--port", 0, "--api_key_file", tmp_path / "keys"]),
            ("--adapters pirate", ["--port", 0, "--adapters", "pirate"]),
            ("--port 99999", ["--port", 99999]),
        ):
            with pytest.raises(SystemExit) as ended:
                command.main(["--model_path", str(tmp_path / "nowhere"), *map(str, flags)])
            errors = capsys.readouterr().err
            assert ended.value.code == 2 and says in errors and errors.startswith("error: "), errors
            assert len(errors.strip().splitlines()) == 1
