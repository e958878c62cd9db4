"""The HTTP API: OpenAI's endpoints over an engine, and the page. `create_app` puts the parts together.

Requests pass the gate (keys, readiness, log), are read strictly, checked against `schemas`, planned on a thread, and
answered from the engine's events. Nothing here knows arrays; the engine can be any `protocol.EngineLike`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from minillm_jax.tokenizer import Tokenizer
from serve import endpoints, replies
from serve.auth import ApiKeys
from serve.chat_completions import chat_completions
from serve.completions import completions
from serve.config import ServeConfig
from serve.errors import from_http, from_validation
from serve.gate import Gate
from serve.metrics import Metrics
from serve.protocol import EngineLike
from serve.reading import StrictRoute
from serve.service import Service

WEB = Path(__file__).parent / "web"
REFUSALS = {
    400: "The request cannot be served as it is written",
    401: "A key is missing or unknown",
    404: "There is no such model or address",
    408: "The body did not arrive in time",
    413: "The body is too large",
    429: "The queue is full; Retry-After says when to try again",
    500: "The server failed",
    503: "The server is starting or stopping; Retry-After says when to try again",
    504: "The request took too long",
}


def create_app(engine: EngineLike, tokenizer: Tokenizer, config: ServeConfig, keys: ApiKeys | None = None) -> FastAPI:
    """Make the application.

    Args:
        engine: draws the tokens.
        tokenizer: of the engine's model.
        config: settings; `model_path` gives the model its name.
        keys: API keys that are accepted; none lets everybody in.

    Returns:
        An ASGI application. `app.state.service.draining = True` makes it refuse new work.
    """
    app = FastAPI(title="minillm-jax", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    service = Service(engine, tokenizer, config, keys or ApiKeys(), Metrics(engine))
    app.state.service = service
    app.openapi = partial(_document, app, app.openapi)  # type: ignore[method-assign]
    app.include_router(_router())
    app.mount("/web", StaticFiles(directory=WEB, check_dir=False), name="web")
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_middleware(Gate, service=service)
    if config.cors_origins:  # outermost, so that pages can read refusals too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return app


def _router() -> APIRouter:
    """Return all addresses but the page's files, with what the OpenAPI document says about them."""
    router = APIRouter(route_class=StrictRoute, responses={s: _refusal(text) for s, text in REFUSALS.items()})
    add = router.add_api_route
    chat = _answers(replies.ChatCompletion, event="ChatChunk")
    add("/v1/chat/completions", chat_completions, methods=["POST"], **chat)
    text = _answers(replies.TextCompletion, event="TextCompletion")
    add("/v1/completions", completions, methods=["POST"], **text)
    add("/v1/embeddings", endpoints.embeddings, methods=["POST"], **_answers(replies.Embeddings))
    add("/v1/models", endpoints.list_models, methods=["GET"], **_answers(replies.Models))
    add("/v1/models/{model:path}", endpoints.show_model, methods=["GET"], **_answers(replies.Model))
    add("/tokenize", endpoints.tokenize, methods=["POST"], **_answers(replies.Tokenized))
    add("/detokenize", endpoints.detokenize, methods=["POST"], **_answers(replies.Detokenized))
    add("/health", endpoints.health, methods=["GET"], **_answers(replies.Status))
    add("/ready", endpoints.ready, methods=["GET"], **_answers(replies.Status))
    add("/metrics", endpoints.metrics, methods=["GET"], **_answers(None))
    add("/", _page, methods=["GET"], include_in_schema=False)
    return router


def _answers(model: Any, *, event: str | None = None) -> dict[str, Any]:
    """Describe an endpoint's success: an object of JSON, or text without one; and what its streams consist of."""
    content: dict[str, Any] = {} if model is not None else {"text/plain": {"schema": {"type": "string"}}}
    if event is not None:
        chunk = {"$ref": f"#/components/schemas/{event}"}
        json_text = {"type": "string", "contentMediaType": "application/json", "contentSchema": chunk}
        data = {"anyOf": [{"const": "[DONE]"}, json_text]}
        content["text/event-stream"] = {
            "schema": {"type": "object", "properties": {"data": data}, "required": ["data"]},
        }
    success: dict[str, Any] = {"description": "Success", "content": content}
    return {
        "response_model": None,
        "response_class": Response,
        "responses": {200: success | ({} if model is None else {"model": model})},
    }


def _refusal(text: str) -> dict[str, Any]:
    return {"description": text, "model": replies.ErrorReply}


def _document(app: FastAPI, generate: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Add the form of a stream's events to the OpenAPI document, which FastAPI has no place for."""
    if app.openapi_schema is None:
        schema = TypeAdapter(replies.ChatChunk).json_schema(ref_template="#/components/schemas/{model}")
        parts = schema.pop("$defs")
        generate()["components"]["schemas"] |= parts | {"ChatChunk": schema}
    assert app.openapi_schema is not None
    return app.openapi_schema


async def _page() -> Response:
    if not (WEB / "index.html").is_file():
        raise HTTPException(404)
    return FileResponse(WEB / "index.html")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return from_http(error).response()


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return from_validation(error).response()
