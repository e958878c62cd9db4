"""White-box distillation: a student learns from what a teacher says about every token of the vocabulary.

Hidden states of both go in, a divergence per token comes out. p is the teacher's distribution and q the student's, both
softened by the temperature T (arXiv:1503.02531). A teacher that is too large to keep beside the student is known by its
k most likely tokens and one bucket that holds the probability of all others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from minillm_jax.config import ComputeConfig, ConfigError, ModelConfig
from minillm_jax.losses import Batch, LossFn, Metrics, logprobs_from_logits, map_tokens, router_terms
from minillm_jax.model import Params, forward_hidden, unembed

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]

LOWEST_LOGPROB = -30.0
"""A bucket is given at least this: the reverse divergence of an impossible one would be infinite."""


@dataclass(frozen=True)
class DistillConfig:
    """What the student minimises: alpha * CE + (1 - alpha) * T^2 * D(teacher, student), a mean over trained tokens."""

    alpha: float = 0.5
    """Weight of the cross-entropy with the labels; the rest is the teacher's."""
    temperature: float = 1.0
    """Divides the logits of both models inside the divergence, which T^2 then scales back."""
    divergence: Divergence = "forward_kl"
    """KL(teacher | student), reverse KL(student | teacher), or the generalised Jensen-Shannon divergence."""
    jsd_beta: float = 0.5
    """Share of the teacher in the mixture of jensen_shannon."""

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        if not 0.0 <= self.alpha <= 1.0:
            raise ConfigError(f"--alpha must lie in [0, 1], not {self.alpha}")
        if not (self.temperature > 0.0 and math.isfinite(self.temperature)):
            raise ConfigError(f"--temperature must be positive, not {self.temperature}")
        if not 0.0 < self.jsd_beta < 1.0:
            raise ConfigError(
                f"--jsd_beta must lie between 0 and 1, not {self.jsd_beta}; its ends are forward_kl and reverse_kl"
            )


def kl_divergence(logp: jax.Array, logq: jax.Array) -> jax.Array:
    """KL(p | q) `[...]` in nats, of log-probabilities `[..., V]`; outcomes with p = 0 count nothing."""
    p = jnp.exp(logp)
    return (p * (jnp.where(p > 0, logp, 0.0) - jnp.where(p > 0, logq, 0.0))).sum(-1)


def divergence_from_logprobs(
    logp: jax.Array, logq: jax.Array, kind: Divergence = "forward_kl", jsd_beta: float = 0.5
) -> jax.Array:
    """How far the student's distribution is from the teacher's, 0 where they agree.

    With m = β p + (1 - β) q, jensen_shannon is β KL(p | m) + (1 - β) KL(q | m) (GKD, arXiv:2306.13649); reverse_kl is
    KL(q | p) (MiniLLM, arXiv:2306.08543).

    Args:
        logp: `[..., V]` log-probabilities of the teacher.
        logq: `[..., V]` log-probabilities of the student.
        kind: which divergence.
        jsd_beta: β of jensen_shannon.

    Returns:
        `[...]` float32, in nats.
    """
    if kind == "forward_kl":
        return kl_divergence(logp, logq)
    if kind == "reverse_kl":
        return kl_divergence(logq, logp)
    logm = jnp.logaddexp(logp + math.log(jsd_beta), logq + math.log1p(-jsd_beta))
    return jsd_beta * kl_divergence(logp, logm) + (1.0 - jsd_beta) * kl_divergence(logq, logm)


def divergence(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    kind: Divergence = "forward_kl",
    temperature: float = 1.0,
    jsd_beta: float = 0.5,
) -> jax.Array:
    """Divergence `[...]` of two models' logits `[..., V]` float32, both divided by the temperature; without its T^2."""
    logp = jax.nn.log_softmax(teacher_logits / temperature, axis=-1)
    logq = jax.nn.log_softmax(student_logits / temperature, axis=-1)
    return divergence_from_logprobs(logp, logq, kind, jsd_beta)


# ---------------------------------------------------------------------------------------------------------------------
# A teacher known by its k most likely tokens


