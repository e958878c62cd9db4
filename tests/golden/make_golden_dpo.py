"""Make tests/golden/dpo/losses.json: preference losses and their gradients as TRL computes them.

    python tests/golden/make_golden_dpo.py        (needs torch and trl; the file was made with trl 1.16.0, torch 2.13.0)

No formula is written here: the loss methods of TRL's own trainers are called, on made-up log-probabilities. Of DPO that
is the whole of `DPOTrainer._compute_loss`, given a model that returns them. TRL's label smoothing and SimPO live in
`CPOTrainer.cpo_loss`, which takes log-probabilities without a reference; conservative DPO is that function of
log-ratios. ORPO is `ORPOTrainer.odds_ratio_loss`, and the SFT term of its complete loss is that of `DPOTrainer`.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

PAIRS, LENGTH, PROMPT = 6, 12, 3


def made_up(chosen_lengths, seed):
    """Log-probabilities `[B, 2, T]` of a policy, zero outside answers; the mask of answers; a reference `[B, 2]`."""
    rng = np.random.default_rng(seed)
    lengths = np.stack([chosen_lengths, rng.integers(1, LENGTH - PROMPT, PAIRS)], axis=1)
    slot = np.arange(LENGTH)
    mask = (slot >= PROMPT) & (slot < PROMPT + lengths[..., None])
    logprobs = np.where(mask, -rng.gamma(1.0, 1.5, mask.shape), 0.0)
    return {
        "logprobs": logprobs.astype(np.float32).tolist(),
        "mask": mask.astype(int).tolist(),
        "ref_logps": (logprobs.sum(-1) + rng.normal(0, 4, (PAIRS, 2))).astype(np.float32).tolist(),
    }


def sides(array):
    """`[B, 2, ...]` to TRL's order: all chosen, then all rejected."""
    return torch.cat([array[:, 0], array[:, 1]])


def trl_dpo(data, logprobs, loss_types, weights, beta):
    """Mean loss of a batch by `DPOTrainer`."""
    mask, ref = sides(torch.tensor(data["mask"])), torch.tensor(data["ref_logps"])
    token_logprobs = sides(logprobs)
    rest = {name: torch.zeros_like(token_logprobs) for name in ("entropy", "mean_logits")}
    output = SimpleNamespace(log_probs=token_logprobs, is_top1=torch.zeros_like(mask, dtype=torch.bool), **rest)
    same = lambda value: value
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl",
        use_weighting=False, label_smoothing=0.0, beta=beta, loss_types=loss_types, loss_weights=weights,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    # TRL's mask is one slot ahead: its first token predicts nothing.
    completion_mask = torch.nn.functional.pad(mask, (1, 0))
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "ref_chosen_logps": ref[:, 0],
        "ref_rejected_logps": ref[:, 1],
    }
    return DPOTrainer._compute_loss(trainer, lambda **_: output, inputs, return_outputs=False)


def trl_cpo(data, logprobs, loss_type, beta, gamma=0.0, label_smoothing=0.0):
    """Mean loss by `CPOTrainer`: of mean log-probabilities (simpo), or of summed log-ratios (conservative DPO)."""
    if loss_type == "simpo":
        scores = logprobs.sum(-1) / torch.tensor(data["mask"]).sum(-1)
    else:
        scores = logprobs.sum(-1) - torch.tensor(data["ref_logps"])
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"), alpha=0.0, loss_type=loss_type, beta=beta, simpo_gamma=gamma,
        label_smoothing=label_smoothing,
    )  # fmt: skip
    return CPOTrainer.cpo_loss(trainer, scores[:, 0], scores[:, 1])[0].mean()


def trl_orpo(data, logprobs, beta, sft):
    """Mean loss by `ORPOTrainer`, with or without the SFT term."""
    scores = logprobs.sum(-1) / torch.tensor(data["mask"]).sum(-1)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=beta)
    loss = -ORPOTrainer.odds_ratio_loss(trainer, scores[:, 0], scores[:, 1])[0].mean()
    return loss + trl_dpo(data, logprobs, ["sft"], [1.0], beta) if sft else loss


CASES = [
    # settings of ours, data, loss by TRL
    ({"loss_type": "sigmoid"}, "uneven", lambda d, x: trl_dpo(d, x, ["sigmoid"], [1.0], 0.1)),
    ({"loss_type": "sigmoid", "beta": 0.5}, "uneven", lambda d, x: trl_dpo(d, x, ["sigmoid"], [1.0], 0.5)),
    ({"loss_type": "sigmoid", "label_smoothing": 0.2}, "uneven",
     lambda d, x: trl_cpo(d, x, "sigmoid", 0.1, label_smoothing=0.2)),
    ({"loss_type": "sigmoid", "length_normalized": True, "beta": 5.0}, "uneven",
     lambda d, x: trl_dpo(d, x, ["sigmoid_norm"], [1.0], 5.0)),
    ({"loss_type": "sigmoid", "sft_weight": 0.7}, "even",
     lambda d, x: trl_dpo(d, x, ["sigmoid", "sft"], [1.0, 0.7], 0.1)),
    ({"loss_type": "hinge"}, "uneven", lambda d, x: trl_dpo(d, x, ["hinge"], [1.0], 0.1)),
    ({"loss_type": "ipo"}, "uneven", lambda d, x: trl_dpo(d, x, ["ipo"], [1.0], 0.1)),
    ({"loss_type": "simpo"}, "uneven", lambda d, x: trl_cpo(d, x, "simpo", 2.0, gamma=1.0)),
    ({"loss_type": "simpo", "simpo_gamma": 0.5, "beta": 2.5, "label_smoothing": 0.1}, "uneven",
     lambda d, x: trl_cpo(d, x, "simpo", 2.5, gamma=0.5, label_smoothing=0.1)),
    ({"loss_type": "orpo", "beta": 0.3, "sft_weight": 0.0}, "uneven", lambda d, x: trl_orpo(d, x, 0.3, sft=False)),
    ({"loss_type": "orpo"}, "even", lambda d, x: trl_orpo(d, x, 0.1, sft=True)),
]  # fmt: skip
"""TRL's SFT term is a mean over a batch's tokens and ours over answers first, so it is compared on even lengths."""


def main():
    rng = np.random.default_rng(0)
    data = {"uneven": made_up(rng.integers(1, LENGTH - PROMPT, PAIRS), 1), "even": made_up(np.full(PAIRS, 5), 2)}
    cases = []
    for settings, name, loss_of in CASES:
        logprobs = torch.tensor(data[name]["logprobs"], requires_grad=True)
        masked = logprobs * torch.tensor(data[name]["mask"])
        loss = loss_of(data[name], masked)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        cases.append({"settings": settings, "data": name, "loss": loss.item(), "gradient": gradient.tolist()})
    shorten = lambda value: [shorten(v) for v in value] if isinstance(value, list) else float(f"{value:.9g}")
    for part in (*data.values(), *cases):
        part |= {key: shorten(value) for key, value in part.items() if isinstance(value, list) and key != "mask"}
    path = Path(__file__).parent / "dpo" / "losses.json"
    path.write_text(json.dumps({"data": data, "cases": cases}) + "\n")
    print(f"{path}: {len(cases)} cases, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
