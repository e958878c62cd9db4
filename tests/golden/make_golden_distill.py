"""Make `distill/expected.safetensors` anew: `python tests/golden/make_golden_distill.py`, with torch 2.13 and trl 1.16.

It holds logits of a student and a teacher, labels and a mask, and for every variant of the loss its value and its
gradient with respect to the student's logits, float32. `trl.*` are numbers of TRL's generalised Jensen-Shannon loss
(beta 0 is the forward and beta 1 the reverse divergence), means over unmasked tokens; `torch.*` are formulas written
out in PyTorch, for which TRL has no counterpart. All seeds are fixed. `tests/test_distillation.py` needs neither.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from trl.experimental.gkd import GKDTrainer

OUT = Path(__file__).parent / "distill" / "expected.safetensors"
ROWS, LENGTH, VOCAB = 2, 5, 13
BETAS, TEMPERATURES = (0.0, 0.1, 0.5, 0.9, 1.0), (1.0, 2.5)
ALPHA, TOP_K = 0.3, 4
TAGS, TAG_WEIGHT = (2, 5, 6, 11), 10.0


def inputs():
    rng = np.random.default_rng(0)
    draw = lambda scale: (scale * rng.standard_normal((ROWS, LENGTH, VOCAB))).astype(np.float32)
    return {
        "student": draw(2.0),
        "teacher": draw(3.0),
        "labels": rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32),
        "mask": np.array([[0, 1, 1, 1, 0], [1, 0, 1, 0, 0]], np.float32),
    }


def trl_divergence(student, teacher, labels, mask, beta, temperature):
    ignored = torch.where(mask > 0, labels.long(), -100)
    total = GKDTrainer.generalized_jsd_loss(student, teacher, ignored, beta, temperature, reduction="sum")
    return total / mask.sum()


def weighted_total(student, teacher, labels, mask, beta, temperature):
    """Weigh cross-entropy and T^2 times the divergence."""
    cross_entropy = torch.nn.functional.cross_entropy(student[mask > 0], labels[mask > 0].long())
    far = trl_divergence(student, teacher, labels, mask, beta, temperature)
    return ALPHA * cross_entropy + (1 - ALPHA) * temperature**2 * far


def top_k_divergence(student, teacher, labels, mask, beta, temperature):
    """Compare the teacher's k likeliest tokens, and one minus their sum as one more outcome."""
    p, q = torch.softmax(teacher / temperature, -1), torch.softmax(student / temperature, -1)
    ids = p.topk(TOP_K, -1).indices

    def fold(x):
        kept = x.gather(-1, ids)
        return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)

    p, q = fold(p), fold(q)
    if beta == 0:
        far = (p * (p / q).log()).sum(-1)
    elif beta == 1:
        far = (q * (q / p).log()).sum(-1)
    else:
        m = beta * p + (1 - beta) * q
        far = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
    return (far * mask).sum() / mask.sum()


def weighted_tags(student, labels, mask):
    """Cross-entropy in which some labels weigh more, divided by all weights."""
    heavy = (labels[..., None] == torch.tensor(TAGS)).any(-1)
    weights = mask * torch.where(heavy, TAG_WEIGHT, 1.0)
    losses = torch.nn.functional.cross_entropy(student.transpose(1, 2), labels.long(), reduction="none")
    return (losses * weights).sum() / weights.sum()


def main():
    arrays = inputs()
    expected = dict(arrays)
    kinds = {"trl.divergence": trl_divergence, "torch.total": weighted_total, "torch.top_k": top_k_divergence}
    for kind, function in kinds.items():
        for beta in BETAS:
            for temperature in TEMPERATURES:
                tensors = {name: torch.tensor(array) for name, array in arrays.items()}
                student = tensors["student"].requires_grad_()
                loss = function(**tensors, beta=beta, temperature=temperature)
                loss.backward()
                name = f"{kind}.{beta}.{temperature}"
                expected[name] = loss.detach().numpy()[None]
                expected[name + ".gradient"] = student.grad.numpy()
    tensors = {name: torch.tensor(array) for name, array in arrays.items() if name != "teacher"}
    loss = weighted_tags(**tensors | {"student": tensors["student"].requires_grad_()})
    loss.backward()
    expected |= {"torch.tags": loss.detach().numpy()[None], "torch.tags.gradient": tensors["student"].grad.numpy()}
    OUT.parent.mkdir(exist_ok=True)
    save_file(expected, OUT)
    print(f"{OUT}: {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
