"""Rollouts: prompts go in; completions, and the log-probabilities that they were drawn with, come out.

Sampling is the library's own. The log-probabilities are those of the very distribution that was drawn from,
temperature included, so a trainer that computes them anew has to find the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minillm_jax.config import ComputeConfig, ModelConfig
from minillm_jax.data import DataError
from minillm_jax.model import Params
from minillm_jax.sampler import decode_stream
from minillm_jax.sampling import SamplingParams


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rollout:
    """Completions of B prompts.

    Attributes:
        prompts: token ids of each prompt.
        completions: token ids of each completion, the end token included where there is one; never empty.
        logprobs: of each completion's tokens, under the distribution that they were drawn from.
        finished: `[B]` bool, whether an end token was drawn.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    logprobs: list[list[float]]
    finished: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens that were drawn."""
        return sum(map(len, self.completions))


def sample_rollout(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    eos_token_ids: Sequence[int],
    *,
    temperature: float,
    max_new_tokens: int,
    rows_at_once: int,
    seed: tuple[int, ...],
    compute: ComputeConfig = ComputeConfig(),
) -> Rollout:
    """Draw one completion for each prompt; a prompt that is given several times gets several.

    Args:
        params: of the policy.
        config: its shape.
        prompts: token ids.
        eos_token_ids: tokens that end a completion.
        temperature: of the sampling; 0 takes the likeliest token.
        max_new_tokens: longest completion.
        rows_at_once: completions in one batch; prompts are sorted by length first, so that little is padded.
        seed: with the prompts it determines every completion.
        compute: dtype and attention implementation.

    Raises:
        ValueError: a prompt that is empty, too long, or outside the vocabulary.
    """
    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # stable: repeats stay side by side
    completions: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    for begin in range(0, len(order), rows_at_once):
        rows = order[begin : begin + rows_at_once]
        # Repeats of a prompt that lie in two batches must not be drawn alike.
        batch_seed = int(np.random.SeedSequence((*seed, begin)).generate_state(1)[0] >> 1)
        batch = [prompts[i] for i in rows]
        chunks = decode_stream(
            params, config, batch, sampling, eos_token_ids,
            seed=batch_seed, compute=compute, tempered=True, shrink=True,
        )  # fmt: skip
        for tokens, values in chunks:
            for i, drawn, value in zip(rows, tokens, values, strict=True):
                kept = drawn >= 0
                completions[i] += drawn[kept].tolist()
                logprobs[i] += value[kept].tolist()
    ends = set(eos_token_ids)
    finished = np.asarray([completion[-1] in ends for completion in completions])
    return Rollout([list(prompt) for prompt in prompts], completions, logprobs, finished)


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts on disk, one file a step


def rollout_file(folder: Path, step: int) -> Path:
    """Where the rollout that begins after `step` optimizer steps is kept."""
    return folder / f"{step:07d}.jsonl"


def write_rollout(path: Path, rollout: Rollout, indices: Sequence[int], columns: dict[str, Sequence[Any]]) -> None:
    """Write a rollout for people to read: one object a completion.

    Args:
        path: file to write, atomically.
        rollout: the completions.
        indices: `[B]` which prompt of the data each one answers.
        columns: what else to say of each, by name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for i, index in enumerate(indices):
            row = {
                "index": int(index),
                **{name: values[i] for name, values in columns.items()},
                "finished": bool(rollout.finished[i]),
                "prompt_ids": rollout.prompts[i],
                "token_ids": rollout.completions[i],
                "logprobs": rollout.logprobs[i],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    temporary.replace(path)


def read_rollout(path: Path) -> tuple[Rollout, list[int]]:
    """Read what `write_rollout` wrote: the rollout, and which prompts it answers.

    Raises:
        DataError: the file is missing or is no rollout.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rollout = Rollout(
            [row["prompt_ids"] for row in rows],
            [row["token_ids"] for row in rows],
            [row["logprobs"] for row in rows],
            np.asarray([row["finished"] for row in rows], bool),
        )
        return rollout, [row["index"] for row in rows]
    except OSError as error:
        raise DataError(f"{path}: cannot be replayed: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is no rollout ({error!r})") from error
