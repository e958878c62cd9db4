"""A reward model as a reward: token ids of prompt and completion go in, its scores come out.

A reward model is trained on whole rendered conversations and read at their last token. A completion that ended is
therefore closed as the chat template closes a turn; one that was cut off is scored as it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from minillm_jax.chat import render
from minillm_jax.config import ComputeConfig, ConfigError, ModelConfig
from minillm_jax.model import Params, compute_dtype
from minillm_jax.pretrained import holds_reward_model, load_params, load_tokenizer, read_model_config
from minillm_jax.reward import reward_axes, reward_scores
from minillm_jax.sampler import bucket
from minillm_jax.sharding import check_mesh, data_parallelism, tree_shardings
from minillm_jax.teacher import vocabulary_difference
from minillm_jax.tokenizer import MissingTokenizer, Tokenizer
from minillm_jax.trainer import put_batch

ROWS = 64
"""Conversations scored by one call of the model."""


@dataclass(frozen=True)
class RewardModel:
    """A reward model with what it takes to ask it."""

    params: Params
    config: ModelConfig
    ends: frozenset[int]
    """Tokens that end a completion."""
    closing: tuple[int, ...]
    """The end token of an assistant's turn and all that follows it; nothing if the template writes no end token."""
    mesh: Mesh | None = None
    """Devices of this process that the parameters lie on; None is the first one."""
    compute: ComputeConfig = ComputeConfig()

    def whole(self, prompt: Sequence[int], completion: Sequence[int]) -> list[int]:
        """Join prompt and completion to the conversation that the model was trained to read."""
        if self.closing and completion and completion[-1] in self.ends:
            return [*prompt, *completion[:-1], *self.closing]
        return [*prompt, *completion]

    def score(self, conversations: Sequence[Sequence[int]]) -> np.ndarray:
        """Score conversations of any lengths.

        They are padded on the right to few lengths, similar ones together.

        Args:
            conversations: B lists of token ids, none empty.

        Returns:
            [B] float32.
        """
        scores = np.zeros(len(conversations), np.float32)
        order = sorted(range(len(conversations)), key=lambda i: -len(conversations[i]))
        for begin in range(0, len(order), ROWS):
            part = order[begin : begin + ROWS]
            scores[part] = self._score_batch([conversations[i] for i in part])
        return scores

    def _score_batch(self, conversations: Sequence[Sequence[int]]) -> np.ndarray:
        longest = max(map(len, conversations))
        width = max(longest, min(bucket(longest), self.config.max_position_embeddings))
        ways = 1 if self.mesh is None else data_parallelism(self.mesh)
        rows = ways * -(-bucket(len(conversations), smallest=1) // ways)
        tokens, segment_ids = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
        for i, ids in enumerate(conversations):
            tokens[i, : len(ids)], segment_ids[i, : len(ids)] = ids, 1
        batch = {"tokens": tokens, "segment_ids": segment_ids}
        with nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            placed = jax.device_put(batch) if self.mesh is None else put_batch(batch, self.mesh)
            scores = reward_scores(self.params, self.config, placed["tokens"], placed["segment_ids"], self.compute)
            return np.asarray(scores)[: len(conversations)]


def open_reward_model(
    path: str,
    tokenizer: Tokenizer,
    *,
    max_seq_len: int,
    mesh: Mesh | None = None,
    compute: ComputeConfig = ComputeConfig(),
) -> RewardModel:
    """Load a reward model that reads what a policy writes.

    Args:
        path: run, checkpoint or Hugging Face folder.
        tokenizer: the policy's.
        max_seq_len: the most tokens of a prompt and its completion together.
        mesh: devices of this process; None is the first one.
        compute: dtype and attention implementation.

    Raises:
        ConfigError: the folder holds a language model, its vocabulary is not the policy's, its context is too short, or
            the mesh cannot split it.
        HfError, CheckpointError: the folder holds no model.
    """
    config, closing = read_model_config(path), closing_tokens(tokenizer)
    theirs = load_tokenizer(path)
    if not isinstance(theirs, MissingTokenizer) and (difference := vocabulary_difference(tokenizer, theirs)):
        raise ConfigError(
            f"--reward_model_path {path} has another vocabulary than the policy: {difference}; train both with the "
            "same tokenizer"
        )
    if config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"--reward_model_path {path} has a vocabulary of {config.vocab_size} and the policy one of "
            f"{tokenizer.vocab_size}; train both with the same tokenizer"
        )
    needed = max_seq_len + max(0, len(closing) - 1)  # the end token is the completion's own
    if needed > config.max_position_embeddings:
        raise ConfigError(
            f"--reward_model_path {path} reads {config.max_position_embeddings} tokens, but prompts, completions and "
            f"what closes them can have {needed}; lower --max_seq_len"
        )
    if not holds_reward_model(path):
        raise ConfigError(
            f"--reward_model_path {path} is a language model, without a head that scores; make a reward model of it "
            "with python -m rl.train_rm"
        )
    shardings = None
    if mesh is not None:
        check_mesh(mesh, config, path)
        shardings = tree_shardings(mesh, reward_axes(config))
    _, params = load_params(path, dtype=compute_dtype(compute), shardings=shardings)
    return RewardModel(params, config, frozenset(tokenizer.eos_token_ids), closing, mesh, compute)


def closing_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the end token of an assistant's turn and all that the chat template writes behind it.

    Found by rendering a short conversation. A template that writes no end token there gives nothing.
    """
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    rendered = render(tokenizer, turns)
    answer = rendered.mask.index(1)  # the end token itself need not be trained
    ends = [i for i, token in enumerate(rendered.token_ids) if i > answer and token in tokenizer.eos_token_ids]
    return tuple(rendered.token_ids[ends[-1] :]) if ends else ()
