"""Settings of the server: where it listens, who may call it, and how much one request may ask for.

`ServeConfig` is what `python -m serve` parses; the API reads its limits and its manners from the same object.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minillm_jax.config import ConfigError


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for; more is refused before any work is done."""

    max_body_bytes: int = 8 * 2**20
    """Largest request body."""
    body_timeout: float = 30.0
    """Seconds in which a request's body must have arrived."""
    request_timeout: float = 600.0
    """Seconds after which a request is given up, its wait in the queue included."""
    max_prompt_tokens: int = 0
    """Longest prompt in tokens; 0 leaves it to the model's context."""
    default_max_tokens: int = 1024
    """Longest completion of a request that names no max_tokens; what is left of the context may be less."""
    max_messages: int = 2048
    """Most messages of a conversation."""
    max_batch: int = 256
    """Most prompts of one request to /v1/completions, and most inputs of one to /v1/embeddings."""
    max_choices: int = 128
    """Most completions of one request: its prompts times n."""
    max_stop: int = 16
    """Most stop strings."""
    max_logit_bias: int = 1000
    """Most entries of logit_bias."""
    max_tools: int = 128
    """Most tools that a request may offer."""
    max_grammar_bytes: int = 64 * 1024
    """Longest JSON schema, regular expression or set of tools that a completion can be made to follow."""


@dataclass(frozen=True)
class ServeConfig:
    """What is served, where and to whom."""

    model_path: str
    """Run folder, one of its checkpoints, or a Hugging Face folder."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 takes requests from other machines, which then should need a key."""
    port: int = 6006
    """Port to listen on; 0 takes a free one."""
    served_model_name: str | None = None
    """Name that requests give the model; None takes the folder's."""
    mesh: str | None = None
    """Device mesh that the model is spread over, such as tensor=4; -1 fills an axis. None is the first device."""
    adapters: tuple[str, ...] = ()
    """Adapters to serve beside the model, each as NAME=RUN; requests name them as their model."""
    api_key_file: str | None = None
    """File with one API key a line; keys of the environment's MINILLM_API_KEYS (commas between) count too."""
    cors_origins: tuple[str, ...] = ()
    """Web origins whose pages may call the API, such as https://example.org; none by default."""
    truncation: Literal["error", "turns"] = "error"
    """What becomes of a conversation that is too long, unless the request says: refused, or oldest turns dropped."""
    drain_timeout: float = 30.0
    """Seconds that running requests have to end after SIGTERM."""
    log_prompts: bool = False
    """Write prompts into the access log."""
    limits: Limits = Limits()

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ConfigError: naming the flag.
        """
        for name, value in vars(self.limits).items():
            if value < (0 if name == "max_prompt_tokens" else 1) and not (name.endswith("timeout") and value > 0):
                raise ConfigError(f"--{name} {value}: must be positive")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port}: must lie between 0 and 65535")
        if self.drain_timeout < 0:
            raise ConfigError(f"--drain_timeout {self.drain_timeout}: must not be negative")
        for origin in self.cors_origins:
            if origin != "*" and not origin.startswith(("http://", "https://")):
                raise ConfigError(f"--cors_origins {origin}: must begin with http:// or https://")

    def adapter_folders(self) -> dict[str, str]:
        """Return the adapters' runs by name.

        Raises:
            ConfigError: an entry is not NAME=RUN, or a name is taken.
        """
        folders: dict[str, str] = {}
        for entry in self.adapters:
            name, separator, folder = entry.partition("=")
            if not (name and separator and folder):
                raise ConfigError(f"--adapters {entry}: must be NAME=RUN, such as pirate=runs/pirate")
            if name in folders or name == self.model_name:
                raise ConfigError(f"--adapters {entry}: another model is called {name}")
            folders[name] = folder
        return folders

    @property
    def model_name(self) -> str:
        """Name of the base model in requests and answers."""
        return self.served_model_name or Path(self.model_path).resolve().name
