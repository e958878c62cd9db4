"""RL losses: tables worked out by hand, padding that does not matter, and micro-batches that add up."""

from dataclasses import fields, replace
from typing import get_args

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm_jax.config import ConfigError
from rl.algorithms import PRESETS, Algorithm, AlgorithmConfig
from rl.losses import Objective, kl_estimate, policy_loss, reward_model_loss, value_loss

PLAIN = replace(PRESETS["grpo"], kl_coef=0.0)
TERMS = replace(PLAIN, kl_coef=0.1, entropy_coef=0.01)
# An end in the middle of the row, the limit, a single token, and a row that is masked out.
MASK = np.asarray([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], np.float32)
jit_loss = jax.jit(policy_loss, static_argnames=("objective", "max_new_tokens"))


def made_up(seed=0, mask=MASK, noise=0.3):
    rng = np.random.default_rng(seed)
    old = -rng.gamma(1.0, 1.0, mask.shape)
    arrays = {
        "logprobs": old + rng.normal(0, noise, mask.shape),
        "old_logprobs": old,
        "advantages": np.repeat(rng.normal(0, 1, (len(mask), 1)), mask.shape[1], axis=1),
        "mask": mask,
        "ref_logprobs": old + rng.normal(0, noise, mask.shape),
        "entropy": rng.gamma(1.0, 1.0, mask.shape),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def loss_of(objective, data, **changes):
    return jit_loss(objective=objective, **(data | changes), max_new_tokens=6)


def variants():
    """Every preset, and each way of aggregating all three terms."""
    kinds = [replace(TERMS, aggregation=kind) for kind in ("token", "sequence", "constant")]
    return [*PRESETS.values(), *kinds]


VARIANTS = pytest.mark.parametrize("objective", variants(), ids=[*PRESETS, "token", "sequence", "constant"])


def test_kl_estimates_by_hand():
    logprobs, ref = np.log([0.5, 0.25]).astype(np.float32), np.log([0.25, 0.5]).astype(np.float32)
    ln2 = np.log(2)
    np.testing.assert_allclose(kl_estimate(logprobs, ref, "k1"), [ln2, -ln2], rtol=1e-6)
    np.testing.assert_allclose(kl_estimate(logprobs, ref, "k2"), [ln2**2 / 2] * 2, rtol=1e-6)
    np.testing.assert_allclose(kl_estimate(logprobs, ref, "k3"), [0.5 - 1 + ln2, 2 - 1 - ln2], rtol=1e-6)


def test_kl_estimates_have_the_right_expectation_and_gradient():
    logits, ref = np.asarray([0.3, -0.2, 0.9], np.float32), np.asarray([-0.4, 0.5, 0.1], np.float32)
    log_softmax = jax.nn.log_softmax
    probs = jax.nn.softmax(logits)
    exact = lambda x: (jax.nn.softmax(x) * (log_softmax(x) - log_softmax(ref))).sum()
    for kind in ("k1", "k3"):
        np.testing.assert_allclose(
            (probs * kl_estimate(log_softmax(logits), log_softmax(ref), kind)).sum(), exact(logits), rtol=1e-5
        )
    gradient = lambda kind: jax.grad(lambda x: (probs * kl_estimate(log_softmax(x), log_softmax(ref), kind)).sum())
    np.testing.assert_allclose(gradient("k1")(logits), 0, atol=1e-6)
    np.testing.assert_allclose(gradient("k2")(logits), jax.grad(exact)(logits), atol=1e-6)


def test_aggregations_by_hand():
    data = made_up() | {"advantages": np.asarray([[1] * 4, [2] * 4, [-4] * 4, [9] * 4], np.float32)}
    data["logprobs"] = data["old_logprobs"]
    expected = {"token": (-7, 8), "sequence": (1, 3), "constant": (-7, 18)}  # 3·1 + 4·2 - 1·4 over 8 tokens, 3 rows
    for kind, (total, weight) in expected.items():
        loss, (found, metrics) = loss_of(replace(PLAIN, aggregation=kind), data)
        np.testing.assert_allclose([loss, found, *metrics["policy_loss"]], [total, weight, total, weight], rtol=1e-6)


@VARIANTS
def test_a_policy_that_has_not_moved_has_the_mean_advantage_as_its_reward(objective):
    data = made_up(noise=0.0)
    loss, (weight, metrics) = loss_of(replace(objective, kl_coef=0.0, entropy_coef=0.0), data)
    per_token = data["advantages"] * MASK * (-data["logprobs"] if objective.clip == "cispo" else -1.0)
    if objective.aggregation == "sequence":
        expected = (per_token.sum(1) / np.maximum(MASK.sum(1), 1)).sum() / 3
    else:
        expected = per_token.sum() / (8 if objective.aggregation == "token" else 18)
    np.testing.assert_allclose(loss / weight, expected, rtol=1e-5)
    means = {name: float(total / count) for name, (total, count) in metrics.items()}
    assert means["ratio"] == pytest.approx(1)
    assert means["clip_fraction"] == means["approx_kl"] == means["kl"] == 0


def test_clipping_takes_the_gradient_of_what_has_moved_too_far():
    mask = np.ones((1, 4), np.float32)
    ratio = np.asarray([[1.5, 1.5, 0.5, 0.5]], np.float32)
    data = made_up(mask=mask) | {"logprobs": np.log(ratio), "old_logprobs": np.zeros_like(mask)}
    data["advantages"] = np.asarray([[1, -1, 1, -1]], np.float32)
    objective = replace(PLAIN, aggregation="token", clip_high=0.28)

    def gradient(objective):
        return jax.grad(lambda x: loss_of(objective, data, logprobs=x)[0])(data["logprobs"])

    loss, (_, metrics) = loss_of(objective, data)
    np.testing.assert_allclose(loss, -(1.28 - 1.5 + 0.5 - 0.8), rtol=1e-5)
    np.testing.assert_allclose(gradient(objective), [[0, 1.5, -0.5, 0]], rtol=1e-5)
    assert metrics["clip_fraction"][0] == 2
    # CISPO keeps all gradients and bounds their weights.
    cispo = replace(objective, clip="cispo")
    np.testing.assert_allclose(gradient(cispo), [[-1.28, 1.28, -0.8, 0.8]], rtol=1e-5)
    assert loss_of(cispo, data)[1][1]["clip_fraction"][0] == 4


def test_ratios_of_completions_by_hand():
    mask = np.asarray([[1, 1, 0]], np.float32)
    data = made_up(mask=mask) | {"advantages": np.ones_like(mask)}
    data["logprobs"] = data["old_logprobs"] + np.log(np.asarray([[2, 4.5, 7]], np.float32))
    wide = replace(PLAIN, clip_high=99.0)
    for kind, ratio, slopes in (("sequence", 3, [1.5, 1.5, 0]), ("trajectory", 9, [9, 9, 0])):
        objective = replace(wide, ratio=kind)
        loss, gradient = jax.value_and_grad(lambda x, o=objective: loss_of(o, data, logprobs=x)[0])(data["logprobs"])
        np.testing.assert_allclose(loss, -ratio, rtol=1e-5)
        np.testing.assert_allclose(gradient, -np.asarray([slopes]), rtol=1e-5)


def test_kl_and_entropy_are_aggregated_like_the_policys_term():
    data = made_up()
    for kind in ("token", "sequence", "constant"):
        objective = replace(TERMS, aggregation=kind)
        loss, (weight, metrics) = loss_of(objective, data)
        kl = np.asarray(kl_estimate(data["logprobs"], data["ref_logprobs"], "k3"))
        extra = (0.1 * kl - 0.01 * data["entropy"]) * MASK
        extra = (extra.sum(1) / np.maximum(MASK.sum(1), 1)).sum() if kind == "sequence" else extra.sum()
        np.testing.assert_allclose(loss - metrics["policy_loss"][0], extra, rtol=1e-4)
        np.testing.assert_allclose(metrics["policy_loss"][1], weight)


def test_a_penalty_in_the_reward_is_no_term_of_the_loss():
    data = made_up()
    in_reward, without = replace(TERMS, kl_in="reward"), replace(TERMS, kl_coef=0.0)
    assert loss_of(in_reward, data)[0] == loss_of(without, data)[0]


def test_what_an_objective_needs_must_be_given():
    data = made_up()
    with pytest.raises(ValueError, match="ref_logprobs"):
        loss_of(replace(TERMS, entropy_coef=0.0), data, ref_logprobs=None)
    with pytest.raises(ValueError, match="entropy"):
        loss_of(TERMS, data, entropy=None)
    _, (_, metrics) = loss_of(PLAIN, data, ref_logprobs=None, entropy=None)
    assert set(metrics) == {"policy_loss", "ratio", "clip_fraction", "approx_kl"}


@VARIANTS
def test_padding_is_never_read_and_gets_no_gradient(objective):
    data = made_up(noise=1e-4)  # within the clip range of GSPO
    spoiled = {
        name: np.where(MASK > 0, array, np.nan).astype(np.float32) if name != "mask" else array
        for name, array in data.items()
    }
    run = jax.value_and_grad(lambda x, d: loss_of(objective, d, logprobs=x), has_aux=True)
    (clean, clean_gradient), (dirty, gradient) = run(data["logprobs"], data), run(spoiled["logprobs"], spoiled)
    jax.tree.map(np.testing.assert_array_equal, (clean, clean_gradient), (dirty, gradient))
    assert not np.any(np.asarray(gradient)[MASK == 0])
    assert np.any(np.asarray(gradient)[MASK > 0])


@VARIANTS
@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000))
def test_micro_batches_add_up_to_the_batch(objective, seed):
    rng = np.random.default_rng(seed)
    data = made_up(seed, mask=(np.arange(5) < rng.integers(0, 6, (4, 1))).astype(np.float32))
    parts = [{name: array[2 * i : 2 * i + 2] for name, array in data.items()} for i in range(2)]
    whole, first, second = loss_of(objective, data), loss_of(objective, parts[0]), loss_of(objective, parts[1])
    added = jax.tree.map(lambda a, b: a + b, first, second)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), whole, added)


