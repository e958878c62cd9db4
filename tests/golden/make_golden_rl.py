"""Make tests/golden/rl/losses.json: losses of reinforcement learning and their gradients, by TRL where it has them.

    python tests/golden/make_golden_rl.py         (needs torch and trl; the file was made with trl 1.16.0, torch 2.13.0)

By TRL's own methods, on made-up log-probabilities and rewards: policy losses (`GRPOTrainer._compute_loss`,
`RLOOTrainer._compute_loss`) and the reward model's (`RewardTrainer.compute_loss`). TRL computes advantages amid its
rollouts and has no PPO any more, so group baselines, GAE, PPO, token-level REINFORCE++ and the k2 term are written here
from the papers, in float64, token by token.
"""

import json
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from trl import GRPOTrainer, RewardTrainer, RLOOTrainer

PROMPTS, GROUP, LENGTH = 3, 3, 8
ROWS = PROMPTS * GROUP
LENGTHS = [8, 3, 5, 1, 8, 2, 6, 4, 7]  # the limit, an end in the middle, a single token


def made_up(noise, seed):
    """Completions `[B, T]`: log-probabilities of a policy, of an older one and of a reference; rewards `[P, G]`."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, LENGTH)
    old = -rng.gamma(1.0, 1.0, shape) - 0.05
    rewards = rng.normal(0, 1, (PROMPTS, GROUP))
    rewards[1] = 0.75  # a group that teaches nothing, whose mean is exact
    return {
        "mask": (np.arange(LENGTH) < np.asarray(LENGTHS)[:, None]).astype(int),
        "old_logprobs": old,
        "logprobs": old + rng.normal(0, noise, shape),
        "ref_logprobs": old + rng.normal(0, 0.3, shape),
        "entropy": rng.gamma(2.0, 0.5, shape),
        "rewards": rewards,
        "old_values": rng.normal(0, 1, shape),
        "values": rng.normal(0, 1, shape),
        "scores": rng.normal(0, 2, ROWS),
    }


# --- Advantages, from the papers ------------------------------------------------------------------------------------


def per_completion(rewards, baseline):
    """Advantages `[P, G]` one by one, from rewards `[P, G]`."""
    everything, result = rewards.flatten(), torch.zeros_like(rewards)
    centered = torch.stack([group - group.mean() for group in rewards])
    for p, group in enumerate(rewards):
        for g, reward in enumerate(group):
            others = torch.cat([group[:g], group[g + 1 :]])
            result[p, g] = {
                "group": (reward - group.mean()) / (group.std() + 1e-4),
                "mean": reward - group.mean(),
                "leave_one_out": reward - others.mean(),
                "batch": (reward - everything.mean()) / everything.std(),
                "group_batch": centered[p, g] / centered.flatten().std(),
                "none": reward,
            }[baseline]
    return result


def shaped_rewards(data, kl_coef):
    """Per-token rewards: minus the k1 penalty, and the score at the last token."""
    rewards = torch.zeros(ROWS, LENGTH, dtype=torch.float64)
    for b, length in enumerate(LENGTHS):
        for t in range(length):
            rewards[b, t] = -kl_coef * (data["old_logprobs"][b, t] - data["ref_logprobs"][b, t])
        rewards[b, length - 1] += data["scores"][b]
    return rewards


def gae(rewards, values, gamma, lam):
    """Sums of discounted temporal differences, written out."""
    advantages = torch.zeros_like(rewards)
    for b, length in enumerate(LENGTHS):
        value = [*values[b, :length].tolist(), 0.0]
        for t in range(length):
            for k in range(t, length):
                delta = rewards[b, k] + gamma * value[k + 1] - value[k]
                advantages[b, t] += (gamma * lam) ** (k - t) * delta
    return advantages


def tokens(array):
    """The completions' tokens as a list of scalars."""
    return [array[b, t] for b, length in enumerate(LENGTHS) for t in range(length)]


def whitened(array):
    """Zero mean and unit variance over all tokens of the completions."""
    flat, result = torch.stack(tokens(array)), torch.zeros_like(array)
    for b, length in enumerate(LENGTHS):
        result[b, :length] = (array[b, :length] - flat.mean()) / flat.std()
    return result


# --- Losses ---------------------------------------------------------------------------------------------------------


