"""The small endpoints: models, embeddings, tokenising, and what operators ask a server for."""

from __future__ import annotations

import asyncio
import base64

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from minillm_jax.tokenizer import TokenizerError, encode_prompt
from serve.errors import from_engine, invalid, unavailable
from serve.planning import render_prompt, tokenise_prompts, turns_of
from serve.protocol import EngineBusyError, EngineStoppedError
from serve.replies import Detokenized, Embedding, Embeddings, Model, Models, Tokenized
from serve.schemas import DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from serve.service import Service, service_of
from serve.sse import until_disconnected
from serve.tally import tally_of


async def list_models(request: Request) -> Response:
    """List the base model and the adapters."""
    service = service_of(request)
    names = [service.config.model_name, *service.engine.adapters]
    listing: Models = {"object": "list", "data": [_model(service, name) for name in names]}
    return JSONResponse(listing)


async def show_model(model: str, request: Request) -> Response:
    """Describe one model."""
    service = service_of(request)
    name, _ = service.resolve(model)
    return JSONResponse(_model(service, name))


def _model(service: Service, name: str) -> Model:
    base = service.config.model_name
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "minillm-jax",
        "parent": None if name == base else base,
        "max_model_len": service.engine.context,
    }


async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """Embed texts: the mean of the last layer's states over each text's tokens."""
    service = service_of(request)
    model, adapter = service.resolve(body.model)
    if adapter is not None:
        raise invalid(f"embeddings are those of the base model, {service.config.model_name}", "model")
    if body.dimensions is not None:
        raise invalid("this model has vectors of one size only; leave dimensions out", "dimensions")
    prompts = await asyncio.to_thread(tokenise_prompts, service, body.input, "input")
    if longest := max((len(p) for p in prompts if len(p) > service.engine.context), default=0):
        message = f"has {longest} tokens; the model's context is {service.engine.context}"
        raise invalid(message, "input", code="context_length_exceeded")
    tally = tally_of(request)
    tally.model, tally.user, tally.prompt_tokens = model, body.user, sum(map(len, prompts))
    try:
        work = asyncio.get_running_loop().run_in_executor(service.embedders, service.engine.embed, prompts)
        vectors = await until_disconnected(request.receive, work)
    except (ValueError, EngineBusyError, EngineStoppedError) as error:
        raise from_engine(error) from error
    as_base64 = body.encoding_format == "base64"
    reply: Embeddings = {
        "object": "list",
        "model": model,
        "data": [_embedding(i, vector, as_base64) for i, vector in enumerate(np.asarray(vectors, "<f4"))],
        "usage": {"prompt_tokens": tally.prompt_tokens, "total_tokens": tally.prompt_tokens},
    }
    return JSONResponse(reply)


def _embedding(index: int, vector: np.ndarray, as_base64: bool) -> Embedding:
    numbers = base64.b64encode(vector.tobytes()).decode() if as_base64 else vector.tolist()
    return {"object": "embedding", "index": index, "embedding": numbers}


async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """Show the tokens that the model would read."""
    service = service_of(request)
    service.resolve(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give either prompt or messages", "prompt")
    tokens = await asyncio.to_thread(_tokens, service, body)
    reply: Tokenized = {"tokens": tokens, "count": len(tokens), "max_model_len": service.engine.context}
    return JSONResponse(reply)


def _tokens(service: Service, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        return render_prompt(service, body, turns_of(service, body.messages), body.tools)
    assert body.prompt is not None
    try:
        if body.add_special_tokens is False:
            return service.tokenizer.encode(body.prompt)
        return encode_prompt(service.tokenizer, body.prompt)
    except TokenizerError as error:
        raise invalid(str(error), "prompt") from error


async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """Show the text of tokens, control tokens included."""
    service = service_of(request)
    service.resolve(body.model)
    if any(token >= service.engine.vocab_size for token in body.tokens):
        raise invalid(f"holds a token id outside the vocabulary of {service.engine.vocab_size}", "tokens")
    reply: Detokenized = {"prompt": await asyncio.to_thread(service.tokenizer.decode, body.tokens)}
    return JSONResponse(reply)


async def health() -> Response:
    """Say that the server is alive."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """Say whether requests are taken: not while programs are compiled, and not while the server is stopping."""
    service = service_of(request)
    if not service.ready:
        raise unavailable("The server is stopping" if service.draining else "The server is still starting")
    return JSONResponse({"status": "ready"})


async def metrics(request: Request) -> Response:
    """Return metrics in Prometheus' text format."""
    text = await asyncio.to_thread(service_of(request).metrics.text)
    return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})
