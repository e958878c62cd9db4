"""Make the folders `lora_*` beside this file anew: `python tests/golden/make_golden_lora.py`; needs torch, transformers
and peft.

Each folder holds a base as `transformers` saves it, an adapter as PEFT saves it, and `expected.safetensors`: a batch,
and the logits, the loss and its gradient with respect to the adapter that PEFT gives for it in float32. All seeds are
fixed. The tests that read the folders (`tests/test_lora.py`) need none of the three packages.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).parent
SHAPE = {
    "vocab_size": 37,
    "hidden_size": 20,
    "intermediate_size": 26,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
}
EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "lora_all": (
        lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
        {"r": 3, "lora_alpha": 6, "target_modules": EVERYTHING},
    ),
    "lora_rslora": (
        lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=False)),
        {"r": 4, "lora_alpha": 7, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    ),
}
"""Base, and settings of the adapter."""


def make_batch(seed):
    """Two rows with a loss mask."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, SHAPE["vocab_size"], (2, 18), np.int64)
    weights = (rng.random((2, 17)) < 0.6).astype(np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def make_case(name, base, settings, seed):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(seed)
    model = base().eval()
    model.save_pretrained(folder / "base")
    # Initialisation is off, so that both factors are random and both have a gradient.
    model = get_peft_model(model, LoraConfig(**settings, init_lora_weights=False, task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = "../base"
    model.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    batch = make_batch(seed)
    tokens, targets, weights = (torch.from_numpy(array) for array in batch.values())
    logits = model(input_ids=tokens).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    loss = (losses * weights.flatten()).sum() / weights.sum()
    loss.backward()
    gradients = {
        "gradient." + parameter.replace(".default", ""): tensor.grad.numpy()
        for parameter, tensor in model.named_parameters()
        if tensor.requires_grad
    }
    expected = {"logits": logits.detach().numpy(), "loss": loss.detach().numpy()} | gradients
    batch = {key: array if key == "weights" else array.astype(np.int32) for key, array in batch.items()}
    contiguous = {key: np.ascontiguousarray(array) for key, array in (batch | expected).items()}
    save_file(contiguous, folder / "expected.safetensors")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)
    config = folder / "adapter" / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"target_modules": sorted(values["target_modules"])}, indent=2) + "\n")


if __name__ == "__main__":
    for number, (name, (base, settings)) in enumerate(CASES.items()):
        make_case(name, base, settings, seed=number)
