"""Training steps compile for a slice of 16 TPU chips, with the kernels in the program. No TPU is needed.

The package libtpu brings the compiler; these tests are skipped only where it is not installed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("libtpu", reason="the compiler for TPU comes with the package libtpu, of the extra conformance")

pytestmark = pytest.mark.conformance

ROOT = Path(__file__).parent.parent.parent
MESHES = ["data=16", "fsdp=16", "tensor=4,data=4", "expert=4,data=4", "data=4,fsdp=2,tensor=2"]
SPLASH = ["splash_mha_dkv", "splash_mha_dq", "splash_mha_fwd"]


@pytest.mark.parametrize("mesh", MESHES)
def test_training_steps_compile_with_flash_attention_and_grouped_products(mesh):
    # Without TPU_SKIP_MDS_QUERY libtpu asks the network which machine it is on.
    env = dict(os.environ, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", PYTHONPATH=str(ROOT))
    command = [sys.executable, "tests/conformance/tpu_programs.py", mesh]
    result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert result.returncode == 0, result.stderr[-3000:]
    kernels = json.loads(result.stdout.splitlines()[-1])
    assert kernels == {"dense": SPLASH, "experts": ["gmm", *SPLASH, "tgmm"]}