@pytest.mark.parametrize("ratio", ["token", "sequence", "trajectory"])
@pytest.mark.parametrize("log_ratio", [-300.0, 300.0])
def test_a_policy_that_ran_away_keeps_its_gradient_finite(ratio, log_ratio):
    data = made_up()
    gradient = jax.grad(lambda x: loss_of(replace(TERMS, ratio=ratio, kl_coef=0.0), data, logprobs=x)[0])
    assert np.all(np.isfinite(gradient(data["old_logprobs"] + np.float32(log_ratio))))


def test_a_batch_without_tokens_weighs_nothing():
    empty = made_up(mask=np.zeros((2, 3), np.float32))
    for objective in variants():
        loss, (weight, metrics) = loss_of(objective, empty)
        assert loss == weight == 0
        assert all(total == count == 0 for total, count in metrics.values())


def test_value_loss_by_hand():
    values = np.asarray([[1.0, 3.0, 0.0, np.nan]], np.float32)
    old = np.asarray([[1.0, 1.0, 1.0, np.nan]], np.float32)
    returns = np.asarray([[2.0, 2.5, 0.0, np.nan]], np.float32)
    mask = np.asarray([[1, 1, 1, 0]], np.float32)
    # Clipped to 1, 1.5 and 0.5, values are wrong by 1, 1 and 0.5; unclipped by 1, 0.5 and 0.
    loss, (weight, metrics) = value_loss(values, old, returns, mask, 0.5)
    np.testing.assert_allclose([loss, weight], [0.5 * (1 + 1 + 0.25), 3], rtol=1e-6)
    assert metrics["value_clip_fraction"] == (2, 3)
    assert metrics["value_loss"] == (loss, weight)
    gradient = jax.grad(lambda x: value_loss(x, old, returns, mask, 0.5)[0])(values)
    np.testing.assert_allclose(gradient, [[-1, 0, 0, 0]], rtol=1e-6)
    plain, (_, metrics) = value_loss(values, old, returns, mask, None)
    np.testing.assert_allclose(plain, 0.5 * (1 + 0.25), rtol=1e-6)
    assert metrics["value_clip_fraction"][0] == 0


