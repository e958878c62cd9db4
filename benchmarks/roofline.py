"""The roofline of a device, and the work of a step: what no implementation could do without, counted from shapes alone.

A step that does F operations and moves B bytes cannot take less than max(F / peak operations, B / peak bytes) seconds
(Williams et al., "Roofline", 2009). The share of the roofline is that time over the time that was measured; unlike MFU
alone it means something for decoding, which is bound by memory.
"""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from minillm_jax.config import ModelConfig
from minillm_jax.flops import count_params, find_device, flops_per_token, matrix_params, peak_flops

PEAK_BANDWIDTH: tuple[tuple[str, float], ...] = (
    # NVIDIA data sheets: memory bandwidth in bytes/s.
    ("GB200", 8000e9),
    ("B200", 8000e9),
    ("H200", 4800e9),
    ("GH200 144G", 4900e9),
    ("GH200", 4000e9),
    ("H100 PCIe", 2000e9),
    ("H100 NVL", 3900e9),
    ("H100", 3350e9),  # SXM
    ("A100 SXM4 80GB", 2039e9),
    ("A100 80GB PCIe", 1935e9),
    ("A100", 1555e9),
    ("A30", 933e9),
    ("A40", 696e9),
    ("A10", 600e9),
    ("L40S", 864e9),
    ("L40", 864e9),
    ("L4", 300e9),
    ("RTX A6000", 768e9),
    ("RTX 3090", 936e9),
    ("RTX 4090", 1008e9),
    ("RTX 5090", 1792e9),
    ("V100", 900e9),
    ("T4", 320e9),
    # Google Cloud TPU documentation, per chip; a jax device of v2 and v3 is one of a chip's two cores.
    ("TPU v2", 350e9),
    ("TPU v3", 450e9),
    ("TPU v4 lite", 614e9),
    ("TPU v4", 1228e9),
    ("TPU v5 lite", 819e9),
    ("TPU v5e", 819e9),
    ("TPU v5p", 2765e9),
    ("TPU v5", 2765e9),
    ("TPU v6 lite", 1640e9),
    ("TPU v6e", 1640e9),
)
"""(name within jax's `device_kind`, bytes/s of its memory), more specific names first."""


@dataclass(frozen=True)
class Work:
    """What a step has to do at least.

    Attributes:
        flops: floating-point operations.
        bytes: read from and written to memory.
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class Roofline:
    """What a device does at best.

    Attributes:
        flops: per second; dense bfloat16 on accelerators, float32 on CPU.
        bandwidth: bytes per second of its memory.
    """

    flops: float
    bandwidth: float

    def seconds(self, work: Work) -> float:
        """Return the shortest time that the work can take."""
        return max(work.flops / self.flops, work.bytes / self.bandwidth)

    def bound(self, work: Work) -> str:
        """Say what limits the work, `compute` or `memory`."""
        return "compute" if work.flops / self.flops >= work.bytes / self.bandwidth else "memory"


def roofline(device: jax.Device) -> Roofline | None:
    """Look a device up; None when its peaks are not known. A CPU's are measured: by a product, and by a copy."""
    flops = peak_flops(device)
    bandwidth = _copied_bytes_per_second() if device.platform == "cpu" else find_device(device, PEAK_BANDWIDTH)
    return None if flops is None or bandwidth is None else Roofline(flops, bandwidth)


