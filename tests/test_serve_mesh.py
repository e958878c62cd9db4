"""The engine on a mesh draws the tokens that it draws on one device, an adapter's among them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        ("dense", "data=2,fsdp=2,tensor=2"),
        pytest.param("dense", "data=2,tensor=4", marks=pytest.mark.slow),
        pytest.param("moe", "data=2,expert=4", marks=pytest.mark.slow),
    ],
)
def test_a_model_on_a_mesh_gives_the_tokens_of_one_device(model, mesh):
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(HERE.parent),
    }
    command = [sys.executable, str(HERE / "serve_on_a_mesh.py"), model, mesh]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=580)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