def trainer(**settings):
    """What TRL's loss methods read of their trainer."""
    same = lambda value, **_: value
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, sync_gradients=True, gather=same, gather_for_metrics=same,
                                    reduce=same),
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1, aux_loss_enabled=False,
        **settings,
    )  # fmt: skip


def completions(data):
    """TRL's inputs: a prompt of one token before each completion."""
    prompt, mask = torch.zeros(ROWS, 1, dtype=torch.long), torch.tensor(data["mask"])
    return {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
    }


def trl_grpo(data, logprobs, advantages, loss_type, level="token", low=0.2, high=0.2, beta=0.0, entropy_coef=0.0):
    """Loss by `GRPOTrainer`, and what it logs."""
    self = trainer(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, data["entropy"], None),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level=level, beta=beta,
        loss_type=loss_type, epsilon_low=low, epsilon_high=high, use_vllm=False, max_completion_length=LENGTH,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=entropy_coef > 0, entropy_coef=entropy_coef,
        use_adaptive_entropy=False,
    )  # fmt: skip
    inputs = completions(data) | {
        "advantages": advantages.flatten(),
        "old_per_token_logps": data["old_logprobs"],
        "ref_per_token_logps": data["ref_logprobs"],
        "num_items_in_batch": torch.tensor(data["mask"]).sum(),
    }
    loss = GRPOTrainer._compute_loss(self, None, inputs)
    names = {"kl": "kl", "entropy": "entropy", "clip_ratio/region_mean": "clip_fraction"}
    logged = {names[name]: value[0] for name, value in self._metrics["train"].items() if name in names}
    if level == "sequence":
        del logged["clip_fraction"]  # TRL's is a mean over completions
    return loss, logged


def trl_rloo(data, logprobs, advantages):
    """Loss by `RLOOTrainer`."""
    self = trainer(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, data["entropy"], None),
        epsilon_low=0.2, epsilon_high=0.2,
    )  # fmt: skip
    old_logps = (data["old_logprobs"] * torch.tensor(data["mask"])).sum(1)
    inputs = completions(data) | {"advantages": advantages.flatten(), "old_logps": old_logps}
    return RLOOTrainer._compute_loss(self, None, inputs), {}


def with_k2(data, logprobs, advantages):
    """REINFORCE++-baseline: TRL's token mean, and 0.001 times the mean of the squared log-ratio's half."""
    loss, logged = trl_grpo(data, logprobs, advantages, "dapo")
    return loss + 0.001 * torch.stack(tokens((data["ref_logprobs"] - logprobs) ** 2 / 2)).mean(), logged


POLICY = [
    # preset, changes to it, data, baseline, loss
    ("grpo", {}, "far", "group", lambda *x: trl_grpo(*x, "grpo", beta=0.04)),
    ("dr_grpo", {}, "far", "mean", lambda *x: trl_grpo(*x, "dr_grpo")),
    ("dapo", {}, "far", "group", lambda *x: trl_grpo(*x, "dapo", high=0.28)),
    ("dapo", {"entropy_coef": 0.02}, "far", "group", lambda *x: trl_grpo(*x, "dapo", high=0.28, entropy_coef=0.02)),
    ("gspo", {}, "near", "group", lambda *x: trl_grpo(*x, "grpo", "sequence", 3e-4, 4e-4)),
    ("cispo", {}, "far", "group", lambda *x: trl_grpo(*x, "cispo", high=5.0)),
    ("cispo", {"clip_high": 0.1}, "far", "group", lambda *x: trl_grpo(*x, "cispo", high=1.1)),
    ("rloo", {}, "far", "leave_one_out", trl_rloo),
    ("reinforce_pp", {}, "far", "batch", lambda *x: trl_grpo(*x, "dapo")),
    ("reinforce_pp_baseline", {}, "far", "group_batch", with_k2),
    ("spo", {}, "far", "none", lambda *x: trl_grpo(*x, "dapo", high=0.28)),
]
"""SPO's loss is taken on the rewards as they are: its baseline is a state, which other tests hold to its formula."""