@functools.cache
def _copied_bytes_per_second(size: int = 1 << 24, seconds: float = 0.2) -> float:
    """Time `x + 1` on 64 MiB of float32 and return the best rate of bytes read and written, per jax CPU device."""
    cpu = jax.local_devices(backend="cpu")
    x = jax.device_put(jnp.ones(size, jnp.float32), cpu[0])
    add = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    x = add(x).block_until_ready()
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        x = add(x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2.0 * x.nbytes / best / len(cpu)


def against(work: Work, seconds: float, peaks: Roofline | None) -> dict[str, object]:
    """Hold measured seconds against the roofline, as fields of a benchmark's line."""
    line: dict[str, object] = {"flops": work.flops, "bytes": work.bytes}
    if peaks is None:
        return line | {"roofline_share": None}
    return line | {
        "peak_flops": peaks.flops,
        "peak_bytes_per_second": peaks.bandwidth,
        "roofline_share": round(peaks.seconds(work) / seconds, 4),
        "bound": peaks.bound(work),
    }


# --- Work of a model ----------------------------------------------------------------------------------------------


def _touched_experts(config: ModelConfig, tokens: int) -> float:
    """Experts per layer that at least one of some tokens is expected to visit, if all are equally likely."""
    return config.num_experts * (1.0 - (1.0 - config.num_experts_per_tok / config.num_experts) ** tokens)


def _read_params(config: ModelConfig, tokens: int) -> float:
    """Parameters that a forward pass over some tokens has to read: of embeddings the rows looked up, if untied."""
    count = float(count_params(config))
    if not config.tie_word_embeddings:
        count -= (config.vocab_size - min(tokens, config.vocab_size)) * config.hidden_size
    if config.use_moe:
        idle = config.num_experts - _touched_experts(config, tokens)
        count -= idle * config.num_hidden_layers * 3 * config.hidden_size * config.expert_size
    return count


def _cache_bytes_per_token(config: ModelConfig, itemsize: int) -> int:
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_size * itemsize


def train_work(config: ModelConfig, batch: int, length: int, itemsize: int) -> Work:
    """Count a training step with AdamW over full rows.

    FLOPs are those of `flops_per_token` (PaLM's convention). Bytes: of every parameter 40, all in float32: read forward
    and backward, gradient written and read, parameter and both moments read and written; and the residual stream
    between layers, written once and read forward and backward, which even full recomputation needs.

    Args:
        config: the model.
        batch: rows B.
        length: tokens T per row.
        itemsize: bytes of an activation.
    """
    tokens = batch * length
    stream = 3 * tokens * config.num_hidden_layers * config.hidden_size * itemsize
    return Work(tokens * flops_per_token(config, length), 40 * count_params(config) + stream)


def prefill_work(config: ModelConfig, batch: int, length: int, itemsize: int, param_itemsize: int) -> Work:
    """Count the reading of prompts: a forward pass that fills the cache and unembeds the last token of each row.

    Attention counts all T x T pairs, as in training. Bytes: parameters once, keys and values written, and the residual
    stream between layers written and read.
    """
    tokens, head = batch * length, config.vocab_size * config.hidden_size
    matrices = config.num_hidden_layers * matrix_params(config)
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_size * length
    flops = tokens * (2.0 * matrices + attention) + 2.0 * batch * head
    stream = 2 * tokens * config.num_hidden_layers * config.hidden_size * itemsize
    cache = tokens * _cache_bytes_per_token(config, itemsize)
    return Work(flops, _read_params(config, tokens) * param_itemsize + cache + stream)


def decode_work(config: ModelConfig, batch: int, context: float, itemsize: int, param_itemsize: int) -> Work:
    """Count one decode step: every row draws one token and reads its context.

    Bytes: parameters once (of experts, those that B tokens are expected to visit), keys and values of the context read
    and those of the new token written. Slots of the cache that hold no token are not counted: reading them is waste.

    Args:
        config: the model.
        batch: rows B.
        context: tokens that a row sees, the new one included; a mean over steps need not be whole.
        itemsize: bytes of an activation and of an element of the cache.
        param_itemsize: bytes of a parameter as it is stored.
    """
    multiplied = config.num_hidden_layers * matrix_params(config) + config.vocab_size * config.hidden_size
    attention = 4.0 * config.num_hidden_layers * config.num_attention_heads * config.head_size * context
    cache = batch * context * _cache_bytes_per_token(config, itemsize)
    return Work(batch * (2.0 * multiplied + attention), _read_params(config, batch) * param_itemsize + cache)
