"""`transformers.generate` behind the shape of our API, one request at a time: what `benchmarks.serve` compares with.

    python -m benchmarks.transformers_server --model_path FOLDER

It streams /v1/completions with the library's own streamer under the same HTTP stack as ours (uvicorn and FastAPI), in
float32 on all cores of the CPU. Requests wait for a lock, since one model generates one answer at a time.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from transformers import AsyncTextIteratorStreamer, AutoModelForCausalLM, AutoTokenizer

from minillm_jax.cli import user_errors
from minillm_jax.config import parse_cli


@dataclass(frozen=True)
class BaselineConfig:
    """What is served."""

    model_path: str
    """A Hugging Face folder."""
    port: int = 0
    """Port to listen on; 0 takes a free one."""


def create_app(model_path: str) -> FastAPI:
    """Make an application with the two addresses that the benchmark asks."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # answers have a fixed length
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    lock = asyncio.Lock()
    app = FastAPI()

    async def events(prompt: list[int], max_tokens: int) -> AsyncIterator[str]:
        async with lock:
            streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=300)
            tokens = torch.tensor([prompt])
            work = asyncio.to_thread(
                model.generate, tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_tokens,
                do_sample=False, streamer=streamer,
            )  # fmt: skip
            generated = asyncio.create_task(work)
            async for text in streamer:  # one piece a token, empty while the streamer waits for the end of a word
                yield _event(choices=[{"index": 0, "text": text, "finish_reason": None}])
            count = (await generated).shape[1] - len(prompt)
        yield _event(choices=[{"index": 0, "text": "", "finish_reason": "length"}])
        total = len(prompt) + count
        usage = {"prompt_tokens": len(prompt), "completion_tokens": count, "total_tokens": total}
        yield _event(choices=[], usage=usage)
        yield "data: [DONE]\n\n"

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/completions")
    async def completions(body: dict[str, Any]) -> StreamingResponse:
        return StreamingResponse(events(body["prompt"], body["max_tokens"]), media_type="text/event-stream")

    return app


def _event(**fields: Any) -> str:
    return f"data: {json.dumps(fields)}\n\n"


def main() -> int:
    """Serve until killed."""
    with user_errors():
        config = parse_cli(BaselineConfig, str(__doc__))
        torch.set_num_threads(os.cpu_count() or 1)
        uvicorn.run(create_app(config.model_path), port=config.port, access_log=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