def ppo(data, logprobs, values, kl_coef=0.05, gamma=0.95, lam=0.9, clip=0.2, value_clip=0.3):
    """PPO from log-probabilities, values and scores to both losses, token by token."""
    rewards = shaped_rewards(data, kl_coef)
    advantages = gae(rewards, data["old_values"], gamma, lam)
    returns, white = advantages + data["old_values"] * torch.tensor(data["mask"]), whitened(advantages)
    policy, value = [], []
    for b, length in enumerate(LENGTHS):
        for t in range(length):
            ratio = (logprobs[b, t] - data["old_logprobs"][b, t]).exp()
            policy.append(-torch.minimum(ratio * white[b, t], ratio.clamp(1 - clip, 1 + clip) * white[b, t]))
            old = data["old_values"][b, t]
            near = torch.maximum(torch.minimum(values[b, t], old + value_clip), old - value_clip)
            value.append(torch.maximum((values[b, t] - returns[b, t]) ** 2, (near - returns[b, t]) ** 2) / 2)
    policy, value = torch.stack(policy).mean(), torch.stack(value).mean()
    return {
        "settings": {"kl_coef": kl_coef, "gamma": gamma, "lam": lam, "clip_range": value_clip},
        "rewards": rewards, "advantages": advantages, "returns": returns, "whitened": white,
        "policy_loss": policy, "policy_gradient": torch.autograd.grad(policy, logprobs)[0],
        "value_loss": value, "value_gradient": torch.autograd.grad(value, values)[0],
    }  # fmt: skip


def reinforce_pp_advantages(data, kl_coef=0.05):
    """Whitened sums of the rewards from each token on."""
    rewards, result = shaped_rewards(data, kl_coef), torch.zeros(ROWS, LENGTH, dtype=torch.float64)
    for b, length in enumerate(LENGTHS):
        for t in range(length):
            result[b, t] = rewards[b, t:length].sum()
    return {"kl_coef": kl_coef, "returns_to_go": result, "whitened": whitened(result)}


def trl_reward(chosen, rejected, margin, center):
    """Mean loss by `RewardTrainer`."""
    self = trainer(args=SimpleNamespace(center_rewards_coefficient=center))
    output = SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None])
    inputs = {"attention_mask": torch.ones(1)} | ({} if margin is None else {"margin": margin})
    model = lambda margin=None, **_: output
    return RewardTrainer.compute_loss(self, model, inputs)


def reward_cases():
    rng = np.random.default_rng(3)
    chosen, rejected = (torch.tensor(rng.normal(0, 2, 6), requires_grad=True) for _ in range(2))
    margin, cases = torch.tensor(rng.uniform(0, 2, 6)), []
    for use_margin, center in ((False, None), (True, None), (False, 0.01), (True, 0.1)):
        loss = trl_reward(chosen, rejected, margin if use_margin else None, center)
        gradients = torch.autograd.grad(loss, (chosen, rejected))
        cases.append({"margin": use_margin, "center_coef": center or 0.0, "loss": loss,
                      "chosen_gradient": gradients[0], "rejected_gradient": gradients[1]})  # fmt: skip
    return {"chosen": chosen, "rejected": rejected, "margin": margin, "cases": cases}


def plain(value):
    """Tensors and arrays as lists of short numbers."""
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        assert math.isfinite(value)
        return float(f"{value:.8g}")
    return value


def main():
    raw = {"far": made_up(0.3, 1), "near": made_up(3e-3, 4)}
    # Rounded to what the file holds, then taken in double precision.
    data = {
        name: {k: torch.tensor(plain(v.astype(np.float32)), dtype=torch.float64) if k != "mask" else v.tolist()
               for k, v in rows.items()}
        for name, rows in raw.items()
    }  # fmt: skip
    policy = []
    for preset, changes, name, baseline, loss_of in POLICY:
        rows = data[name]
        logprobs = rows["logprobs"].clone().requires_grad_()
        advantages = per_completion(rows["rewards"], baseline)
        loss, logged = loss_of(rows, logprobs, advantages)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        policy.append({"preset": preset, "changes": changes, "data": name, "baseline": baseline,
                       "advantages": advantages, "loss": loss, "gradient": gradient, "metrics": logged})  # fmt: skip
    far = data["far"]
    found = {
        "max_new_tokens": LENGTH,
        "data": data,
        "policy": policy,
        "ppo": ppo(far, far["logprobs"].clone().requires_grad_(), far["values"].clone().requires_grad_()),
        "reinforce_pp": reinforce_pp_advantages(far),
        "reward_model": reward_cases(),
    }
    path = Path(__file__).parent / "rl" / "losses.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(plain(found)) + "\n")
    print(f"{path}: {len(policy)} policy cases, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
