"""The peer to beat: the same dense model and training step in plain PyTorch.

A preset's shapes go in; one JSON line with seconds per step and tokens per second comes out. It is written the way
a careful PyTorch user would write it (fused attention, fused AdamW, autocast to bfloat16 on a GPU, optional
torch.compile), because a weak peer would make our own numbers worthless. torch is the optional extra `bench`.

    python -m benchmarks.torch_baseline --preset minillm --batch_size 8 --seq_len 512
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import tyro

from benchmarks.common import cpu_name, digits, emit, spread, timed
from minillm_jax.config import PRESETS, ConfigError, ModelConfig, OptimConfig

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
except ImportError:
    sys.exit("torch_baseline: PyTorch is not installed here; install the extra with: pip install 'minillm-jax[bench]'")


@dataclass(frozen=True)
class BaselineConfig:
    """What is measured."""

    preset: str = "minillm"
    """Model shape, one of the dense presets."""
    batch_size: int = 8
    """Rows B per step."""
    seq_len: int = 512
    """Tokens T per row."""
    steps: int = 8
    """Timed steps."""
    warmup: int = 2
    """Steps before the clock starts."""
    compile: bool = False
    """Compile model and loss with torch.compile."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations, as in our own ComputeConfig: auto is float32 on CPU, and autocast to bfloat16 on a GPU."""
    threads: int | None = None
    """Threads inside one operation; None leaves PyTorch's own choice."""
    append: str | None = None
    """File that the line is appended to as well."""


def rotary_table(config: ModelConfig, seq_len: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each [T, H]."""
    half = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), config.rope_theta**-half)  # [T, H/2]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE in Hugging Face's layout (pairs are H/2 apart) to [B, N, T, H]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention, [B, T, D] -> [B, T, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        query_size = config.num_attention_heads * config.head_size
        key_size = config.num_key_value_heads * config.head_size
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(config.head_size, eps=config.rms_norm_eps) if config.use_qk_norm else nn.Identity() for _ in "qk"
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend; `cos` and `sin` are [T, H]."""
        batch, length, _ = x.shape
        q, k, v = (proj(x).view(batch, length, -1, self.head_size) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q = rotate(self.q_norm(q).transpose(1, 2), cos, sin)  # [B, N, T, H]
        k = rotate(self.k_norm(k).transpose(1, 2), cos, sin)  # [B, K, T, H]
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class Block(nn.Module):
    """Pre-norm transformer block with a SwiGLU layer, [B, T, D] -> [B, T, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gate_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down_proj = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One residual step of attention, one of SwiGLU."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        normed = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))


class Transformer(nn.Module):
    """The dense model of `ModelConfig`; returns the mean cross-entropy of [B, T] targets."""

    def __init__(self, config: ModelConfig, seq_len: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        for name, param in self.named_parameters():
            if param.ndim == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = (2 * config.num_hidden_layers) ** -0.5 if residual else 1.0
                nn.init.normal_(param, std=config.initializer_range * scale)
        cos, sin = rotary_table(config, seq_len)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats per token."""
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = self.lm_head(self.norm(x))  # [B, T, V]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_step(
    model: nn.Module, optim: OptimConfig, autocast: bool, device: torch.device
) -> Callable[[Tensor, Tensor], float]:
    """Build one optimizer step: forward, backward, clip by global norm, AdamW with matrices decayed.

    With `autocast` the forward pass computes in bfloat16 where PyTorch holds that safe; weights stay float32. The
    returned function takes tokens and targets, both [B, T], and returns the loss.
    """
    params = list(model.parameters())
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in name]
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    # fused: one pass over memory; the foreach AdamW took six times as long on two CPU cores.
    optimizer = torch.optim.AdamW(
        groups, lr=optim.learning_rate, betas=(optim.beta1, optim.beta2), eps=optim.adam_eps, fused=True
    )

    def step(tokens: Tensor, targets: Tensor) -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = model(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(params, optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device, so the clock sees whole steps

    return step


def main() -> None:
    """Measure and print one JSON line."""
    args = tyro.cli(BaselineConfig, description=__doc__, use_underscores=True)
    if args.preset not in PRESETS or PRESETS[args.preset].use_moe:
        dense = ", ".join(name for name, preset in PRESETS.items() if not preset.use_moe)
        raise ConfigError(f"--preset {args.preset}: the baseline has dense models only: {dense}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = PRESETS[args.preset]
    model: nn.Module = Transformer(config, args.seq_len).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    autocast = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    step = make_step(torch.compile(model) if args.compile else model, OptimConfig(), autocast, device)
    ids = torch.randint(config.vocab_size, (args.batch_size, args.seq_len + 1), device=device)
    seconds = spread("step_seconds", timed(lambda: step(ids[:, :-1], ids[:, 1:]), args.steps, args.warmup))
    result = {
        "name": "torch_baseline",
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "compiled": args.compile,
        "dtype": "bfloat16" if autocast else "float32",
        "preset": args.preset,
        "batch_size": args.batch_size,
        "seq_len": args.seq_len,
        "parameters": parameters,
        **seconds,
        "steps": args.steps,
        "tokens_per_second": digits(args.batch_size * args.seq_len / seconds["step_seconds_median"]),
    }
    emit(result, args.append)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"torch_baseline: {error}")
