"""What every endpoint needs, made once: the engine, the tokenizer, the settings, and what is derived from them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

from fastapi import Request as HttpRequest

from minillm_jax.tokenizer import Tokenizer
from serve.auth import ApiKeys
from serve.config import Limits, ServeConfig
from serve.errors import ApiError
from serve.grammar import Grammars
from serve.metrics import Metrics
from serve.protocol import EngineLike
from serve.text import TokenText


@dataclass
class Service:
    """One model being served.

    Attributes:
        draining: set when the server is going to stop; no more work is taken then.
        embedders: threads that wait for embeddings, apart from those on which requests are planned.
    """

    engine: EngineLike
    tokenizer: Tokenizer
    config: ServeConfig
    keys: ApiKeys
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    draining: bool = False
    embedders: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "embed"))

    @property
    def limits(self) -> Limits:
        """How much a request may ask for."""
        return self.config.limits

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.engine.ready and not self.draining

    @cached_property
    def grammars(self) -> Grammars:
        """Compiler of grammars for this tokenizer; made when first needed."""
        return Grammars(self.tokenizer, self.engine.vocab_size)

    @cached_property
    def token_text(self) -> TokenText:
        """Spells tokens."""
        return TokenText(self.tokenizer)

    def resolve(self, model: str | None) -> tuple[str, str | None]:
        """Find the model that a request names; None is the base.

        Returns:
            Its name, and the adapter to use.

        Raises:
            ApiError: 404, there is no such model.
        """
        if model is None or model == self.config.model_name:
            return self.config.model_name, None
        if model in self.engine.adapters:
            return model, model
        raise unknown_model(model)


def unknown_model(model: str) -> ApiError:
    """Make the error of a name that no model has."""
    message = f"There is no model {model[:100]!r}; GET /v1/models lists those that are served"
    return ApiError(404, message, param="model", code="model_not_found")


def service_of(request: HttpRequest) -> Service:
    """Return the service that a request came to."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service
