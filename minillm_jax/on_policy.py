"""On-policy batches: parts of a batch are replaced by what the student itself would have written (arXiv:2306.13649).

A host batch and the student's parameters go in; a batch of the same shape comes out, in which some rows keep their
prompts and have sampled replies. A reply fits where the old one was, so nothing is packed anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minillm_jax.config import ComputeConfig, ModelConfig
from minillm_jax.model import Params
from minillm_jax.sampler import decode_stream
from minillm_jax.sampling import SamplingParams

HostBatch = dict[str, np.ndarray]


def sample_replies(
    batch: HostBatch,
    params: Params,
    config: ModelConfig,
    eos_token_ids: Sequence[int],
    *,
    fraction: float,
    seed: int,
    step: int,
    compute: ComputeConfig = ComputeConfig(),
) -> HostBatch:
    """Let the student reply in place of some rows.

    Of each segment in a chosen row, the prompt is what comes before the first trained token; where everything is
    trained, as in raw text, it is the first half. The reply ends at an end token or where the segment did, is trained
    as a whole, and what it leaves empty becomes padding. Segments without a trained token are dropped.

    Args:
        batch: `tokens targets weights segment_ids positions`, `[B, T]` each; left as it is.
        params: the student's.
        config: its shape.
        eos_token_ids: tokens that end a reply.
        fraction: share of the rows to choose, at random; the choice and the samples depend on seed and step alone.
        seed: of the run.
        step: of the run.
        compute: dtype and attention implementation.

    Returns:
        The new batch, with a further array `sampled` `[B, T]` float32 that is 1 where the student replied.
    """
    random = np.random.default_rng((seed, step))
    batch = {name: array.copy() for name, array in batch.items()}
    batch["sampled"] = np.zeros(batch["tokens"].shape, np.float32)
    rows = len(batch["tokens"])
    count = int(fraction * rows + random.random())  # on average fraction * rows
    chosen = np.sort(random.permutation(rows)[:count])
    places, prompts = [], []
    for row in chosen.tolist():
        for begin, prompt_end, end in _segments(batch, row):
            places.append((row, begin, prompt_end, end))
            prompts.append(batch["tokens"][row, begin:prompt_end].tolist())
        for array in batch.values():
            array[row] = 0
    if prompts:
        longest = max(end - prompt_end + 1 for _, _, prompt_end, end in places)
        replies = _sample(params, config, prompts, longest, eos_token_ids, int(random.integers(2**31)), compute)
        for (row, begin, prompt_end, end), prompt, reply in zip(places, prompts, replies, strict=True):
            _write(batch, row, begin, prompt, reply[: end - prompt_end + 1])
    return batch


def _segments(batch: HostBatch, row: int) -> list[tuple[int, int, int]]:
    """Return begin, end of the prompt, and end of each segment of a row that holds a trained token."""
    segment_ids, weights = batch["segment_ids"][row], batch["weights"][row]
    edges = np.flatnonzero(np.diff(segment_ids, prepend=0, append=0))
    found = []
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        trained = np.flatnonzero(weights[begin:end])
        if segment_ids[begin] == 0 or not len(trained):
            continue
        # Target i is token i + 1, so the prompt is the input of the first trained target and all before it.
        prompt = trained[0] + 1 if len(trained) < end - begin else (end - begin + 1) // 2
        found.append((begin, begin + int(prompt), end))
    return found


def _sample(
    params: Params,
    config: ModelConfig,
    prompts: list[list[int]],
    longest: int,
    eos_token_ids: Sequence[int],
    seed: int,
    compute: ComputeConfig,
) -> list[list[int]]:
    """Draw at temperature 1 from the student as it is: other samples would not be its own."""
    sampling = SamplingParams(max_new_tokens=longest)
    chunks = decode_stream(params, config, prompts, sampling, eos_token_ids, seed=seed, compute=compute)
    tokens = np.concatenate([tokens for tokens, _ in chunks], axis=1)
    return [drawn[drawn >= 0].tolist() for drawn in tokens]


def _write(batch: HostBatch, row: int, begin: int, prompt: list[int], reply: list[int]) -> None:
    """Put prompt and reply where a segment was: one more token than (input, target) pairs."""
    ids = prompt + reply
    slots, replied = slice(begin, begin + len(ids) - 1), slice(begin + len(prompt) - 1, begin + len(ids) - 1)
    batch["tokens"][row, slots], batch["targets"][row, slots] = ids[:-1], ids[1:]
    batch["segment_ids"][row, slots] = batch["segment_ids"][row].max() + 1
    batch["positions"][row, slots] = np.arange(len(ids) - 1)
    batch["weights"][row, replied] = batch["sampled"][row, replied] = 1
