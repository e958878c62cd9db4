"""The other side of every comparison: random models of `transformers`, and what they and PyTorch make of them.

Shared by `tests/golden/make_golden.py`, which stores the numbers, and by the live tests, which draw new ones. Models
go in, numpy arrays come out. All is float32 on one thread of arithmetic, with eager attention; nothing here knows
minillm-jax.
"""

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors.numpy import load_file
from tokenizers import models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)  # sums in one order, on any machine with the same instructions

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral")
ROPE = {
    "default": {},
    "linear": {"factor": 8.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 16},
}
PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}
CONTEXT = 128
PROMPT, NEW_TOKENS = 7, 64


# --- Models ------------------------------------------------------------------------------------------------------


def random_model(architecture, seed, rope=None, **fields):
    """A model with large random weights: norm scales and biases too, because at their initial values errors hide."""
    rope = rope or {"rope_type": "default"}
    context = CONTEXT / rope["factor"] if rope["rope_type"] == "linear" else CONTEXT
    special = {"sliding_window": None} if architecture in ("mistral", "mixtral") else {}
    config = AutoConfig.for_model(
        architecture,
        **{"num_hidden_layers": 2, "max_position_embeddings": int(context), "rms_norm_eps": 1e-5},
        **{"bos_token_id": None, "eos_token_id": None, "rope_parameters": {"rope_theta": 1e4} | rope},
        **special,
        **fields,
    )
    model = AutoModelForCausalLM.from_config(config, **PLAIN).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.25 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if "norm" in name else noise)
    return model


def random_shape(architecture, rng, groups, tied):
    """Fields of an odd shape with `groups` query heads for each key head."""
    kv_heads = 1 if groups == 8 else int(rng.integers(1, 4))
    heads, head_dim = groups * kv_heads, 2 * int(rng.integers(2, 6))
    hidden = heads * head_dim
    if architecture != "llama":  # whose configuration insists on whole heads
        hidden = int(rng.integers(13, 45))
        hidden += hidden % heads == 0 and heads > 1
    fields = {
        "vocab_size": 8 * int(rng.integers(4, 9)) + int(rng.integers(1, 8)),
        "hidden_size": hidden,
        "head_dim": head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": int(rng.integers(9, 40)),
        "tie_word_embeddings": tied,
    }
    if architecture in ("qwen3_moe", "mixtral"):
        experts = int(rng.integers(3, 8))
        fields["num_experts" if architecture == "qwen3_moe" else "num_local_experts"] = experts
        fields |= {"num_experts_per_tok": int(rng.integers(1, 4)), "router_aux_loss_coef": 0.05}
    if architecture == "qwen3_moe":
        fields |= {"moe_intermediate_size": int(rng.integers(5, 20)), "norm_topk_prob": bool(rng.integers(2))}
    return fields


def random_rope(rng, kind=None):
    """Settings of a rotary scaling, half of the time with yarn's optional ones; no kind draws one."""
    kind = kind or str(rng.choice(list(ROPE)))
    rope = {"rope_type": kind, "rope_theta": float(rng.integers(50, 20000))} | ROPE[kind]
    if kind == "yarn" and rng.integers(2):
        rope |= {"beta_fast": 8.0, "beta_slow": 0.5, "attention_factor": 1.3}
    if kind == "llama3":
        rope |= {"low_freq_factor": float(rng.choice([0.5, 1.0])), "high_freq_factor": float(rng.choice([2.5, 4.0]))}
    return rope


def save(model, folder, **options):
    """Write a folder as people find it: `save_pretrained`, and a tokenizer of one word for each id."""
    model.save_pretrained(folder, **options)
    vocabulary = {"<eos>": 0} | {f"w{i}": i for i in range(1, model.config.vocab_size)}
    engine = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.add_special_tokens(["<eos>"])
    Path(folder, "tokenizer.json").write_text(engine.to_str() + "\n", "utf-8")
    names = {"eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"}
    Path(folder, "tokenizer_config.json").write_text(json.dumps(names) + "\n", "utf-8")


def load(folder):
    """Load a folder strictly: every tensor has its place, and every place its tensor."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **PLAIN)
    assert not any(report.values()), report
    return model.eval()


def legacy_spelling(config):
    """Respell a `config.json` of today as releases before `rope_parameters` wrote it."""
    config = dict(config)
    rope = config.pop("rope_parameters")
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    # The oldest files, from the time of linear scaling, say `type`.
    scaling = {"type" if kind == "linear" else "rope_type": kind} | rope
    return config | {"rope_theta": theta, "rope_scaling": None if kind == "default" else scaling}


def saved_tensors(model):
    """Tensors by name, in the layout of files on disk, which `transformers` itself makes of its modules."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder, "model.safetensors"))


# --- Inputs ------------------------------------------------------------------------------------------------------


