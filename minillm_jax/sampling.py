"""From logits to one token: penalties, temperature, filters, draw. Every setting is an array with one entry a row.

Filters keep the most likely tokens up to a threshold that is found by bisection over the float's own bits: exact after
31 counts of the vocabulary, without sorting it, and with settings that may differ from row to row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn. The defaults sample from the model as it is.

    Raises:
        ValueError: a value outside its range.
    """

    max_new_tokens: int = 64
    """Longest completion in tokens."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely tokens whose probability reaches this sum (nucleus sampling, arXiv:1904.09751)."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the most likely one (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen, prompt included (CTRL, arXiv:1909.05858)."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; the text ends before them."""
    ignore_eos: bool = False
    """Go on after the end token."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "be at least 1"),
            "temperature": (self.temperature >= 0, "not be negative"),
            "top_k": (self.top_k >= 0, "not be negative"),
            "top_p": (0 < self.top_p <= 1, "lie in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "lie in [0, 1]"),
            "repetition_penalty": (self.repetition_penalty > 0, "be positive"),
            "stop": ("" not in self.stop, "not hold an empty string"),
        }
        for name, (holds, rule) in checks.items():
            if not holds:
                raise ValueError(f"{name} must {rule}; it is {getattr(self, name)!r}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingArrays:
    """The numeric settings of B rows, each `[B]`."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array


def sampling_arrays(params: list[SamplingParams]) -> SamplingArrays:
    """Stack the settings of several rows."""
    return SamplingArrays(
        temperature=jnp.asarray([p.temperature for p in params], jnp.float32),
        top_k=jnp.asarray([p.top_k for p in params], jnp.int32),
        top_p=jnp.asarray([p.top_p for p in params], jnp.float32),
        min_p=jnp.asarray([p.min_p for p in params], jnp.float32),
        repetition_penalty=jnp.asarray([p.repetition_penalty for p in params], jnp.float32),
    )


