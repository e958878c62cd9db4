"""Model FLOPs utilisation from shapes alone: parameters, training FLOPs per token, and what a device could do at best.

A ModelConfig or a jax device goes in, a number comes out. The counting convention is PaLM's, so that the MFU we print
can be held against published ones; only the peak of a CPU, which no data sheet tells, is measured.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from minillm_jax.config import ModelConfig

if TYPE_CHECKING:
    import jax


def _layer_params(config: ModelConfig, active: bool) -> tuple[int, int]:
    """Parameters of one layer: (in matrices that multiply every token, in norms and biases)."""
    hidden, head = config.hidden_size, config.head_size
    query_size, key_size = config.num_attention_heads * head, config.num_key_value_heads * head
    matrices = 2 * hidden * query_size + 2 * hidden * key_size  # q and o; k and v
    vectors = 2 * hidden
    if config.use_qk_norm:
        vectors += 2 * head
    if config.attention_bias:
        vectors += query_size + 2 * key_size
    if config.use_moe:
        experts = (config.num_experts_per_tok if active else config.num_experts) + config.n_shared_experts
        matrices += hidden * config.num_experts + experts * 3 * hidden * config.expert_size
    else:
        matrices += 3 * hidden * config.mlp_size
    return matrices, vectors


def matrix_params(config: ModelConfig) -> int:
    """Count the parameters of one layer that multiply a token: all projections, of the experts those it visits."""
    return _layer_params(config, active=True)[0]


def count_params(config: ModelConfig, active: bool = False) -> int:
    """Count the parameters of a model from its shape alone.

    Args:
        config: the model.
        active: count only what one token uses: of the routed experts, `num_experts_per_tok`.
    """
    matrices, vectors = _layer_params(config, active)
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return config.num_hidden_layers * (matrices + vectors) + tables + config.hidden_size


def flops_per_token(config: ModelConfig, seq_len: int, *, frozen: bool = False) -> float:
    """Count the floating-point operations that training spends on one token, forward and backward.

    PaLM's convention (arXiv:2204.02311, appendix B), so that MFU compares with published numbers: `6 P + 12 L N H T`.
    P are the parameters that multiply every token: all projections and the output head (tied or not), the active
    experts only, neither embedding look-up nor norms. The second term is attention's two products over T keys; it is
    not halved for causality, nor shortened where packing keeps documents apart. Recomputation (remat) does not count.

    Args:
        config: the model.
        seq_len: tokens T per row.
        frozen: the weights are not trained (an adapter is): their own gradients, 2 P of the 6, are never computed.
    """
    matrices = matrix_params(config)
    head = config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_size * seq_len
    return (4.0 if frozen else 6.0) * (config.num_hidden_layers * matrices + head) + 12.0 * attention


PEAK_BF16_FLOPS: tuple[tuple[str, float], ...] = (
    # NVIDIA data sheets and architecture white papers: dense tensor-core bfloat16 with float32 accumulation; sheets
    # quote twice these numbers "with sparsity". V100 and T4 have no bfloat16 units, so no peak is claimed for them.
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),  # SXM
    ("A100", 312e12),
    ("A30", 165e12),
    ("A40", 149.7e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX A6000", 154.8e12),
    ("RTX 3090", 71e12),
    ("RTX 4090", 165.2e12),
    ("RTX 5090", 209.5e12),
    # Google Cloud TPU documentation, per chip; a jax device of v2 and v3 is one of a chip's two cores.
    ("TPU v2", 22.5e12),
    ("TPU v3", 61.5e12),
    ("TPU v4 lite", 137e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
)
"""(name within jax's `device_kind`, dense bfloat16 FLOP/s), more specific names first."""


def peak_flops(device: jax.Device) -> float | None:
    """Look up the FLOP/s that a device reaches at best; None when it is not known.

    Accelerators: the maker's dense bfloat16 number. CPU: measured, what a float32 matrix product reaches here, so that
    on a CPU "MFU" reads as the share of that; CPU devices of one process share its cores, and the number.
    """
    if device.platform == "cpu":
        return _measured_cpu_flops()
    return find_device(device, PEAK_BF16_FLOPS)


def find_device(device: jax.Device, table: Sequence[tuple[str, float]]) -> float | None:
    """Look a device up by its `device_kind` in a table of (name, value), more specific names first; None if absent."""
    # Whole words, so that "A100" is found in "NVIDIA A100-SXM4-80GB" but "L4" is not found in "NVIDIA L40S".
    words = set(device.device_kind.lower().replace("-", " ").split())
    if "laptop" in words:  # shares the desktop card's name, not its speed
        return None
    return next((value for name, value in table if words.issuperset(name.lower().split())), None)


@functools.cache
def _measured_cpu_flops(size: int = 1024, seconds: float = 0.2) -> float:
    """Time float32 products of two [size, size] matrices and return the best rate, per jax CPU device."""
    import jax
    import jax.numpy as jnp

    cpu = jax.local_devices(backend="cpu")
    matrix = jax.device_put(jnp.ones((size, size), jnp.float32), cpu[0])
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best / len(cpu)
