"""Rollouts: prompts go in; completions, and the log-probabilities that they were drawn with, come out as arrays.

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

from minillm_jax.cache import BRANCH
from minillm_jax.config import ComputeConfig, ModelConfig
from minillm_jax.data import Batch, DataError
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
            params, config, batch, sampling, eos_token_ids, seed=batch_seed, compute=compute, tempered=True
        )
        for tokens, values in chunks:
            for i, drawn, value in zip(rows, tokens, values, strict=True):
                kept = drawn >= 0
                completions[i] += drawn[kept].tolist()
                logprobs[i] += value[kept].tolist()
    ends = set(eos_token_ids)
    finished = np.asarray([completion[-1] in ends for completion in completions])
    return Rollout([list(prompt) for prompt in prompts], completions, logprobs, finished)


def to_batch(rollout: Rollout, group_size: int = 1, smallest: tuple[int, int] = (32, 8)) -> tuple[Batch, np.ndarray]:
    """Lay a rollout out for training, padded on the right.

    The G completions of a prompt stand behind it in one row, as branches that do not see one another (see `attention`),
    so a prompt is read once, however many completions it has. Prompts are read and completions are learnt from: only
    the latter's tokens need logits, and what is said of them stands in arrays of their own.

    Args:
        rollout: B = P * G completions, those of one prompt side by side.
        group_size: completions G per prompt.
        smallest: least T and C; what is longer gets the next power of two, so that few shapes are ever compiled.

    Returns:
        `tokens segment_ids positions`, `[P, T]`; `slots` `[P, G, C]`, where in T the state stands that a completion's
        token was drawn from; `targets weights`, `[P, G, C]`, the tokens of completions. And the sampler's
        log-probabilities `[B, C]` of them, 0 behind their end.
    """
    completions = rollout.completions
    prompts = rollout.prompts[::group_size]
    drawn = _power_of_two(max(map(len, completions)), smallest[1])
    read = [len(prompt) for prompt in prompts]
    for i, completion in enumerate(completions):
        read[i // group_size] += len(completion) - 1  # nothing follows a last token
    width = _power_of_two(max(read), smallest[0])
    batch: Batch = {name: np.zeros((len(prompts), width), np.int32) for name in ("tokens", "segment_ids", "positions")}
    batch |= {name: np.zeros((len(prompts), group_size, drawn), np.int32) for name in ("slots", "targets")}
    batch["weights"] = np.zeros((len(prompts), group_size, drawn), np.float32)
    logprobs = np.zeros((len(completions), drawn), np.float32)
    for row, prompt in enumerate(prompts):
        size = end = len(prompt)
        batch["tokens"][row, :size], batch["segment_ids"][row, :size] = prompt, 1
        batch["positions"][row, :size] = np.arange(size)
        for member in range(group_size):
            i = row * group_size + member
            completion = completions[i]
            place = slice(end, end + len(completion) - 1)
            batch["tokens"][row, place] = completion[:-1]
            batch["segment_ids"][row, place] = 1 + (member + 1) * BRANCH
            batch["positions"][row, place] = size + np.arange(len(completion) - 1)
            batch["slots"][row, member, : len(completion)] = [size - 1, *range(place.start, place.stop)]
            batch["targets"][row, member, : len(completion)] = completion
            batch["weights"][row, member, : len(completion)] = 1.0
            logprobs[i, : len(completion)] = rollout.logprobs[i]
            end = place.stop
    return batch, logprobs


def _power_of_two(length: int, smallest: int) -> int:
    return max(smallest, 1 << (length - 1).bit_length())


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