def fold_others(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Keep the logits of some tokens and fold all others into one outcome.

    The bucket is what makes the divergence of the result a true one: never negative, never more than that of the whole
    vocabularies, and the same where k is V. Renormalising the k tokens alone would not notice a student that puts its
    probability elsewhere.

    Args:
        logits: `[..., V]`.
        ids: `[..., k]` different tokens.

    Returns:
        `[..., k + 1]`, the last one the log of the others' summed exponentials; `[..., V]` where k is V.
    """
    chosen = jnp.take_along_axis(logits, ids, axis=-1)
    if ids.shape[-1] == logits.shape[-1]:
        return chosen
    # Taken from the others themselves: one minus the sum of the chosen would lose all digits where they are nearly 1.
    others = jnp.put_along_axis(logits, ids, -jnp.inf, axis=-1, inplace=False)
    return jnp.concatenate([chosen, jax.nn.logsumexp(others, axis=-1, keepdims=True)], axis=-1)


def top_k_logprobs(logits: jax.Array, k: int, temperature: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """What is stored of a teacher.

    Args:
        logits: `[..., V]` float32.
        k: tokens to keep, at most V.
        temperature: of the distillation; log-probabilities at another one could not be told from these.

    Returns:
        Ids `[..., k]` int32, the likeliest first, and log-probabilities `[..., k + 1]`, see `fold_others`.
    """
    scaled = logits / temperature
    ids = jax.lax.top_k(scaled, k)[1]
    return ids, jnp.maximum(jax.nn.log_softmax(fold_others(scaled, ids), axis=-1), LOWEST_LOGPROB)


def top_k_divergence(
    student_logits: jax.Array,
    teacher_ids: jax.Array,
    teacher_logprobs: jax.Array,
    kind: Divergence = "forward_kl",
    temperature: float = 1.0,
    jsd_beta: float = 0.5,
) -> jax.Array:
    """Divergence `[...]` from a teacher of `top_k_logprobs`, taken at the same temperature.

    Args:
        student_logits: `[..., V]` float32.
        teacher_ids: `[..., k]` ints.
        teacher_logprobs: `[..., k + 1]`; rounded ones are normalised again.
        kind: which divergence.
        temperature: divides the student's logits.
        jsd_beta: β of jensen_shannon.
    """
    logp = jax.nn.log_softmax(teacher_logprobs.astype(jnp.float32), axis=-1)
    logq = jax.nn.log_softmax(fold_others(student_logits / temperature, teacher_ids), axis=-1)
    return divergence_from_logprobs(logp, logq, kind, jsd_beta)


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def distillation_loss(
    student: ModelConfig, teacher: ModelConfig | None, compute: ComputeConfig, settings: DistillConfig
) -> LossFn:
    """Make the loss of distillation, plus the student's own router loss.

    The batch holds `tokens targets weights segment_ids positions`, each `[B, T]`. Where it also holds `sampled`
    `[B, T]`, tokens marked 1 were written by the student itself: they are no labels, so they have no cross-entropy.
    Metrics: `loss` is the cross-entropy alone, to be compared with other stages; `divergence` is D; `total_loss` is
    what is minimised, router loss aside.

    Args:
        student: shape of the trained model.
        teacher: shape of the model whose parameters are `frozen`; None where the batch brings the teacher along, as
            `teacher_ids` `[B, T, k]` and `teacher_logprobs` `[B, T, k + 1]`.
        compute: dtype and attention of both.
        settings: the formula.
    """
    kind, temperature, jsd_beta = settings.divergence, settings.temperature, settings.jsd_beta

    def loss_fn(
        params: Params, frozen: Any, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        tokens, positions, segment_ids = batch["tokens"], batch["positions"], batch["segment_ids"]
        run = partial(forward_hidden, positions=positions, segment_ids=segment_ids, branched=False, compute=compute)
        output = run(params, student, tokens, dropout_key=key)

        def compare(hidden: jax.Array, targets: jax.Array, *taught: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = unembed(params, student, hidden)
            if teacher is None:
                ids, logprobs = taught
                far = top_k_divergence(logits, ids, logprobs, kind, temperature, jsd_beta)
            else:
                far = divergence(logits, unembed(frozen, teacher, taught[0]), kind, temperature, jsd_beta)
            return -logprobs_from_logits(logits, targets), far

        taught: tuple[jax.Array, ...]
        if teacher is None:
            taught = batch["teacher_ids"], batch["teacher_logprobs"]
        else:
            taught = (run(frozen, teacher, tokens).hidden,)
        arrays = (output.hidden, batch["targets"], *taught)
        cross_entropy, far = map_tokens(compare, arrays, 2 * student.vocab_size)

        weights = batch["weights"]
        labels = weights * (1.0 - batch["sampled"]) if "sampled" in batch else weights
        weight, cross_entropy, far = weights.sum(), (cross_entropy * labels).sum(), (far * weights).sum()
        total = settings.alpha * cross_entropy + (1.0 - settings.alpha) * temperature**2 * far
        metrics: Metrics = {
            "loss": (cross_entropy, labels.sum()),
            "divergence": (far, weight),
            "total_loss": (total, weight),
        }
        router_loss, router_metrics = router_terms(output, weights)
        return total + router_loss, (weight, metrics | router_metrics)

    return loss_fn
