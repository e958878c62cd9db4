"""Mixture of experts against plain loops over experts and tokens."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax import moe
from minillm_jax.config import ModelConfig
from minillm_jax.matmul import grouped_matmul, matmul

CONFIG = ModelConfig(hidden_size=8, num_attention_heads=2, num_key_value_heads=1, use_moe=True, num_experts=4)


def dense_loop(x, w, sizes):
    """The definition of the grouped product: one slice of rows after another."""
    starts = np.cumsum([0, *sizes])
    return jnp.concatenate([x[a:b] @ w[e] for e, (a, b) in enumerate(itertools.pairwise(starts))])


@pytest.mark.parametrize("sizes", [[130, 1, 0, 259], [0, 0, 5, 0], [128, 128, 0, 0], [1, 1, 1, 1]])
@pytest.mark.parametrize("product", [grouped_matmul, jax.lax.ragged_dot], ids=["blocked", "ragged_dot"])
def test_grouped_matmul_and_its_gradients_equal_a_loop(sizes, product):
    rows = sum(sizes)
    x, w, g = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(rows, 6), (4, 6, 5), (rows, 5)]))
    grouped = lambda x, w: product(x, w, jnp.asarray(sizes, jnp.int32))
    ours, pull = jax.vjp(grouped, x, w)
    theirs, pull_loop = jax.vjp(lambda x, w: dense_loop(x, w, sizes), x, w)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(pull(g), pull_loop(g), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def every_expert_on_every_token(x, gate, up, down, routing):
    """All experts see all tokens; unchosen ones get weight zero."""
    outputs = jnp.stack([(jax.nn.silu(x @ g) * (x @ u)) @ d for g, u, d in zip(gate, up, down, strict=True)], 1)
    weights = (
        jnp.zeros((x.shape[0], gate.shape[0])).at[jnp.arange(x.shape[0])[:, None], routing.experts].add(routing.weights)
    )
    return jnp.einsum("med,me->md", outputs, weights)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_moe_mlp_and_its_gradients_equal_a_dense_loop(k):
    config = dataclasses.replace(CONFIG, num_experts_per_tok=k)
    x, gate, up, down, logits = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(50, 8), (4, 8, 12), (4, 8, 12), (4, 12, 8), (50, 4)])
    )

    def run(function):
        def scalar(x, gate, up, down, logits):
            return (function(x, gate, up, down, moe.route(logits, config)) ** 2).sum()

        return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2, 3, 4)))(x, gate, up, down, logits)

    (ours, ours_grads), (loop, loop_grads) = run(moe.moe_mlp), run(every_expert_on_every_token)
    np.testing.assert_allclose(ours, loop, rtol=1e-5)
    largest = max(float(jnp.abs(g).max()) for g in loop_grads)
    for a, b in zip(ours_grads, loop_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * largest)


def test_routing_takes_the_best_experts_with_weights_that_sum_to_one():
    logits = jnp.log(jnp.asarray([[0.1, 0.2, 0.3, 0.4]]))
    routing = moe.route(logits, CONFIG)
    assert routing.experts.tolist() == [[3, 2]]
    np.testing.assert_allclose(routing.weights, [[4 / 7, 3 / 7]], rtol=1e-6)
    plain = moe.route(logits, dataclasses.replace(CONFIG, norm_topk_prob=False))
    np.testing.assert_allclose(plain.weights, [[0.4, 0.3]], rtol=1e-6)
    sigmoid = moe.route(logits, dataclasses.replace(CONFIG, norm_topk_prob=False, scoring_func="sigmoid"))
    np.testing.assert_allclose(sigmoid.weights, [[0.4 / 1.4, 0.3 / 1.3]], rtol=1e-6)


def balance_of(routing, tokens, experts, k):
    """E * sum_e f_e P_e over the given tokens, spelled out."""
    total = 0.0
    for e in range(experts):
        share = np.mean([[int(routing.experts[t, j]) == e for j in range(k)] for t in tokens])
        total += experts * share * np.mean([float(routing.scores[t, e]) for t in tokens])
    return total


def test_auxiliary_loss_is_that_of_each_segment_or_of_the_batch():
    config = dataclasses.replace(CONFIG, router_aux_loss_coef=1.0)
    segment_ids = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]])
    routing = moe.route(jax.random.normal(jax.random.key(3), (12, 4)) * 3, config)
    groups = [[0, 1, 2], [3, 4], [6, 7, 8, 9]]
    expected = np.zeros(12)
    for group in groups:
        expected[group] = balance_of(routing, group, 4, 2)
    loss, load, _ = moe.auxiliary_loss(routing, segment_ids, config)
    np.testing.assert_allclose(loss.reshape(-1), expected, rtol=1e-5)
    real = [t for group in groups for t in group]
    whole, *_ = moe.auxiliary_loss(routing, segment_ids, dataclasses.replace(config, router_aux_loss_scope="batch"))
    np.testing.assert_allclose(whole.reshape(-1)[jnp.asarray(real)], balance_of(routing, real, 4, 2), rtol=1e-5)
    assert float(load.sum()) == pytest.approx(1.0)
    np.testing.assert_allclose(
        load, [np.mean([[int(e) == i for e in routing.experts[t]] for t in real]) for i in range(4)]
    )


def test_balancing_over_the_model_pools_layers_and_counts_assignments():
    config = dataclasses.replace(CONFIG, router_aux_loss_coef=0.5, router_aux_loss_scope="model")
    segment_ids = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]])
    real = np.flatnonzero(segment_ids)
    layers = [moe.route(jax.random.normal(jax.random.key(i), (12, 4)) * 3, config) for i in range(3)]
    parts = [moe.auxiliary_loss(routing, segment_ids, config) for routing in layers]
    assert not any(loss.any() for loss, _, _ in parts)
    load, scores = (jnp.stack([part[i] for part in parts]) for i in (1, 2))
    loss = moe.model_balancing_loss(load, scores, segment_ids, config)
    counts = [np.mean([(np.asarray(r.experts)[real] == e).sum(-1) for r in layers]) for e in range(4)]
    means = np.mean([np.asarray(r.scores)[real].mean(0) for r in layers], axis=0)
    np.testing.assert_allclose(loss, 0.5 * 4 * np.dot(counts, means) * (segment_ids > 0), rtol=1e-5)


def test_z_loss_is_the_squared_log_partition():
    config = dataclasses.replace(CONFIG, router_aux_loss_coef=0.0, router_z_loss_coef=0.5)
    logits = jnp.log(jnp.asarray([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]]))
    loss, *_ = moe.auxiliary_loss(moe.route(logits, config), jnp.asarray([[1, 0]]), config)
    np.testing.assert_allclose(loss, [[0.5 * np.log(10) ** 2, 0.0]], rtol=1e-5)


def test_even_routing_has_the_smallest_balance_loss():
    config = dataclasses.replace(CONFIG, router_aux_loss_coef=1.0, num_experts_per_tok=1)
    even = moe.route(10 * jnp.tile(jnp.eye(4), (2, 1)), config)
    collapsed = moe.route(10 * jnp.tile(jnp.eye(4)[:1], (8, 1)), config)
    ones = jnp.ones((1, 8), jnp.int32)
    assert moe.auxiliary_loss(even, ones, config)[0][0, 0] == pytest.approx(1.0, abs=1e-3)
    assert moe.auxiliary_loss(collapsed, ones, config)[0][0, 0] == pytest.approx(4.0, abs=1e-2)


@pytest.mark.parametrize(("width", "out"), [(6, 9), (9, 6)])
def test_matmul_has_the_gradients_of_a_product(width, out):
    x, w, g = (
        jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 5, width), (width, out), (2, 5, out)])
    )
    ours, pull = jax.vjp(matmul, x, w)
    theirs, pull_plain = jax.vjp(jnp.matmul, x, w)
    for a, b in zip((ours, *pull(g)), (theirs, *pull_plain(g)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