def test_reward_model_loss_by_hand():
    chosen, rejected = np.asarray([1.0, 0.0], np.float32), np.asarray([0.0, 0.0], np.float32)
    np.testing.assert_allclose(reward_model_loss(chosen, rejected), [np.log1p(np.exp(-1)), np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(
        reward_model_loss(chosen, rejected, np.asarray([1.0, 0.0], np.float32), 0.5),
        [np.log(2) + 0.5, np.log(2)],
        rtol=1e-6,
    )


def test_presets_are_the_algorithms_of_the_command_line_and_pass_its_checks():
    assert set(get_args(Algorithm)) == set(PRESETS)
    for name, preset in PRESETS.items():
        assert AlgorithmConfig(algorithm=name).objective() == preset
    config = AlgorithmConfig(algorithm="dapo", kl_coef=0.02, dynamic_sampling=False)
    assert config.objective() == replace(PRESETS["dapo"], kl_coef=0.02, dynamic_sampling=False)
    assert {f.name for f in fields(AlgorithmConfig)} == {"algorithm", *(f.name for f in fields(Objective))}


def test_only_a_penalty_needs_a_reference():
    needing = {name for name, preset in PRESETS.items() if preset.needs_reference}
    assert needing == {"grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"algorithm": "ppo"}, "algorithm"),
        ({"clip_low": 0.0}, "clip_low"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"clip_high": float("inf")}, "clip_high"),
        ({"kl_coef": -0.1}, "kl_coef"),
        ({"entropy_coef": float("nan")}, "entropy_coef"),
        ({"kl_estimator": "k1"}, "k1 in the loss"),
        ({"ratio": "trajectory", "aggregation": "token"}, "trajectory"),
        ({"algorithm": "dapo", "baseline": "batch"}, "dynamic_sampling"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_nonsense_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        AlgorithmConfig(**values)
