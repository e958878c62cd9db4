"""`python -m serve --model_path M`: load a model, start the engine, serve it over HTTP.

Whatever can be wrong at the start (a key file, a port in use, a folder without a model) is told in one line; the
address is bound first, since loading a model takes longest.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import ConfigError, parse_cli
from minillm_jax.lm import load
from minillm_jax.pretrained import load_adapter
from minillm_jax.reward import is_reward_model
from serve.api import create_app
from serve.auth import read_keys
from serve.config import ServeConfig
from serve.engine import Engine, EngineConfig
from serve.server import listen, run, set_up_logs


@dataclass(frozen=True)
class Options(ServeConfig):
    """The server's settings and the engine's."""

    engine: EngineConfig = EngineConfig()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal comes; return the exit status."""
    with user_errors():
        options = parse_cli(Options, "Serve a model over an API like OpenAI's, and a page to talk to it.", argv=argv)
        options.check()
        keys = read_keys(options.api_key_file, os.environ)
        folders = options.adapter_folders()
        listener = listen(options.host, options.port)
        set_up_logs()
        setup_jax()
        lm = load(options.model_path, mesh=options.mesh)
        if is_reward_model(lm.params):
            raise ConfigError(f"--model_path {options.model_path}: is a reward model; it scores texts and writes none")
        adapters = {name: load_adapter(folder, lm.config) for name, folder in folders.items()}
        engine = Engine(lm, options.engine, adapters)
        engine.start()
        return run(create_app(engine, lm.tokenizer, options, keys), options, listener)


if __name__ == "__main__":
    sys.exit(main())
