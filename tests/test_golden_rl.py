"""Reinforcement learning held to stored numbers: losses and gradients of TRL, and of the papers' formulas."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from rl.advantages import BASELINES, gae, kl_shaped_rewards, returns_to_go, whiten
from rl.algorithms import PRESETS
from rl.losses import kl_estimate, policy_loss, reward_model_loss, value_loss

GOLDEN = json.loads((Path(__file__).parent / "golden" / "rl" / "losses.json").read_text())
DATA = {name: {k: np.asarray(v, np.float32) for k, v in rows.items()} for name, rows in GOLDEN["data"].items()}
FAR = DATA["far"]
MASK = FAR["mask"]


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", GOLDEN["policy"], ids=lambda case: "-".join([case["preset"], *case["changes"]]))
def test_policy_losses_gradients_and_metrics(case):
    data, preset = DATA[case["data"]], PRESETS[case["preset"]]
    advantages = BASELINES[case["baseline"]](data["rewards"])
    close(advantages, case["advantages"])
    per_token = np.repeat(np.asarray(advantages).reshape(-1, 1), data["mask"].shape[1], axis=1)

    def mean_loss(logprobs):
        loss, (weight, metrics) = policy_loss(
            replace(preset, **case["changes"]),
            logprobs,
            data["old_logprobs"],
            per_token,
            data["mask"],
            ref_logprobs=data["ref_logprobs"],
            entropy=data["entropy"],
            max_new_tokens=GOLDEN["max_new_tokens"],
        )
        return loss / weight, metrics

    (loss, metrics), gradient = jax.value_and_grad(mean_loss, has_aux=True)(data["logprobs"])
    close(loss, case["loss"])
    close(gradient, case["gradient"])
    for name, value in case["metrics"].items():
        close(metrics[name][0] / metrics[name][1], value)


def test_every_preset_has_a_golden_case():
    assert {case["preset"] for case in GOLDEN["policy"]} == set(PRESETS)
    for case in GOLDEN["policy"]:
        assert case["preset"] == "spo" or PRESETS[case["preset"]].baseline == case["baseline"]


def test_ppo_from_scores_to_both_losses():
    expected = GOLDEN["ppo"]
    kl_coef, gamma, lam, clip_range = expected["settings"].values()
    kl = kl_estimate(FAR["old_logprobs"], FAR["ref_logprobs"], "k1")
    rewards = kl_shaped_rewards(FAR["scores"], kl, MASK, kl_coef)
    close(rewards, expected["rewards"])
    advantages, returns = gae(rewards, FAR["old_values"], MASK, gamma=gamma, lam=lam)
    close(advantages, expected["advantages"])
    close(returns, expected["returns"])
    whitened = whiten(advantages, MASK)
    close(whitened, expected["whitened"])
    objective = replace(PRESETS["grpo"], aggregation="token", kl_coef=0.0)

    def policy(logprobs):
        total, (weight, _) = policy_loss(
            objective, logprobs, FAR["old_logprobs"], whitened, MASK, max_new_tokens=GOLDEN["max_new_tokens"]
        )
        return total / weight

    def value(values):
        total, (weight, _) = value_loss(values, FAR["old_values"], returns, MASK, clip_range)
        return total / weight

    for name, function, at in (("policy", policy, FAR["logprobs"]), ("value", value, FAR["values"])):
        loss, gradient = jax.value_and_grad(function)(at)
        close(loss, expected[f"{name}_loss"])
        close(gradient, expected[f"{name}_gradient"])


def test_reinforce_pp_returns_with_the_penalty_in_the_reward():
    expected = GOLDEN["reinforce_pp"]
    kl = kl_estimate(FAR["old_logprobs"], FAR["ref_logprobs"], "k1")
    returns = returns_to_go(kl_shaped_rewards(FAR["scores"], kl, MASK, expected["kl_coef"]), MASK)
    close(returns, expected["returns_to_go"])
    close(whiten(returns, MASK), expected["whitened"])


@pytest.mark.parametrize("case", GOLDEN["reward_model"]["cases"], ids=lambda c: f"{c['margin']}-{c['center_coef']}")
def test_reward_model_losses_and_gradients(case):
    chosen, rejected, margin = (
        np.asarray(GOLDEN["reward_model"][name], np.float32) for name in ("chosen", "rejected", "margin")
    )

    def mean_loss(chosen, rejected):
        return reward_model_loss(chosen, rejected, margin if case["margin"] else None, case["center_coef"]).mean()

    loss, (chosen_gradient, rejected_gradient) = jax.value_and_grad(mean_loss, argnums=(0, 1))(chosen, rejected)
    close(loss, case["loss"])
    close(chosen_gradient, case["chosen_gradient"])
    close(rejected_gradient, case["rejected_gradient"])
