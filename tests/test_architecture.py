"""The import rules of the house: arrows point one way, and code that needs no accelerator imports none."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "minillm_jax"
RANK = [
    "errors reasoning",
    "config",
    "hf_config tokenizer_files",
    "tokenizer_training",
    "tokenizer chat data",
    "kernels matmul_blocked",
    "matmul_triton",
    "matmul_kernels",
    "sharding flops matmul rope cli",
    "cache",
    "attention_xla",
    "attention_kernels",
    "attention moe",
    "slots expert_parallel",
    "model",
    "losses optim sampling metrics reward quantize",
    "lora checkpoint_files sampler distillation hf_tensors",
    "lora_peft checkpoint on_policy decoding",
    "adapter_file",
    "pretrained",
    "trainer lm",
    "scoring run preference teacher samples",
    "hf lora_commands",
    "evaluation",
]
"""Modules of the library; each imports only those of earlier lines, and tokenizer, chat and data one another."""
RANK_OF = {name: rank for rank, names in enumerate(RANK) for name in names.split()}
TOGETHER = {"tokenizer", "chat", "data"}
WITHOUT_JAX = {
    "errors",
    "reasoning",
    "config",
    "hf_config",
    "tokenizer_files",
    "tokenizer_training",
    "tokenizer",
    "chat",
    "data",
}
FILES = [p for folder in ("minillm_jax", "train", "rl", "serve") for p in (ROOT / folder).rglob("*.py")]


def imports(path):
    """Absolute module names that a file imports anywhere, what it does when it is run as a command aside."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if ast.unparse(node).splitlines()[0] != "if __name__ == '__main__':"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def part(module):
    """`minillm_jax.data.loader` → `data`."""
    return module.split(".")[1] if module.count(".") else None


def test_the_api_loads_no_jax():
    program = "import serve.api, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    package, *rest = path.relative_to(ROOT).with_suffix("").parts
    found = list(imports(path))
    if package != "minillm_jax":
        others = {"train", "rl", "serve"} - {package}
        assert not [m for m in found if m.split(".")[0] in others]
        if package == "serve" and rest[0] in ("api", "schemas", "protocol"):
            assert not [m for m in found if m.split(".")[0] == "jax"]
        return
    assert not [m for m in found if m.split(".")[0] in ("train", "rl", "serve")]
    if rest[0] == "__init__":
        return
    here = rest[0]
    assert here in RANK_OF, f"give minillm_jax/{here} a place in RANK"
    for module in found:
        if module.split(".")[0] == "minillm_jax" and (there := part(module)) not in (None, here):
            assert RANK_OF[there] < RANK_OF[here] or {here, there} <= TOGETHER, f"{here} imports {there}"
        if here in WITHOUT_JAX:
            assert module.split(".")[0] not in ("jax", "flax", "optax"), f"{here} imports {module}"
