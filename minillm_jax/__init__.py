"""minillm-jax: the whole life of a small language model in JAX.

The public names below are loaded on first use, so that configuration and data code never wait for JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minillm_jax.config import ComputeConfig as ComputeConfig
    from minillm_jax.config import ModelConfig as ModelConfig
    from minillm_jax.hf import export_hf as export_hf
    from minillm_jax.lm import Completion as Completion
    from minillm_jax.lm import LanguageModel as LanguageModel
    from minillm_jax.lm import generate as generate
    from minillm_jax.lm import load as load
    from minillm_jax.lm import stream as stream
    from minillm_jax.model import forward as forward
    from minillm_jax.sampling import SamplingParams as SamplingParams
    from minillm_jax.tokenizer import Tokenizer as Tokenizer

_HOMES = {
    "ComputeConfig": "config",
    "ModelConfig": "config",
    "Completion": "lm",
    "LanguageModel": "lm",
    "export_hf": "hf",
    "generate": "lm",
    "load": "lm",
    "stream": "lm",
    "forward": "model",
    "SamplingParams": "sampling",
    "Tokenizer": "tokenizer",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'minillm_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minillm_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
