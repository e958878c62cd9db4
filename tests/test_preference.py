"""Preference losses: TRL's numbers, ln 2, symmetry, and sums that do not care how pairs are split or padded."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm_jax.config import ComputeConfig, ConfigError, ModelConfig
from minillm_jax.model import forward, init_params
from minillm_jax.preference import VARIANTS, PreferenceConfig, pair_logps, pair_losses, preference_loss, reference_logps
from minillm_jax.sharding import make_mesh
from minillm_jax.trainer import accumulate_gradients
from train.dpo import dpo_loss

GOLDEN = json.loads((Path(__file__).parent / "golden" / "dpo" / "losses.json").read_text())
TINY = ModelConfig(
    vocab_size=53,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=24,
)
MOE = dataclasses.replace(TINY, use_moe=True, num_experts=3, moe_intermediate_size=16, router_aux_loss_coef=0.5)
COMPUTE = ComputeConfig()
KEY = jax.random.key(0)
draw = jax.jit(init_params, static_argnums=0)
accumulate = jax.jit(accumulate_gradients, static_argnums=(0, 5))
logps_of = jax.jit(pair_logps, static_argnums=(1, 2))

VECTORS = st.lists(st.floats(-80, 0, width=32), min_size=3, max_size=3).map(lambda v: np.asarray(v, np.float32))
BETAS = st.floats(0.015625, 10, width=32)


def pairs(count=4, length=16, seed=0):
    """Pairs of a common prompt and two answers of different lengths."""
    rng = np.random.default_rng(seed)
    ends = rng.integers(6, length, (count, 2, 1))
    real = np.arange(length) < ends
    tokens = rng.integers(1, TINY.vocab_size, (count, 2, length + 1)).astype(np.int32)
    tokens[:, 1, :5] = tokens[:, 0, :5]
    return {
        "tokens": tokens[..., :-1] * real,
        "targets": tokens[..., 1:] * real,
        "weights": (real & (np.arange(length) >= 4)).astype(np.float32),
        "segment_ids": real.astype(np.int32),
        "positions": np.arange(length, dtype=np.int32) * real,
    }


def with_reference(batch, seed=1):
    return batch | {"ref_logps": np.random.default_rng(seed).normal(-40, 5, (len(batch["tokens"]), 2)).astype("f4")}


def means(metrics):
    return {name: float(total / weight) for name, (total, weight) in metrics.items()}


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: "-".join(map(str, case["settings"].values())))
def test_losses_and_gradients_equal_trl(case):
    data = {name: np.asarray(value, np.float32) for name, value in GOLDEN["data"][case["data"]].items()}
    mask = data["mask"]

    def mean_loss(logprobs):
        logps = (logprobs * mask).sum(-1)
        return pair_losses(PreferenceConfig(**case["settings"]), logps, data["ref_logps"], mask.sum(-1))[0].mean()

    loss, gradient = jax.value_and_grad(mean_loss)(data["logprobs"])
    np.testing.assert_allclose(loss, case["loss"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, case["gradient"], rtol=1e-5, atol=1e-5)


def test_every_variant_has_a_golden_case():
    assert {case["settings"]["loss_type"] for case in GOLDEN["cases"]} == set(VARIANTS)


def test_dpo_loss_is_the_papers_formula():
    logps = [np.asarray(v, np.float32) for v in ([-10.0, -3.0], [-12.0, -2.0], [-11.0, -3.5], [-11.5, -1.0])]
    losses, chosen_rewards, rejected_rewards = dpo_loss(*logps, 0.1, 0.0)
    np.testing.assert_allclose(chosen_rewards, [0.1, 0.05], rtol=1e-5)
    np.testing.assert_allclose(rejected_rewards, [-0.05, -0.1], rtol=1e-5)
    np.testing.assert_allclose(losses, np.log1p(np.exp([-0.15, -0.15])), rtol=1e-5)
    assert losses.shape == chosen_rewards.shape == rejected_rewards.shape == (2,)


@given(VECTORS, VECTORS, BETAS, st.floats(0, 0.4375, width=32))
def test_dpo_of_a_policy_that_is_its_reference_is_ln_2(chosen, rejected, beta, smoothing):
    losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, chosen, rejected, beta, smoothing)
    np.testing.assert_allclose(losses, math.log(2), rtol=1e-6)
    assert not np.any(chosen_rewards) and not np.any(rejected_rewards)


@given(VECTORS, VECTORS, VECTORS, VECTORS, BETAS, st.floats(0, 0.4375, width=32))
def test_smoothing_is_a_mixture_with_the_swapped_pair(pc, pr, rc, rr, beta, smoothing):
    straight, swapped = dpo_loss(pc, pr, rc, rr, beta)[0], dpo_loss(pr, pc, rr, rc, beta)[0]
    smoothed = dpo_loss(pc, pr, rc, rr, beta, smoothing)[0]
    np.testing.assert_allclose(smoothed, (1 - smoothing) * straight + smoothing * swapped, rtol=1e-4, atol=1e-4)


@given(VECTORS, VECTORS, VECTORS, VECTORS, st.floats(-20, 20, width=32))
def test_what_both_answers_share_does_not_matter_to_dpo(pc, pr, rc, rr, shift):
    np.testing.assert_allclose(
        dpo_loss(pc + shift, pr + shift, rc, rr)[0], dpo_loss(pc, pr, rc, rr)[0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "simpo", "orpo"])
@settings(max_examples=20)
@given(st.lists(st.floats(-60, -0.0625, width=32), min_size=4, max_size=4), st.integers(1, 30), st.integers(1, 30))
def test_no_step_down_a_loss_makes_the_rejected_answer_likelier(loss_type, values, chosen_length, rejected_length):
    logps, ref_logps = np.asarray(values, np.float32).reshape(2, 1, 2)
    lengths = np.asarray([[chosen_length, rejected_length]], np.float32)
    config = PreferenceConfig(loss_type=loss_type, sft_weight=0.0)
    gradient = jax.grad(lambda x: pair_losses(config, x, ref_logps, lengths)[0].sum())(logps)
    assert np.all(np.isfinite(gradient))
    assert gradient[0, 0] <= 0 <= gradient[0, 1]


@given(st.floats(-3, 3, width=32), st.floats(0.125, 2, width=32))
def test_ipo_is_least_at_a_margin_of_half_the_inverse_of_beta(offset, beta):
    config = PreferenceConfig(loss_type="ipo", beta=beta, length_normalized=False)
    logps = np.asarray([[0.5 / beta + offset - 40, -40.0]], np.float32)
    loss, _ = pair_losses(config, logps, np.full((1, 2), -40.0, np.float32), np.ones((1, 2)))
    np.testing.assert_allclose(loss, [offset**2], atol=1e-3)


def test_log_probabilities_are_sums_over_answers_and_follow_the_models_logits():
    params, batch = draw(TINY, KEY), pairs()
    logps, _ = logps_of(params, TINY, COMPUTE, batch)
    for pair in range(4):
        for side in range(2):
            row = {name: array[pair, side][None] for name, array in batch.items()}
            logits = forward(params, TINY, row["tokens"], row["positions"], row["segment_ids"])
            logprobs = np.take_along_axis(jax.nn.log_softmax(logits)[0], row["targets"][0][:, None], axis=-1)[:, 0]
            np.testing.assert_allclose(logps[pair, side], (logprobs * row["weights"][0]).sum(), rtol=1e-5)


@pytest.mark.parametrize("config", [TINY, MOE], ids=["dense", "moe"])
def test_training_starts_at_ln_2_and_cached_equals_online(config):
    params, batch = draw(config, KEY), pairs()
    cached = batch | {"ref_logps": np.asarray(logps_of(params, config, COMPUTE, batch)[0])}
    for settings_, frozen, rows in (
        (PreferenceConfig(), None, cached),
        (PreferenceConfig(reference="online"), params, batch),
    ):
        loss_fn = preference_loss(config, COMPUTE, settings_)
        _, weight, metrics = accumulate(loss_fn, params, frozen, rows, KEY, 1)
        found = means(metrics)
        assert float(weight) == 4
        assert found["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert found["kl"] == found["margin"] == pytest.approx(0, abs=1e-5)
    moved = jax.tree.map(lambda x: x * 1.1, params)
    loss_fn = preference_loss(config, COMPUTE, PreferenceConfig())
    ours, theirs = accumulate(loss_fn, moved, None, cached, KEY, 1), accumulate(loss_fn, moved, params, batch, KEY, 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)


@pytest.mark.parametrize("loss_type", ["sigmoid", "orpo"])
def test_padding_pairs_and_micro_batches_change_nothing(loss_type):
    params, batch = draw(TINY, KEY), with_reference(pairs())
    loss_fn = preference_loss(TINY, COMPUTE, PreferenceConfig(loss_type=loss_type, sft_weight=0.3))
    whole = accumulate(loss_fn, params, None, batch, KEY, 1)
    padded = {name: np.concatenate([array, np.zeros_like(array)]) for name, array in batch.items()}
    longer = {
        name: np.pad(array, ((0, 0), (0, 0), (0, 8))) if array.ndim == 3 else array for name, array in batch.items()
    }
    for other in (
        accumulate(loss_fn, params, None, padded, KEY, 1),
        accumulate(loss_fn, params, None, longer, KEY, 1),
        accumulate(loss_fn, params, None, batch, KEY, 2),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), other, whole)


def test_the_routers_loss_is_added_and_averaged_over_real_tokens():
    params, batch = draw(MOE, KEY), with_reference(pairs())
    silent = dataclasses.replace(MOE, router_aux_loss_coef=0.0)
    grads, weight, metrics = accumulate(preference_loss(MOE, COMPUTE, PreferenceConfig()), params, None, batch, KEY, 1)
    rest, _, _ = accumulate(preference_loss(silent, COMPUTE, PreferenceConfig()), params, None, batch, KEY, 1)
    router_loss, pairs_seen = metrics["router_loss"]
    assert float(weight) == float(pairs_seen) == 4
    assert float(router_loss) > 0.5 * 4  # balanced experts cost the coefficient in each layer
    routers = lambda tree: [x for path, x in jax.tree.leaves_with_path(tree) if "router" in str(path).lower()]
    assert routers(params)
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(routers(grads), routers(rest), strict=True))


def test_reference_log_probabilities_keep_the_order_of_pairs():
    class Rows:
        shares = ()
        __len__ = lambda self: 5
        gather = lambda self, indices: {name: array[list(indices)] for name, array in pairs(5).items()}

    params = draw(TINY, KEY)
    found = reference_logps(params, TINY, COMPUTE, Rows(), 2, make_mesh())
    assert found.shape == (5, 2)
    np.testing.assert_allclose(found, logps_of(params, TINY, COMPUTE, pairs(5))[0], rtol=1e-5)


@pytest.mark.parametrize("values", [{"beta": 0.0}, {"label_smoothing": 0.5}, {"sft_weight": -1.0},
                                    {"loss_type": "ipo", "label_smoothing": 0.1}])  # fmt: skip
def test_numbers_that_no_loss_takes_are_refused(values):
    with pytest.raises(ConfigError, match=list(values)[-1]):
        PreferenceConfig(**values)


def test_certain_answers_have_finite_odds_and_gradients():
    config, ones = PreferenceConfig(loss_type="orpo"), jnp.ones((1, 2))
    loss, gradient = jax.value_and_grad(lambda x: pair_losses(config, x, None, ones)[0].sum())(jnp.zeros((1, 2)))
    assert np.isfinite(loss) and np.all(np.isfinite(gradient))
