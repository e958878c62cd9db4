"""Make the model folders beside this file anew, with the extra `conformance`: `python tests/golden/make_golden.py`.

Each folder is a model as `transformers` saves it, with `expected.safetensors`: inputs, and the outputs that
`transformers` and PyTorch give for them in float32. All seeds are fixed. The tests that read the folders
(`tests/test_golden.py`) need neither.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from conformance import reference

ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}  # heads that do not divide hidden_size
DENSE = {"vocab_size": 37, "hidden_size": 22, "intermediate_size": 26, **ATTENTION}
EXPERTS = {"intermediate_size": 10, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.05}
MODELS = {
    "llama": DENSE | {"hidden_size": 24, "tie_word_embeddings": True},
    "mistral": DENSE | {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 4},
    "qwen2": DENSE | {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3": DENSE | {"head_dim": 8},
    "qwen3_moe": DENSE | EXPERTS | {"moe_intermediate_size": 10, "num_experts": 5, "norm_topk_prob": True},
    "mixtral": DENSE | EXPERTS | {"num_local_experts": 3, "tie_word_embeddings": True},
}
ROPE_MODEL = DENSE | {"hidden_size": 24, "tie_word_embeddings": True, "head_dim": 8}  # few frequencies would hide some
STEP_SEED = 32  # of a batch with which rounding all weights once more moves no model's gradient by more than 5e-6
TRAINED = MODELS["qwen2"] | {"tie_word_embeddings": False}


def named(prefix, arrays):
    return {f"{prefix}.{name}": array for name, array in arrays.items()}


def greedy(model, rng):
    prompt, tokens = reference.decided_prompt(model, rng)
    return named("greedy", {"prompt": prompt, "tokens": tokens})


def architecture_case(name, seed):
    """One architecture: every layout of a batch, decoding, and a training step."""
    model, rng = reference.random_model(name, seed, **MODELS[name]), np.random.default_rng(seed)
    expected = greedy(model, rng)
    for layout, batch in reference.layouts(rng, model.config.vocab_size, width=20).items():
        expected |= named(layout, batch | {"logits": reference.logits(model, batch)})
    if name in ("qwen3", "qwen3_moe"):
        batch = reference.cached_batch(rng, model.config.vocab_size)
        expected |= named("cached", batch | {"logits": reference.cached_logits(model, batch)})
    if name != "mixtral":  # compiling it takes seconds, and it differs from Qwen3-MoE in nothing that moves a gradient
        batch = reference.step_batch(np.random.default_rng(STEP_SEED), model.config.vocab_size, rows=3, width=15)
        loss, gradient = reference.loss_and_gradient(model, batch)
        expected |= named("step", batch | {"loss": loss}) | named("gradient", gradient)
    if name == "qwen3_moe":
        expected |= named("router", reference.router(model, batch))
    return model, expected


def rope_case(kind, seed):
    """One way to stretch the context, far beyond the length before stretching."""
    model = reference.random_model("llama", seed, {"rope_type": kind} | reference.ROPE[kind], **ROPE_MODEL)
    rng = np.random.default_rng(seed)
    batch = reference.batch_of(rng, model.config.vocab_size, [[(0, 100)]], 100)
    expected = named("plain", batch | {"logits": reference.logits(model, batch)})
    return model, expected | (greedy(model, rng) if kind == "yarn" else {})


def training_case(seed):
    """Fifty steps. The model is left as it was before them."""
    model, rng = reference.random_model("qwen2", seed, **TRAINED), np.random.default_rng(seed)
    batches = reference.training_batches(rng, model.config.vocab_size)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses, norms = reference.train(model, batches, reference.TRAINING)
    model.load_state_dict(before)
    stacked = {key: np.stack([batch[key] for batch in batches]) for key in batches[0]}
    return model, named("curve", stacked | {"loss": losses, "grad_norm": norms})


def write(name, model, expected):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    reference.save(model, folder, max_shard_size="20KB" if name == "qwen3_moe" else "1MB")
    save_file({key: np.array(value, order="C") for key, value in expected.items()}, folder / "expected.safetensors")
    if name.startswith("rope_"):
        write_legacy_config(folder, expected)
    if name == "training":
        (folder / "training.json").write_text(json.dumps(reference.TRAINING, indent=2) + "\n", "utf-8")


def write_legacy_config(folder, expected):
    """Write the older spelling of the same configuration, and see that transformers still understands it."""
    legacy = reference.legacy_spelling(json.loads((folder / "config.json").read_text("utf-8")))
    text = json.dumps(legacy, indent=2) + "\n"
    (folder / "legacy_config.json").write_text(text, "utf-8")
    with tempfile.TemporaryDirectory() as copy:
        shutil.copy(folder / "model.safetensors", copy)
        Path(copy, "config.json").write_text(text, "utf-8")
        batch = {key: expected[f"plain.{key}"] for key in ("tokens", "segment_ids", "positions")}
        np.testing.assert_array_equal(reference.logits(reference.load(copy), batch), expected["plain.logits"])


def main():
    for seed, name in enumerate(MODELS):
        write(name, *architecture_case(name, seed))
    for seed, kind in enumerate(("linear", "llama3", "yarn"), start=10):
        write(f"rope_{kind}", *rope_case(kind, seed))
    write("training", *training_case(seed=20))


if __name__ == "__main__":
    main()
