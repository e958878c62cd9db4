"""The policy's side of PPO and GRPO: what a model says about drawn tokens, and what the loss makes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from minillm_jax.config import ComputeConfig, ConfigError, ModelConfig, RunConfig
from minillm_jax.losses import Batch, Metrics, token_logprobs_and_entropy
from minillm_jax.model import ModelOutput, Params, forward_hidden, param_axes
from minillm_jax.pretrained import load_params
from minillm_jax.sharding import tree_shardings
from rl.layout import by_completion, on_grid
from rl.losses import Objective, aggregate, policy_loss


def read_tokens(
    params: Params,
    config: ModelConfig,
    compute: ComputeConfig,
    batch: Batch,
    temperature: float,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, ModelOutput]:
    """Read drawn tokens with a policy.

    Args:
        params: of the policy.
        config: its shape.
        compute: dtype, attention implementation, rematerialisation.
        batch: of a rollout, see `layout.to_batch`.
        temperature: that the tokens were drawn at.
        key: turns dropout on.

    Returns:
        Log-probabilities of the targets and entropies of their distributions, `[B, C]` float32, both at the
        temperature; and what `read_states` returns.
    """
    output = read_states(params, config, compute, batch, key)
    # Logits are linear in the hidden states, so dividing these divides those.
    flat = token_logprobs_and_entropy(params, config, output.hidden / temperature, batch["targets"])
    logprobs, entropy = (on_grid(values, batch["grid"]) for values in flat)
    return logprobs, entropy, output


def read_states(
    params: Params, config: ModelConfig, compute: ComputeConfig, batch: Batch, key: jax.Array | None = None
) -> ModelOutput:
    """Read prompts and completions; keep hidden states `[R, S, D]` and router losses `[R, S]` that tokens came from."""
    output = forward_hidden(
        params,
        config,
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        dropout_key=key,
        compute=compute,
    )
    states = batch["states"]
    hidden = jnp.take_along_axis(output.hidden, states[..., None], axis=1)
    router_loss = None if output.router_loss is None else jnp.take_along_axis(output.router_loss, states, axis=1)
    return dataclasses.replace(output, hidden=hidden, router_loss=router_loss)


def policy_terms(
    objective: Objective,
    logprobs: jax.Array,
    entropy: jax.Array,
    output: ModelOutput,
    batch: Batch,
    max_new_tokens: int,
) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
    """Loss sum, weight and metrics of a policy: `losses.policy_loss`, and the router's loss with the same weights.

    Args:
        objective: what is optimised.
        logprobs: `[B, C]` of the targets.
        entropy: `[B, C]`.
        output: what the model returned.
        batch: `weights old_logprobs advantages`, `[R, K * G, C]` each, and `ref_logprobs` where there is a reference.
        max_new_tokens: longest completion.
    """
    mask = by_completion(batch["weights"])
    loss, (weight, metrics) = policy_loss(
        objective,
        logprobs,
        by_completion(batch["old_logprobs"]),
        by_completion(batch["advantages"]),
        mask,
        ref_logprobs=by_completion(batch["ref_logprobs"]) if "ref_logprobs" in batch else None,
        entropy=entropy,
        max_new_tokens=max_new_tokens,
    )
    if output.router_loss is not None:
        per_token = on_grid(output.router_loss, batch["grid"])
        router_loss, router_weight = aggregate(objective.aggregation, per_token, mask, max_new_tokens)
        loss, metrics = loss + router_loss, metrics | {"router_loss": (router_loss, router_weight)}
    return loss, (weight, metrics)


def with_loss(
    terms: tuple[jax.Array, tuple[jax.Array, Metrics]],
) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
    """Add the loss itself to the metrics."""
    loss, (weight, metrics) = terms
    return loss, (weight, {"loss": (loss, weight), **metrics})


def reference_policy(
    model_path: str, config: ModelConfig, kl_coef: float
) -> Callable[[Mesh, Params | None], Params | None]:
    """Make the function that loads the reference onto a mesh: the model that training starts from.

    It returns an adapter's base as it is, which is held once; and nothing when the divergence from it costs nothing.
    """

    def load(mesh: Mesh, base: Params | None) -> Params | None:
        if not kl_coef:
            return None
        if base is not None:
            return base
        return load_params(model_path, dtype=jnp.float32, shardings=tree_shardings(mesh, param_axes(config)))[1]

    return load


def require_model(run: RunConfig) -> str:
    """Return `--model_path`, without which there is nothing to reinforce.

    Raises:
        ConfigError: it was not given.
    """
    if run.model_path is None:
        raise ConfigError("--model_path is needed: reinforcement starts from a model that can already answer a little")
    return run.model_path
