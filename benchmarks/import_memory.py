"""Peak memory and time of importing a large Hugging Face folder.

A Llama folder of random bfloat16 weights is made on the spot (2 GB by default) and imported by fresh processes: by
`minillm_jax.load`, and by the import command. One JSON line each: `peak_over_limit` compares the process's peak
resident memory with 1.3 times the bytes of the parameters plus 500 MB.

    python benchmarks/import_memory.py
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import tyro
from safetensors.numpy import save_file

from minillm_jax.config import ModelConfig
from minillm_jax.hf_config import model_config_to_hf
from minillm_jax.hf_tensors import INDEX_FILE, hf_tensor_shapes, param_shapes
from minillm_jax.tokenizer import train_tokenizer

LAYER = 2 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192)
"""Bytes of one layer of the measured shape."""
LOAD = "import sys, jax, minillm_jax as mj; jax.block_until_ready(mj.load(sys.argv[1], dtype=sys.argv[2]).params)"


@dataclass(frozen=True)
class MemoryConfig:
    """What is measured."""

    gigabytes: float = 2.0
    """Size of the folder's weights in GB."""
    folder: str | None = None
    """Where to make it; None is a temporary folder, which is deleted afterwards."""


def make_folder(folder: Path, gigabytes: float) -> ModelConfig:
    """Write a Llama folder with random weights in two shards, and a small tokenizer."""
    config = ModelConfig(
        vocab_size=32000,
        hidden_size=2048,
        num_hidden_layers=max(1, round((gigabytes * 1e9 - 2 * 2 * 32000 * 2048) / LAYER)),
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=8192,
        tie_word_embeddings=False,
    )
    shapes = hf_tensor_shapes(param_shapes(config), config)
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: files[i * 2 // len(shapes)] for i, name in enumerate(shapes)}
    noise = (0.02 * np.random.default_rng(0).standard_normal(2**24, np.float32)).astype(ml_dtypes.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        names = [name for name in shapes if weight_map[name] == file]
        save_file({name: np.resize(noise, shapes[name]) for name in names}, folder / file)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(model_config_to_hf(config, dtype="bfloat16")))
    train_tokenizer(["some text to learn from"], 300).save(folder)
    return config


def peak_of(command: list[str]) -> tuple[float, float]:
    """Run a command in a process of its own; return its peak resident memory in bytes, and seconds."""
    start = time.perf_counter()
    measured = [sys.executable, "-c", f"import resource, subprocess, sys; subprocess.run({command!r}, check=True); "
                "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"]  # fmt: skip
    output = subprocess.run(measured, check=True, capture_output=True, text=True).stdout
    unit = 1 if sys.platform == "darwin" else 1024
    return float(output.split()[-1]) * unit, time.perf_counter() - start


def measure(folder: Path, config: ModelConfig) -> None:
    """Import in both dtypes by both ways, printing a line for each."""
    count = sum(int(np.prod(shape)) for shape in hf_tensor_shapes(param_shapes(config), config).values())
    with tempfile.TemporaryDirectory(dir=folder.parent) as runs:
        for dtype, size in (("bfloat16", 2), ("float32", 4)):
            command = [sys.executable, "-m", "minillm_jax.hf", "import", "--from", str(folder), "--dtype", dtype]
            ways = {
                "load": [sys.executable, "-c", LOAD, str(folder), dtype],
                "import": [*command, "--out_dir", str(Path(runs) / dtype)],
            }
            for way, arguments in ways.items():
                peak, seconds = peak_of(arguments)
                line = {
                    "name": f"hf_{way}",
                    "hardware": platform.processor() or platform.machine(),
                    "dtype": dtype,
                    "parameter_bytes": count * size,
                    "peak_bytes": int(peak),
                    "peak_over_limit": round(peak / (1.3 * count * size + 5e8), 3),
                    "seconds": round(seconds, 1),
                }
                print(json.dumps(line), flush=True)


def main() -> int:
    """Make the folder, measure, and clear up."""
    config = tyro.cli(MemoryConfig, description=__doc__, use_underscores=True)
    if config.folder is not None:
        measure(Path(config.folder), make_folder(Path(config.folder), config.gigabytes))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        measure(folder, make_folder(folder, config.gigabytes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
