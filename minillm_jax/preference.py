"""Learning from preferences: losses on the log-probabilities of a preferred and a rejected answer, or their rewards.

A variant is a one-line function of the two answers' scores and a row of the table `VARIANTS`; `preference_loss` turns a
batch of pairs into those scores with a single forward pass. Log-probabilities are sums over the tokens of an answer
unless a variant is defined on their means. Symbols are the papers': y_w is chosen, y_l rejected, h the difference of
their scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from minillm_jax.config import ComputeConfig, ConfigError, ModelConfig
from minillm_jax.data import Rows, eval_batches
from minillm_jax.losses import Batch, LossFn, Metrics, token_logprobs
from minillm_jax.model import ModelOutput, Params, forward_hidden
from minillm_jax.reward import read_scores
from minillm_jax.trainer import put_batch

log_sigmoid = jax.nn.log_sigmoid


@dataclass(frozen=True)
class PreferenceConfig:
    """The loss on pairs. What is None follows the loss type, see `VARIANTS`."""

    loss_type: Literal["sigmoid", "ipo", "hinge", "simpo", "orpo"] = "sigmoid"
    """sigmoid (DPO), ipo or hinge, which need a reference; simpo or orpo, which do not."""
    beta: float | None = None
    """Strength: of the pull to the reference (tau of ipo), of simpo's rewards, of orpo's odds ratio (its lambda). None
    is 0.1, and 2 for simpo."""
    label_smoothing: float = 0.0
    """Share of pairs that may be labelled the wrong way round (sigmoid and simpo)."""
    simpo_gamma: float = 1.0
    """Margin by which simpo wants the chosen answer's reward to lead."""
    length_normalized: bool | None = None
    """Log-probabilities as means over an answer's tokens instead of sums; sigmoid then wants a beta of about 5. None is
    sums for sigmoid and hinge, means for the others."""
    sft_weight: float | None = None
    """Weight of the chosen answer's mean negative log-likelihood per token (RPO's alpha). None is 0, and 1 for orpo."""
    reference: Literal["cached", "online"] = "cached"
    """Log-probabilities of the reference: computed once before training and kept in the run folder, or anew in each
    step by a second copy of the starting model."""

    def __post_init__(self) -> None:
        """Refuse numbers that no loss takes."""
        if self.beta is not None and not self.beta > 0:
            raise ConfigError(f"beta must be positive, not {self.beta}")
        if not 0.0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing must lie in [0, 0.5), not {self.label_smoothing}")
        if self.label_smoothing and self.loss_type not in ("sigmoid", "simpo"):
            raise ConfigError(f"label_smoothing is defined for sigmoid and simpo, not for {self.loss_type}")
        if self.sft_weight is not None and self.sft_weight < 0:
            raise ConfigError(f"sft_weight must not be negative, but is {self.sft_weight}")

    @property
    def needs_reference(self) -> bool:
        """Whether scores are relative to a reference model."""
        return VARIANTS[self.loss_type].needs_reference

    def coefficients(self) -> Coefficients:
        """Write out what follows the loss type."""
        variant = VARIANTS[self.loss_type]
        return Coefficients(
            beta=variant.beta if self.beta is None else self.beta,
            label_smoothing=self.label_smoothing,
            gamma=self.simpo_gamma,
            length_normalized=variant.length_normalized if self.length_normalized is None else self.length_normalized,
            sft_weight=variant.sft_weight if self.sft_weight is None else self.sft_weight,
        )


@dataclass(frozen=True)
class Coefficients:
    """A `PreferenceConfig` without open choices."""

    beta: float
    label_smoothing: float = 0.0
    gamma: float = 0.0
    length_normalized: bool = False
    sft_weight: float = 0.0


# --- Losses of one pair, elementwise over [B] ----------------------------------------------------------------------