def penalize_repetition(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Make tokens marked in `seen` `[B, V]` less likely; logits `[B, V]`, penalty `[B]`."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Penalties:
    """What makes tokens less likely, each `[B]`; see `penalize`.

    Attributes:
        repetition: factor for tokens of prompt and completion; 1 for none.
        presence: taken off once for a token of the completion.
        frequency: taken off for each time that the completion holds the token.
        biased: bool, whether the row's bias is to be added.
    """

    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    biased: jax.Array


def penalize(logits: jax.Array, seen: jax.Array, counts: jax.Array, bias: jax.Array, penalties: Penalties) -> jax.Array:
    """Apply all penalties; a batch without any gets its logits back at no cost.

    Args:
        logits: `[B, V]` float32.
        seen: `[B, V]` bool, tokens of prompt and completion.
        counts: `[B, V]` ints, how often the completion holds each token.
        bias: `[B, V]`, added where the row is biased.
        penalties: of each row.
    """

    def apply() -> jax.Array:
        repetition = penalize_repetition(logits, seen, penalties.repetition)
        off = penalties.presence[:, None] * (counts > 0) + penalties.frequency[:, None] * counts
        rowwise = (penalties.presence != 0) | (penalties.frequency != 0)
        less = jnp.where(rowwise[:, None], repetition - off, repetition)
        return jnp.where(penalties.biased[:, None], less + bias, less)

    some = (penalties.repetition != 1) | (penalties.presence != 0) | (penalties.frequency != 0) | penalties.biased
    return jax.lax.cond(some.any(), apply, lambda: logits)


def _largest_threshold(probs: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Largest threshold `[B]` for which `enough(probs >= threshold)` holds, by bisection over non-negative floats.

    Non-negative float32 values are ordered like their bit patterns, so 31 halvings end on the exact value.
    """

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # low always suffices, high never does
        middle = low + (high - low) // 2
        holds = enough(probs >= jax.lax.bitcast_convert_type(middle, jnp.float32)[:, None])
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    rows = probs.shape[0]
    above_one = jax.lax.bitcast_convert_type(jnp.float32(1.5), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros(rows, jnp.int32), jnp.full(rows, above_one)))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def filter_logits(logits: jax.Array, settings: SamplingArrays) -> jax.Array:
    """Set the logits of tokens outside top-k, top-p or min-p to minus infinity.

    Filters apply one after another, in that order, each to the distribution that the one before left. Tokens that tie
    with the last one kept are kept too. Logits are `[B, V]`, already divided by temperature.
    """
    vocab = logits.shape[-1]
    top_k = jnp.where(settings.top_k > 0, settings.top_k, vocab)[:, None]
    probs = jax.nn.softmax(logits, axis=-1)
    nothing = jnp.zeros(probs.shape[0])
    threshold = jax.lax.cond(
        (settings.top_k > 0).any(),
        lambda: _largest_threshold(probs, lambda kept: kept.sum(-1) >= jnp.minimum(top_k[:, 0], vocab)),
        lambda: nothing,
    )
    probs = jnp.where(probs >= threshold[:, None], probs, 0.0)
    mass = settings.top_p * probs.sum(-1)
    nucleus = jax.lax.cond(
        (settings.top_p < 1.0).any(),
        lambda: _largest_threshold(probs, lambda kept: jnp.where(kept, probs, 0.0).sum(-1) >= mass),
        lambda: nothing,
    )
    nucleus = jnp.where(settings.top_p < 1.0, nucleus, 0.0)
    floor = jnp.maximum(nucleus, settings.min_p * probs.max(-1))
    return jnp.where((probs >= floor[:, None]) & (probs > 0), logits, -jnp.inf)


def categorical(logits: jax.Array, keys: jax.Array) -> jax.Array:
    """Draw from softmax(logits) by inverting its cumulative distribution, first over blocks, then inside one.

    One uniform number a row is enough; adding Gumbel noise takes one a token, which costs more than a small model.

    Args:
        logits: `[B, V]` float32; minus infinity is never drawn.
        keys: `[B]` random keys.

    Returns:
        `[B]` int32 tokens.
    """
    rows, vocab = logits.shape
    width = max(1, math.isqrt(vocab))
    probs = jnp.exp(logits - logits.max(-1, keepdims=True))
    blocks = jnp.pad(probs, ((0, 0), (0, -vocab % width))).reshape(rows, -1, width)
    sums = blocks.sum(-1)
    target = jax.vmap(jax.random.uniform)(keys) * sums.sum(-1)
    block, before = _first_beyond(sums, target)
    chosen = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]  # [B, width]
    return (block * width + _first_beyond(chosen, target - before)[0]).astype(jnp.int32)


def _first_beyond(weights: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Find where the running sum of `[B, n]` weights exceeds a target `[B]`, and the sum of what lies before it.

    The place found always has a positive weight: where rounding leaves the target beyond the whole sum, it is the last.
    """
    sums, positive = jnp.cumsum(weights, axis=-1), weights > 0
    beyond = positive & (sums > target[:, None])
    last = weights.shape[-1] - 1 - jnp.argmax(positive[:, ::-1], axis=-1)
    place = jnp.where(beyond.any(-1), jnp.argmax(beyond, axis=-1), last)
    reached, own = (jnp.take_along_axis(x, place[:, None], axis=-1)[:, 0] for x in (sums, weights))
    return place, reached - own


def sample(logits: jax.Array, keys: jax.Array, settings: SamplingArrays) -> jax.Array:
    """Draw one token a row.

    Args:
        logits: `[B, V]` float32, penalties already applied.
        keys: `[B]` random keys.
        settings: of each row; temperature 0 takes the most likely token.

    Returns:
        `[B]` int32 tokens.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        scaled = logits / jnp.where(settings.temperature > 0, settings.temperature, 1.0)[:, None]
        filtered = jnp.any((settings.top_k > 0) | (settings.top_p < 1.0) | (settings.min_p > 0))
        scaled = jax.lax.cond(filtered, lambda: filter_logits(scaled, settings), lambda: scaled)
        drawn = categorical(scaled, keys)
        return jnp.where(settings.temperature > 0, drawn, greedy)

    return jax.lax.cond(jnp.any(settings.temperature > 0), draw, lambda: greedy)