def batch_of(rng, vocab_size, rows, width):
    """Lay out documents: each row lists (start, length); segments count from 1, positions restart, padding is 0."""
    shape = (len(rows), width)
    batch = {name: np.zeros(shape, np.int32) for name in ("segment_ids", "positions")}
    batch["tokens"] = rng.integers(0, vocab_size, shape).astype(np.int32)
    for row, documents in enumerate(rows):
        for segment, (start, length) in enumerate(documents, start=1):
            batch["segment_ids"][row, start : start + length] = segment
            batch["positions"][row, start : start + length] = np.arange(length)
    return batch


def layouts(rng, vocab_size, width):
    """Two rows each: full, padded on either side, and packed."""
    short, a, b = width - width // 3, width // 4, width // 3
    rows = {
        "plain": [[(0, width)], [(0, width)]],
        "right": [[(0, short)], [(0, width - 1)]],
        "left": [[(width - short, short)], [(1, width - 1)]],
        "packed": [[(0, a), (a, b), (a + b, width - a - b)], [(0, b), (b, a)]],
    }
    return {name: batch_of(rng, vocab_size, row, width) for name, row in rows.items()}


def step_batch(rng, vocab_size, rows, width):
    """A padded batch for training: all tokens but a few are trained on; the last of a row has no target."""
    lengths = [width, *rng.integers(width // 2, width, rows - 1)]
    batch = batch_of(rng, vocab_size, [[(0, int(length))] for length in lengths], width)
    next_segment = np.pad(batch["segment_ids"][:, 1:], ((0, 0), (0, 1)))
    batch["targets"] = np.pad(batch["tokens"][:, 1:], ((0, 0), (0, 1)))
    batch["weights"] = ((next_segment > 0) & (rng.random(next_segment.shape) < 0.9)).astype(np.float32)
    return batch


# --- What transformers and PyTorch make of them --------------------------------------------------------------------


def _long(array):
    return torch.from_numpy(np.asarray(array)).long()


def _numpy(tensor):
    return tensor.detach().numpy().copy()


@torch.no_grad()
def logits(model, batch):
    """Logits `[B, T, V]`; those of packed rows come from separate calls, one a document."""
    if batch["segment_ids"].max() == 1:
        mask, positions = _long(batch["segment_ids"]), _long(batch["positions"])
        return _numpy(model(_long(batch["tokens"]), attention_mask=mask, position_ids=positions).logits)
    out = np.zeros((*batch["tokens"].shape, model.config.vocab_size), np.float32)
    for row, segments in enumerate(batch["segment_ids"]):
        for segment in range(1, segments.max() + 1):
            where = (row, segments == segment)
            out[where] = _numpy(model(_long(batch["tokens"][where][None])).logits[0])
    return out


@torch.no_grad()
def cached_logits(model, batch):
    """Logits of a left-padded prompt and of one token at a time after it, through the key-value cache."""
    tokens, mask, positions = (_long(batch[name]) for name in ("tokens", "segment_ids", "positions"))
    cache, out, start = DynamicCache(config=model.config), [], 0
    for end in range(PROMPT, tokens.shape[1] + 1):
        step = slice(start, end)
        output = model(
            tokens[:, step],
            attention_mask=mask[:, :end],
            position_ids=positions[:, step],
            cache=cache,
            use_cache=True,
        )
        out.append(_numpy(output.logits))
        start = end
    return np.concatenate(out, axis=1)


def cached_batch(rng, vocab_size, steps=6):
    """Rows for `cached_logits`: prompts of two lengths, padded on the left."""
    width = PROMPT + steps
    return batch_of(rng, vocab_size, [[(3, width - 3)], [(0, width)]], width)


@torch.no_grad()
def greedy(model, prompt):
    """64 tokens after a prompt, and the smallest lead of the best logit over the next one along the way."""
    output = model.generate(
        _long(prompt)[None],
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.cat(output.logits).topk(2, dim=-1).values
    return output.sequences[0, len(prompt) :].numpy().astype(np.int32), float((best[:, 0] - best[:, 1]).min())


def decided_prompt(model, rng, margin=1e-3):
    """A prompt whose continuation no rounding can change, and that is not one token over and over."""
    for _ in range(50):
        prompt = rng.integers(0, model.config.vocab_size, PROMPT).astype(np.int32)
        tokens, lead = greedy(model, prompt)
        if lead > margin and len(set(tokens.tolist())) > 4:
            return prompt, tokens
    raise RuntimeError("no prompt with a clear continuation; take another seed for the model")


def _losses(model, batch):
    """Mean cross-entropy of the trained tokens, and the auxiliary loss with its coefficient, 0 if dense."""
    moe = {"output_router_logits": True} if hasattr(model.config, "router_aux_loss_coef") else {}
    labels = np.full_like(batch["tokens"], -100)
    trained = batch["weights"][:, :-1] > 0
    labels[:, 1:][trained] = batch["tokens"][:, 1:][trained]
    output = model(
        _long(batch["tokens"]),
        attention_mask=_long(batch["segment_ids"]),
        position_ids=_long(batch["positions"]),
        labels=_long(labels),
        **moe,
    )
    if not moe:
        return output.loss, torch.zeros(())
    auxiliary = model.config.router_aux_loss_coef * output.aux_loss
    return output.loss - auxiliary, auxiliary


def loss_and_gradient(model, batch):
    """Total loss of a step, and its gradient by tensor name of files on disk."""
    model.zero_grad()
    cross_entropy, auxiliary = _losses(model, batch)
    (cross_entropy + auxiliary).backward()
    weights = {name: parameter.data for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.grad
    gradient = saved_tensors(model)
    for name, parameter in model.named_parameters():
        parameter.data = weights[name]
    model.zero_grad()
    return np.float32((cross_entropy + auxiliary).item()), gradient


def gradient_noise(model, batch, draws=4):
    """How far rounding the weights to float32 once more moves each tensor of the gradient, relative to its largest."""
    expected = loss_and_gradient(model, batch)[1]
    weights = {name: parameter.data for name, parameter in model.named_parameters()}
    noise = dict.fromkeys(expected, 0.0)
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            rounding = 2**-24 * torch.randn(parameter.shape, generator=generator)
            parameter.data = weights[name] * (1 + rounding)
        for name, tensor in loss_and_gradient(model, batch)[1].items():
            moved = np.abs(tensor - expected[name]).max() / np.abs(expected[name]).max()
            noise[name] = max(noise[name], float(moved))
    for name, parameter in model.named_parameters():
        parameter.data = weights[name]
    return noise


@torch.no_grad()
def router(model, batch):
    """What each layer's router says, `[L, B * T, ...]` with padding, and the auxiliary loss before its coefficient."""
    seen = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, __, output: seen.append(output)) for layer in model.model.layers
    ]
    output = model(_long(batch["tokens"]), attention_mask=_long(batch["segment_ids"]), output_router_logits=True)
    for hook in hooks:
        hook.remove()
    router_logits, weights, experts = (torch.stack(part) for part in zip(*seen, strict=True))
    return {
        "logits": _numpy(router_logits),
        "probabilities": _numpy(F.softmax(router_logits, dim=-1)),
        "experts": _numpy(experts).astype(np.int32),
        "weights": _numpy(weights),
        "auxiliary_loss": _numpy(output.aux_loss).astype(np.float32),
    }


TRAINING = {
    "learning_rate": 3e-3,
    "schedule": "cosine",
    "warmup_ratio": 0.2,
    "min_lr_ratio": 0.1,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "adam_eps": 1e-8,
    "grad_clip": 2.5,
}
"""Settings of the training curve, under the names of `OptimConfig`."""
STEPS = 50


def learning_rate(step, steps, settings):
    """Linear warm-up whose last step has the peak rate, then half a cosine down to the final rate at the last step."""
    warmup = max(1, round(settings["warmup_ratio"] * steps))
    peak = settings["learning_rate"]
    if step < warmup:
        return peak * (step + 1) / warmup
    lowest = settings["min_lr_ratio"] * peak
    progress = (step + 1 - warmup) / (steps - warmup)
    return lowest + (peak - lowest) * (1 + math.cos(math.pi * progress)) / 2


def train(model, batches, settings):
    """A plain PyTorch loop: losses and gradient norms before clipping, one of each a step."""
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim > 1 and "embed_tokens" not in name else kept).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings["weight_decay"]}, {"params": kept, "weight_decay": 0.0}],
        betas=(settings["beta1"], settings["beta2"]),
        eps=settings["adam_eps"],
        foreach=False,
    )
    losses, norms = [], []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(batches), settings)
        optimizer.zero_grad()
        cross_entropy, auxiliary = _losses(model, batch)
        (cross_entropy + auxiliary).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), settings["grad_clip"]).item())
        losses.append((cross_entropy + auxiliary).item())
        optimizer.step()
    return np.asarray(losses, np.float32), np.asarray(norms, np.float32)


def training_batches(rng, vocab_size, steps=STEPS, rows=4, width=16):
    """Padded batches of a language that can be learnt: mostly, each token follows from the one before."""
    following = rng.permutation(vocab_size)
    batches = []
    for _ in range(steps):
        batch = step_batch(rng, vocab_size, rows, width)
        for t in range(1, width):
            chance = rng.random(rows) < 0.1
            batch["tokens"][:, t] = np.where(chance, batch["tokens"][:, t], following[batch["tokens"][:, t - 1]])
        batch["targets"][:, :-1] = batch["tokens"][:, 1:]
        batches.append(batch)
    return batches
