"""Our side of every comparison, without PyTorch: a loaded model and stored inputs go in, numpy arrays come out.

Shared by the golden tests and the live ones. Batches are dicts of `tokens segment_ids positions` (and `targets
weights`), each `[B, T]`.
"""

import jax
import numpy as np

import minillm_jax
from minillm_jax.cache import init_cache
from minillm_jax.config import ComputeConfig, OptimConfig
from minillm_jax.hf_tensors import to_hf
from minillm_jax.losses import language_model_loss
from minillm_jax.model import forward, forward_hidden, unembed
from minillm_jax.optim import make_optimizer, make_schedule
from minillm_jax.trainer import init_state, make_train_step

PROMPT = 7
"""Tokens of a prompt in the cached comparison, as in `reference.PROMPT`."""


def error(actual, expected):
    """Largest absolute error over the largest absolute value, the scale on which a tensor's rounding happens."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30))


def logits(lm, batch):
    """Logits `[B, T, V]`."""
    return np.asarray(
        forward(lm.params, lm.config, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
    )


def logits_error(lm, batch, expected):
    """Error of the logits of all tokens that are not padding."""
    real = batch["segment_ids"] > 0
    return error(logits(lm, batch)[real], expected[real])


_hidden = jax.jit(forward_hidden, static_argnames=("config", "compute"))


def cached_logits(lm, batch):
    """Logits of a prompt and of one token at a time after it, through the key-value cache."""
    rows, width = batch["tokens"].shape
    cache, out, start = init_cache(lm.config, rows, 32), [], 0
    for end in range(PROMPT, width + 1):
        step = (slice(None), slice(start, end))
        output = _hidden(
            lm.params,
            lm.config,
            batch["tokens"][step],
            positions=batch["positions"][step],
            segment_ids=batch["segment_ids"][step],
            cache=cache,
        )
        cache, start = output.cache, end
        out.append(unembed(lm.params, lm.config, output.hidden))
    return np.concatenate(out, axis=1)


def greedy(lm, prompt, new_tokens):
    """The most likely continuation of a prompt."""
    sampling = minillm_jax.SamplingParams(max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    return minillm_jax.generate(lm, [prompt.tolist()], sampling)[0].token_ids


def loss_and_gradient(lm, batch):
    """Mean loss of a step, auxiliary loss included, and its gradient by Hugging Face tensor name."""
    value_and_grad = jax.jit(jax.value_and_grad(language_model_loss(lm.config, ComputeConfig()), has_aux=True))
    (total, (weight, _)), gradient = value_and_grad(lm.params, None, batch, None)
    weight = float(weight)
    return float(total) / weight, {name: tensor / weight for name, tensor in to_hf(gradient, lm.config)}


def gradient_errors(lm, batch, expected):
    """Error of each tensor of the gradient."""
    gradient = loss_and_gradient(lm, batch)[1]
    assert gradient.keys() == expected.keys()
    return {name: error(gradient[name], tensor) for name, tensor in expected.items()}


def auxiliary_loss(lm, batch):
    """Auxiliary loss of a batch before its coefficient."""
    output = _hidden(
        lm.params, lm.config, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"]
    )
    real = batch["segment_ids"] > 0
    return np.asarray(output.router_loss)[real].mean() / lm.config.router_aux_loss_coef


def train(lm, batches, settings):
    """Losses and gradient norms of a training run, one of each a step."""
    optim, steps = OptimConfig(**settings), len(batches)
    optimizer = make_optimizer(optim, steps, lm.params)
    loss_fn = language_model_loss(lm.config, ComputeConfig())
    step = jax.jit(make_train_step(loss_fn, optimizer, make_schedule(optim, steps)))
    state, losses, norms = init_state(lm.params, optimizer, seed=0), [], []
    for batch in batches:
        state, metrics = step(state, None, batch)
        losses.append(float(metrics["loss"]) + float(metrics.get("router_loss", 0.0)))
        norms.append(float(metrics["grad_norm"]))
    return np.asarray(losses), np.asarray(norms)