def sigmoid_loss(h: jax.Array, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """DPO (arXiv:2305.18290, eq. 7), conservative under label smoothing: -(1-ε) log σ(βh) - ε log σ(-βh)."""
    return -(1 - label_smoothing) * log_sigmoid(beta * h) - label_smoothing * log_sigmoid(-beta * h)


def ipo_loss(h: jax.Array, beta: float) -> jax.Array:
    """IPO (arXiv:2310.12036, eq. 17): (h - 1/2β)²."""
    return (h - 1 / (2 * beta)) ** 2


def hinge_loss(h: jax.Array, beta: float) -> jax.Array:
    """SLiC's ranking loss (arXiv:2305.10425) on DPO's rewards: max(0, 1 - βh)."""
    return jax.nn.relu(1 - beta * h)


def simpo_loss(h: jax.Array, beta: float, gamma: float, label_smoothing: float = 0.0) -> jax.Array:
    """SimPO (arXiv:2405.14734, eq. 6): -log σ(βh - γ)."""
    return sigmoid_loss(h - gamma / beta, beta, label_smoothing)


def odds_ratio_loss(chosen: jax.Array, rejected: jax.Array, beta: float) -> jax.Array:
    """ORPO's second term (arXiv:2403.07691, eq. 7), its weight λ included: -β log σ(log odds(y_w) - log odds(y_l))."""
    return -beta * log_sigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(logps: jax.Array) -> jax.Array:
    """Logarithm of p / (1 - p) from log p; p is kept a little below 1."""
    logps = jnp.minimum(logps, -1e-6)
    return logps - jnp.log(-jnp.expm1(logps))


def dpo_loss(
    policy_chosen_logps: jax.Array,
    policy_rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Direct preference optimisation (arXiv:2305.18290).

    Args:
        policy_chosen_logps: `[B]` log π(y_w | x), summed over the tokens of the answer.
        policy_rejected_logps: `[B]` log π(y_l | x).
        ref_chosen_logps: `[B]` log π_ref(y_w | x).
        ref_rejected_logps: `[B]` log π_ref(y_l | x).
        beta: strength of the pull to the reference.
        label_smoothing: probability ε that a label is the wrong way round.

    Returns:
        Losses, and the implicit rewards β log(π / π_ref) of chosen and rejected, each `[B]`.
    """
    chosen, rejected = policy_chosen_logps - ref_chosen_logps, policy_rejected_logps - ref_rejected_logps
    return sigmoid_loss(chosen - rejected, beta, label_smoothing), beta * chosen, beta * rejected


@dataclass(frozen=True)
class Variant:
    """One loss type: its function of the scores `[B]` of both answers, and what it takes unless told otherwise."""

    loss: Callable[[jax.Array, jax.Array, Coefficients], jax.Array]
    needs_reference: bool
    length_normalized: bool
    beta: float = 0.1
    sft_weight: float = 0.0


VARIANTS: dict[str, Variant] = {
    "sigmoid": Variant(lambda y_w, y_l, c: sigmoid_loss(y_w - y_l, c.beta, c.label_smoothing), True, False),
    "hinge": Variant(lambda y_w, y_l, c: hinge_loss(y_w - y_l, c.beta), True, False),
    # IPO's authors normalise by length in their experiments, though not in the paper's formulas; TRL does as well.
    "ipo": Variant(lambda y_w, y_l, c: ipo_loss(y_w - y_l, c.beta), True, True),
    "simpo": Variant(
        lambda y_w, y_l, c: simpo_loss(y_w - y_l, c.beta, c.gamma, c.label_smoothing), False, True, beta=2.0
    ),
    "orpo": Variant(lambda y_w, y_l, c: odds_ratio_loss(y_w, y_l, c.beta), False, True, sft_weight=1.0),
}
"""What a score is: log π(y|x), less log π_ref(y|x) with a reference, over |y| if normalised by length."""


def pair_losses(
    settings: PreferenceConfig, logps: jax.Array, ref_logps: jax.Array | None, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Loss of each pair, the SFT term included, from its log-probabilities.

    Args:
        settings: the variant and its coefficients.
        logps: `[B, 2]` policy log-probabilities, summed over the tokens of chosen and rejected answers.
        ref_logps: `[B, 2]` those of the reference; not read by variants without one.
        lengths: `[B, 2]` tokens of the answers, at least 1.

    Returns:
        Losses `[B]`, and rewards `[B, 2]`: β times the score of each answer.
    """
    variant, c = VARIANTS[settings.loss_type], settings.coefficients()
    scores = logps - ref_logps if variant.needs_reference and ref_logps is not None else logps
    if c.length_normalized:
        scores = scores / lengths
    sft = -logps[:, 0] / lengths[:, 0]
    return variant.loss(scores[:, 0], scores[:, 1], c) + c.sft_weight * sft, c.beta * scores


# --- Pairs through a model ----------------------------------------------------------------------------------------


def pair_logps(
    params: Params, config: ModelConfig, compute: ComputeConfig, batch: Batch, key: jax.Array | None = None
) -> tuple[jax.Array, ModelOutput]:
    """Log-probabilities of both answers of each pair, by one forward pass.

    Args:
        params: model parameters.
        config: the model's shape.
        compute: dtype, attention implementation, rematerialisation.
        batch: `tokens targets weights segment_ids positions`, each `[B, 2, T]`, chosen before rejected; the weights
            mark the tokens of the answers.
        key: turns dropout on.

    Returns:
        `[B, 2]` float32 sums over the tokens of the answers, and what the model returned for `[2B, T]`.
    """
    pairs, _, length = batch["tokens"].shape
    flat = {name: batch[name].reshape(2 * pairs, length) for name in ("tokens", "targets", "positions", "segment_ids")}
    output = forward_hidden(
        params,
        config,
        flat["tokens"],
        positions=flat["positions"],
        segment_ids=flat["segment_ids"],
        dropout_key=key,
        branched=False,
        compute=compute,
    )
    logprobs = token_logprobs(params, config, output.hidden, flat["targets"]).reshape(pairs, 2, length)
    return (logprobs * batch["weights"]).sum(-1), output


def pair_scores(
    params: Params, config: ModelConfig, compute: ComputeConfig, batch: Batch, key: jax.Array | None = None
) -> tuple[jax.Array, ModelOutput]:
    """Rewards of both answers of each pair, by one forward pass over the T + 1 tokens of each whole conversation.

    Args:
        params: of a reward model.
        config: its shape.
        compute: dtype, attention implementation, rematerialisation.
        batch: `tokens targets segment_ids`, each `[B, 2, T]`; targets hold the last token, which is no input elsewhere.
        key: turns dropout on.

    Returns:
        `[B, 2]` float32, what `reward_scores` gives for each conversation alone, arbitrary where a pair is padding; and
        what the model returned for `[2B, T + 1]`.
    """
    tokens, segment_ids = whole_documents(batch)
    pairs, _, length = tokens.shape
    flat = segment_ids.reshape(2 * pairs, length)
    output = forward_hidden(
        params, config, tokens.reshape(flat.shape), segment_ids=flat, dropout_key=key, branched=False, compute=compute
    )
    return read_scores(params, output.hidden, flat).reshape(pairs, 2), output


def whole_documents(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Join inputs and targets `[..., T]` of one document a row to its tokens `[..., T + 1]`, with their segment ids."""
    first = batch["segment_ids"][..., :1]
    return (
        jnp.concatenate([batch["tokens"][..., :1], batch["targets"]], axis=-1),
        jnp.concatenate([first, batch["segment_ids"]], axis=-1),
    )


def preference_loss(config: ModelConfig, compute: ComputeConfig, settings: PreferenceConfig) -> LossFn:
    """Make the loss of a preference stage: the variant's loss, plus SFT on chosen answers, plus the router's loss.

    The batch is that of `pair_logps`, with `ref_logps` `[B, 2]` when they are cached; otherwise `frozen` holds the
    reference's parameters. Every term is a mean per pair, and the weight counts pairs: one of zeros is padding.

    Metrics: `loss` (router's part left out), `sft_loss`, `router_loss`; `rewards_chosen`, `rewards_rejected` (β times
    the score), their difference `margin`, and `accuracy`, how often it is positive; `logps_chosen`, `logps_rejected`;
    `kl`, log π_ref - log π averaged over all answers: the divergence of the policy from the reference, KL(π_ref ‖ π) in
    nats per answer, as far as the answers are ones that the reference would give, which is DPO's own assumption.
    """

    def loss_fn(
        params: Params, frozen: Any, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        lengths = batch["weights"].sum(-1)  # [B, 2]
        real = (lengths > 0).all(-1)
        lengths = jnp.maximum(lengths, 1.0)
        logps, output = pair_logps(params, config, compute, batch, key)
        logps = jnp.where(real[:, None], logps, -1.0)  # an answer that is certain would have infinite odds
        ref_logps = _reference(frozen, config, compute, batch) if settings.needs_reference else None
        loss, rewards = pair_losses(settings, logps, ref_logps, lengths)
        per_pair = {
            "loss": loss,
            "rewards_chosen": rewards[:, 0],
            "rewards_rejected": rewards[:, 1],
            "margin": rewards[:, 0] - rewards[:, 1],
            "accuracy": (rewards[:, 0] > rewards[:, 1]).astype(jnp.float32),
            "logps_chosen": logps[:, 0],
            "logps_rejected": logps[:, 1],
        }
        if ref_logps is not None:
            per_pair["kl"] = (ref_logps - logps).mean(-1)
        if settings.coefficients().sft_weight:
            per_pair["sft_loss"] = -logps[:, 0] / lengths[:, 0]
        return sum_pairs(loss, per_pair, real, output, batch["segment_ids"])

    return loss_fn


def sum_pairs(
    loss: jax.Array, per_pair: dict[str, jax.Array], real: jax.Array, output: ModelOutput, segment_ids: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
    """Sum the losses of pairs, the router's included if there is one: what a `losses.LossFn` returns.

    Args:
        loss: `[B]`.
        per_pair: further values `[B]` to log.
        real: `[B]` bools, False for padding.
        output: what the model returned for `[2B, T]`.
        segment_ids: `[B, 2, T]`, of the tokens that it read.
    """
    if output.router_loss is not None:
        per_pair = per_pair | {"router_loss": _per_pair(output.router_loss, segment_ids)}
        loss = loss + per_pair["router_loss"]
    keep, weight = real.astype(jnp.float32), real.sum(dtype=jnp.float32)
    metrics: Metrics = {name: ((value * keep).sum(), weight) for name, value in per_pair.items()}
    return (loss * keep).sum(), (weight, metrics)


def _reference(frozen: Any, config: ModelConfig, compute: ComputeConfig, batch: Batch) -> jax.Array:
    """Reference log-probabilities `[B, 2]`: from the batch, or else from the reference's parameters."""
    if "ref_logps" in batch:
        return batch["ref_logps"]
    return jax.lax.stop_gradient(pair_logps(frozen, config, compute, batch)[0])


def _per_pair(values: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Mean `[B]` of `[2B, T]` values over the real tokens of each pair."""
    real = (segment_ids > 0).astype(values.dtype)
    return (values.reshape(real.shape) * real).sum((1, 2)) / jnp.maximum(real.sum((1, 2)), 1.0)


def reference_logps(
    params: Params, config: ModelConfig, compute: ComputeConfig, rows: Rows, batch_size: int, mesh: Mesh
) -> np.ndarray:
    """Log-probabilities of both answers of every pair under a model that stays as it is.

    Args:
        params: of the reference, on the mesh.
        config: its shape.
        compute: as in training, so that a policy that equals the reference has a log-ratio of zero.
        rows: pairs.
        batch_size: pairs per forward pass, a multiple of the mesh's data parallelism.
        mesh: the device mesh.

    Returns:
        `[N, 2]` float32, chosen before rejected.
    """
    return _of_all_pairs(pair_logps, params, config, compute, rows, batch_size, mesh)


def reward_pairs(
    params: Params, config: ModelConfig, compute: ComputeConfig, rows: Rows, batch_size: int, mesh: Mesh
) -> np.ndarray:
    """Rewards of both answers of every pair.

    Args:
        params: of a reward model, on the mesh.
        config: its shape.
        compute: dtype and attention implementation.
        rows: pairs.
        batch_size: pairs per forward pass, a multiple of the mesh's data parallelism.
        mesh: the device mesh.

    Returns:
        `[N, 2]` float32, chosen before rejected.
    """
    return _of_all_pairs(pair_scores, params, config, compute, rows, batch_size, mesh)


def _of_all_pairs(
    of_batch: Callable[..., tuple[jax.Array, ModelOutput]],
    params: Params,
    config: ModelConfig,
    compute: ComputeConfig,
    rows: Rows,
    batch_size: int,
    mesh: Mesh,
) -> np.ndarray:
    """Ask `pair_logps` or `pair_scores` about all rows, batch by batch."""

    def values(params: Params, batch: Batch) -> jax.Array:
        return of_batch(params, config, compute, batch)[0]

    run = jax.jit(values, out_shardings=NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        found = [np.asarray(run(params, put_batch(b, mesh)))[:batch_size] for b in eval_batches(rows, batch_size)]
    return np.concatenate(found)[: len(rows)]
