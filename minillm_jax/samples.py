"""What a stage shows of its model while it trains: a few continued texts or answered messages."""

from __future__ import annotations

from collections.abc import Sequence

from minillm_jax.chat import render
from minillm_jax.lm import LanguageModel, generate
from minillm_jax.sampling import SamplingParams

LENGTH = 48
"""Tokens shown of each."""


def continue_texts(lm: LanguageModel, prompts: Sequence[str]) -> list[str]:
    """Continue texts at temperature 0.8, each with its beginning."""
    completions = generate(lm, prompts, SamplingParams(max_new_tokens=LENGTH, temperature=0.8))
    return [prompt + completion.text for prompt, completion in zip(prompts, completions, strict=True)]


def answer_chats(lm: LanguageModel, prompts: Sequence[str]) -> list[str]:
    """Answer user messages greedily, each as `message → answer`."""
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    ids = [render(lm.tokenizer, turn, add_generation_prompt=True).token_ids for turn in turns]
    completions = generate(lm, ids, SamplingParams(max_new_tokens=LENGTH, temperature=0.0))
    return [f"{prompt} → {completion.text}" for prompt, completion in zip(prompts, completions, strict=True)]
