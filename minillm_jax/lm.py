"""A model as people use it: load it from a folder, generate with it.

`load` reads a run folder, one of its checkpoints or a Hugging Face folder; what comes back is parameters, configuration
and tokenizer, nothing that mutates.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from minillm_jax.config import ComputeConfig, ModelConfig
from minillm_jax.model import Params
from minillm_jax.pretrained import axes_of, load_params, load_tokenizer, read_model_config
from minillm_jax.sampler import decode_stream
from minillm_jax.sampling import SamplingParams
from minillm_jax.sharding import check_mesh, make_mesh, tree_shardings
from minillm_jax.tokenizer import StreamDecoder, Tokenizer, encode_prompt


@dataclass(frozen=True)
class LanguageModel:
    """Parameters with what is needed to use them."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Completion:
    """One generated text.

    Attributes:
        text: the new text, without the end token and without anything from a stop string on.
        token_ids: the tokens drawn, the end token included when there was one.
        logprobs: log-probability of each under the model, before temperature and filters.
        finish_reason: `stop` at an end token or stop string, `length` when the budget was used up.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


def load(
    path: str | Path, *, adapter: str | Path | None = None, dtype: str | None = None, mesh: str | None = None
) -> LanguageModel:
    """Load a model from a run folder, one of its checkpoints or a Hugging Face folder.

    An adapter's run is loaded with its base, and merged into it.

    Args:
        path: the folder. One without tokenizer files gives a model that takes and returns token ids only.
        adapter: run (or checkpoint) of an adapter to put onto the model at `path`, another copy of its base.
        dtype: `float32`, `bfloat16` or another floating-point type that parameters are cast to while they are read;
            `stored` keeps what the folder holds. None is float32 on CPU, which computes in it, and `stored` elsewhere.
        mesh: how parameters are spread over devices, such as `fsdp=8`, which then compute together; None puts them on
            the first device.

    Raises:
        CheckpointError: the folder holds no checkpoint; the message says what was expected.
        HfError: a Hugging Face folder holds something that is not implemented, or not all that is needed.
        AdapterError: the base of an adapter is missing or has another shape, or `adapter` names none.
        ConfigError: the mesh cannot split the model.
    """
    base, path = (None, path) if adapter is None else (path, adapter)
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "stored"
    shardings = None
    if mesh is not None:
        devices = make_mesh(mesh)
        check_mesh(devices, read_model_config(path), str(path))
        shardings = tree_shardings(devices, axes_of(path))
    kept = None if dtype == "stored" else jnp.dtype(dtype)
    config, params = load_params(path, base=base, dtype=kept, shardings=shardings)
    return LanguageModel(config, params, load_tokenizer(path))


class _Row:
    """Text and end of one completion, fed token by token."""

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams) -> None:
        self.decoder = StreamDecoder(tokenizer, skip_special_tokens=True)
        self.ends = frozenset(tokenizer.eos_token_ids)
        self.sampling = sampling
        self.text, self.sent = "", 0
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: str | None = None

    def push(self, token: int, logprob: float) -> None:
        """Take one token; sets `finish_reason` when it ends the completion."""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if token in self.ends and not self.sampling.ignore_eos:
            self.finish("stop")
            return
        self._append(self.decoder.push(token))

    def _append(self, piece: str) -> None:
        searched = max(0, len(self.text) - max(map(len, self.sampling.stop), default=0))
        self.text += piece
        hits = [at for stop in self.sampling.stop if (at := self.text.find(stop, searched)) >= 0]
        if hits:
            self.text = self.text[: min(hits)]
            self.finish_reason = "stop"

    def finish(self, reason: str) -> None:
        """End the row, flushing bytes that wait for the rest of their character."""
        self._append(self.decoder.flush())
        self.finish_reason = self.finish_reason or reason

    def fresh_text(self) -> str:
        """Text not handed out yet, short of what may turn out to begin a stop string."""
        end = len(self.text)
        if self.finish_reason is None:
            for stop in self.sampling.stop:
                for size in range(min(len(stop) - 1, len(self.text)), 0, -1):
                    if self.text.endswith(stop[:size]):
                        end = min(end, len(self.text) - size)
                        break
        piece, self.sent = self.text[self.sent : end], max(self.sent, end)
        return piece

    def completion(self) -> Completion:
        """Return what the row has become."""
        return Completion(self.text, self.token_ids, self.logprobs, str(self.finish_reason))


def _decode(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seed: int, compute: ComputeConfig
) -> Iterator[list[_Row]]:
    """Yield the rows after every chunk, until all have ended."""
    rows = [_Row(lm.tokenizer, sampling) for _ in prompts]
    stream = decode_stream(
        lm.params, lm.config, prompts, sampling, lm.tokenizer.eos_token_ids, seed=seed, compute=compute
    )
    for tokens, logprobs in stream:
        for i, row in enumerate(rows):
            for token, logprob in zip(tokens[i].tolist(), logprobs[i].tolist(), strict=True):
                if row.finish_reason is None and token < 0:  # its context is full while others go on
                    row.finish("length")
                if row.finish_reason is not None:
                    break
                row.push(token, logprob)
        if all(row.finish_reason for row in rows):
            break
        yield rows
    for row in rows:
        if row.finish_reason is None:
            row.finish("length")
    yield rows


def generate(
    lm: LanguageModel,
    prompts: Sequence[str | Sequence[int]],
    sampling: SamplingParams = SamplingParams(),
    *,
    seed: int = 0,
    compute: ComputeConfig = ComputeConfig(),
) -> list[Completion]:
    """Complete prompts, all in one batch.

    Args:
        lm: from `load`.
        prompts: strings, which are continued as documents, or lists of token ids, for example from `chat.render`.
        sampling: settings of all rows.
        seed: a prompt, a seed and settings determine the completion, whatever else is in the batch.
        compute: dtype and attention implementation.

    Raises:
        ValueError: a prompt that is empty, too long, or outside the vocabulary; or `lm` is a reward model.
    """
    ids = [encode_prompt(lm.tokenizer, prompt) for prompt in prompts]
    if not ids:
        return []
    rows: list[_Row] = []
    for rows in _decode(lm, ids, sampling, seed, compute):  # noqa: B007
        pass
    return [row.completion() for row in rows]


def stream(
    lm: LanguageModel,
    prompt: str | Sequence[int],
    sampling: SamplingParams = SamplingParams(),
    *,
    seed: int = 0,
    compute: ComputeConfig = ComputeConfig(),
) -> Generator[str, None, Completion]:
    """Complete one prompt, yielding text as it is generated; the pieces add up to `generate`'s text.

    Args and errors are those of `generate`.

    Returns:
        The whole completion, as the value of the exhausted generator.
    """
    for (row,) in _decode(lm, [encode_prompt(lm.tokenizer, prompt)], sampling, seed, compute):
        if piece := row.fresh_text():
            yield piece
    return row.completion()
