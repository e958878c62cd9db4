"""RL rows to rendered prompts, with random access.

A prompt is what a model will be asked: the turns of a row, rendered up to the opening of the answer. Prompts differ in
length and go to a sampler, which pads them as it likes; so a batch holds row numbers, and whoever draws it looks the
prompts up. Nothing is cached, because prompts are short and few beside what is generated from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from minillm_jax.chat import ChatError, render
from minillm_jax.data.encode import Report
from minillm_jax.data.errors import DataError, OnBadRow, SkipReport
from minillm_jax.data.loader import Share, held_out_mask
from minillm_jax.data.packing import Batch
from minillm_jax.data.records import RLRecord, bad_row, chat_field_error, read_file
from minillm_jax.data.sources import Source, resolve_sources
from minillm_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class PromptRows:
    """Prompts with random access: `rows.gather(indices)` says which they are, `prompts` and `records` what they are."""

    records: Sequence[RLRecord]
    prompts: Sequence[list[int]]
    """Token ids of each, the opening of an assistant turn included."""
    shares: tuple[Share, ...]
    """One for all prompts together, or one for each weighted path."""

    def __len__(self) -> int:
        """Prompts, which is also the length of an epoch."""
        return len(self.prompts)

    def gather(self, indices: Sequence[int]) -> Batch:
        """Return `index` [B] int64. It is never padding: every number, 0 included, is a prompt's."""
        return {"index": np.asarray(indices, np.int64)}

    def describe(self) -> str:
        """Say for the screen how much there is to answer."""
        lengths = [len(prompt) for prompt in self.prompts]
        answers = sum(record.answer is not None for record in self.records)
        return (
            f"{len(self):,} prompts of {min(lengths):,} to {max(lengths):,} tokens, {answers:,} of them with an answer"
        )


Prompt = tuple[RLRecord, list[int]]


def load_prompts(
    path_specs: Sequence[str],
    tokenizer: Tokenizer,
    max_prompt_len: int,
    *,
    on_bad_row: OnBadRow = "error",
    seed: int = 0,
    valid_fraction: float = 0.0,
    valid_path: Sequence[str] = (),
    report: Report = print,
) -> tuple[PromptRows, PromptRows | None]:
    """Make prompts for training, and for validation if any are asked for.

    A prompt is never cut, because half a prompt is another prompt: one that is too long is left out and counted.

    Args:
        path_specs: files or folders, each with an optional `:weight`.
        tokenizer: carries the chat template.
        max_prompt_len: the most tokens of a prompt.
        on_bad_row: "error" stops at the first bad row; "skip" leaves it out and reports it.
        seed: decides which prompts are set aside.
        valid_fraction: share of the prompts to set aside when there is no `valid_path`.
        valid_path: files of held-out prompts; their weights are ignored.
        report: receives lines for the screen.

    Returns:
        Training prompts, and validation prompts or None.

    Raises:
        DataError: a bad row, files that cannot be read, or too few prompts that fit.
    """
    read = _Read(tokenizer, max_prompt_len, on_bad_row, report)
    sources = resolve_sources(path_specs)
    stores = read(sources)
    held_out: list[Prompt] | None = None
    if valid_path:
        held_out = [prompt for store in read(resolve_sources(valid_path)) for prompt in store]
    elif valid_fraction > 0:
        stores, held_out = _set_aside(sources, stores, valid_fraction, seed)
    stops = np.cumsum([len(store) for store in stores]).tolist()
    if sources[0].weight is None:
        shares: tuple[Share, ...] = (Share(0, stops[-1], 1.0),)
    else:
        spans = zip(pairwise([0, *stops]), sources, strict=True)
        shares = tuple(Share(first, stop, float(source.weight or 0)) for (first, stop), source in spans)
    train = _rows([prompt for store in stores for prompt in store], shares)
    report(f"training: {train.describe()}")
    if held_out is None:
        return train, None
    valid = _rows(held_out, (Share(0, len(held_out), 1.0),))
    report(f"validation: {valid.describe()}")
    return train, valid


def _rows(prompts: Sequence[Prompt], shares: tuple[Share, ...]) -> PromptRows:
    return PromptRows([record for record, _ in prompts], [ids for _, ids in prompts], shares)


@dataclass(frozen=True)
class _Read:
    """Reads and renders the prompts of sources, and reports what was left out."""

    tokenizer: Tokenizer
    max_prompt_len: int
    on_bad_row: OnBadRow
    report: Report

    def __call__(self, sources: Sequence[Source]) -> list[list[Prompt]]:
        """Return the prompts of each source that fit."""
        skipped, too_long, stores = SkipReport(), 0, []
        for source in sources:
            rendered = self._render(source, skipped)
            fitting = [(record, ids) for record, ids in rendered if len(ids) <= self.max_prompt_len]
            if not rendered:
                raise DataError(f"{source.path}: every row was skipped; there is nothing to learn from")
            if not fitting:
                shortest = min(len(ids) for _, ids in rendered)
                raise DataError(
                    f"{source.path}: not one of its {len(rendered):,} prompts fits into the {self.max_prompt_len} "
                    f"tokens that --max_seq_len leaves beside --max_new_tokens; the shortest has {shortest:,}"
                )
            too_long += len(rendered) - len(fitting)
            stores.append(fitting)
        for line in skipped.lines():
            self.report(line)
        if too_long:
            self.report(
                f"left out {too_long:,} prompts of more than {self.max_prompt_len:,} tokens; a larger "
                "--max_seq_len would keep them"
            )
        return stores

    def _render(self, source: Source, skipped: SkipReport) -> list[Prompt]:
        prompts: list[Prompt] = []
        for file in source.files:
            for record, _ in read_file(file, "rl", self.on_bad_row, skipped):
                assert isinstance(record, RLRecord)
                try:
                    rendered = render(
                        self.tokenizer, record.conversations, tools=record.tools, add_generation_prompt=True
                    )
                except ChatError as error:
                    bad_row(record, chat_field_error(error), self.on_bad_row, skipped)
                else:
                    prompts.append((record, rendered.token_ids))
        return prompts


def _set_aside(
    sources: Sequence[Source], stores: Sequence[list[Prompt]], fraction: float, seed: int
) -> tuple[list[list[Prompt]], list[Prompt]]:
    """Split off prompts for validation; returns what remains of each store, and what was taken."""
    counts = [len(store) for store in stores]
    if sum(counts) < 2:
        raise DataError("one prompt cannot be split into training and validation; give --valid_fraction 0")
    masks = np.split(held_out_mask(sum(counts), fraction, seed), np.cumsum(counts)[:-1])
    for source, mask in zip(sources, masks, strict=True):
        if mask.all():
            raise DataError(f"{source.path}: every prompt was set aside for validation; give --valid_fraction 0")
    marked = [list(zip(store, mask.tolist(), strict=True)) for store, mask in zip(stores, masks, strict=True)]
    rest = [[prompt for prompt, taken in store if not taken] for store in marked]
    return rest, [prompt for store in marked for prompt, taken in store if taken]
