"""The training step: exact accumulation, skipped steps, purity, learning; and the loss it minimises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax import losses
from minillm_jax.config import ComputeConfig, ModelConfig, OptimConfig
from minillm_jax.losses import language_model_loss, logprobs_from_logits, masked_mean, token_logprobs
from minillm_jax.model import forward, init_params
from minillm_jax.optim import global_norm, make_optimizer, make_schedule
from minillm_jax.trainer import accumulate_gradients, init_state, make_train_step

TINY = ModelConfig(
    vocab_size=53,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=24,
)
MOE = dataclasses.replace(TINY, use_moe=True, num_experts=3, moe_intermediate_size=16)
KEY = jax.random.key(0)
draw = jax.jit(init_params, static_argnums=0)
accumulate = jax.jit(accumulate_gradients, static_argnums=(0, 5))


def uneven_batch(rows=8, length=24, seed=0):
    """Rows of two segments and padding, whose loss masks differ wildly in size."""
    rng = np.random.default_rng(seed)
    segment_ids = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int32)
    for row in range(rows):
        first, second = rng.integers(2, length // 2, 2)
        segment_ids[row, :first], segment_ids[row, first : first + second] = 1, 2
        positions[row, :first], positions[row, first : first + second] = np.arange(first), np.arange(second)
    keep = rng.random((rows, length)) < np.linspace(0.05, 1, rows)[:, None]
    tokens = rng.integers(0, TINY.vocab_size, (rows, length + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": (keep & (segment_ids > 0)).astype(np.float32),
        "segment_ids": segment_ids,
        "positions": positions,
    }


@pytest.mark.parametrize("config", [TINY, MOE], ids=["dense", "moe"])
def test_micro_batches_equal_one_batch_with_uneven_masks(config):
    params = draw(config, KEY)
    loss_fn = language_model_loss(config, ComputeConfig())
    whole, weight, metrics = accumulate(loss_fn, params, None, uneven_batch(), KEY, 1)
    for parts in (2, 8):
        grads, part_weight, part_metrics = accumulate(loss_fn, params, None, uneven_batch(), KEY, parts)
        assert float(part_weight) == float(weight)
        np.testing.assert_allclose(part_metrics["loss"][0], metrics["loss"][0], rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, whole)


def make(config, optim=OptimConfig(learning_rate=1e-2), micro_batches=1):
    params = draw(config, KEY)
    optimizer = make_optimizer(optim, 100, params)
    step = make_train_step(
        language_model_loss(config, ComputeConfig()), optimizer, make_schedule(optim, 100), micro_batches
    )
    return init_state(params, optimizer, seed=3), jax.jit(step)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_batch_is_learnt_by_heart(optimizer):
    state, step = make(TINY, OptimConfig(optimizer=optimizer, learning_rate=3e-2, warmup_ratio=0.0))
    batch = uneven_batch()
    first = None
    for _ in range(40):
        state, metrics = step(state, None, batch)
        first = float(metrics["loss"]) if first is None else first
    assert first == pytest.approx(np.log(TINY.vocab_size), abs=0.1)
    assert float(metrics["loss"]) < 0.5 * first
    assert int(state["step"]) == 40


def test_the_step_is_a_pure_function_of_its_arguments():
    state, step = make(dataclasses.replace(TINY, dropout=0.3))
    results = [step(state, None, uneven_batch()) for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, results[0][1], results[1][1])
    later = step(dict(state, step=state["step"] + 1), None, uneven_batch())[1]
    assert float(later["loss"]) != float(results[0][1]["loss"])  # dropout draws anew each step


def test_a_step_without_finite_gradient_changes_nothing_and_is_counted():
    state, step = make(TINY)
    bad = uneven_batch()
    bad["weights"] = np.full_like(bad["weights"], np.nan)
    after, metrics = step(state, None, bad)
    assert float(metrics["skipped"]) == 1.0
    jax.tree.map(np.testing.assert_array_equal, after["params"], state["params"])
    jax.tree.map(np.testing.assert_array_equal, after["opt_state"], state["opt_state"])
    assert int(after["step"]) == 1
    assert float(step(after, None, uneven_batch())[1]["skipped"]) == 0.0


def test_gradient_norm_is_reported_before_clipping():
    batch = uneven_batch()
    state, step = make(TINY, OptimConfig(grad_clip=1e-4))
    reported = float(step(state, None, batch)[1]["grad_norm"])
    loss_fn = language_model_loss(TINY, ComputeConfig())
    grads, weight, _ = accumulate(loss_fn, state["params"], None, batch, KEY, 1)
    assert reported == pytest.approx(float(global_norm(grads) / weight), rel=1e-5)
    assert reported > 1e-3


def test_token_logprobs_are_those_of_the_softmax(monkeypatch):
    params = draw(TINY, KEY)
    batch = uneven_batch(rows=3, length=10)
    logits = forward(params, TINY, batch["tokens"])
    expected = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), batch["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(logprobs_from_logits(logits, batch["targets"]), expected, rtol=1e-5, atol=1e-6)


def test_chunked_cross_entropy_equals_whole(monkeypatch):
    params = draw(TINY, KEY)
    batch = uneven_batch(rows=3, length=10)
    hidden = jax.random.normal(KEY, (3, 10, TINY.hidden_size))

    def total(params, hidden):
        return (token_logprobs(params, TINY, hidden, batch["targets"]) * batch["weights"]).sum()

    whole = jax.value_and_grad(total, argnums=(0, 1))(params, hidden)
    monkeypatch.setattr(losses, "LOGITS_BYTES", 7 * TINY.vocab_size * 4)
    chunked = jax.value_and_grad(total, argnums=(0, 1))(params, hidden)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), chunked, whole)


def test_masked_mean_of_nothing_is_zero():
    assert float(masked_mean(jnp.asarray([1.0, 2.0, 9.0]), jnp.asarray([1.0, 3.0, 0.0]))) == 1.75
    assert float(masked_mean(jnp.asarray([1.0, 2.0]), jnp.zeros(2))) == 0.0
