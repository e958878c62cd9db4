"""Settings of all tests: float32 on CPU, compiled programs kept between runs, reproducible property tests."""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "jax"))
# Tiny programs run once, so compiling them is nearly all the time there is.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "minillm", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("minillm")


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_do_not_pile_up():
    """Unload a module's programs when it is done: each holds memory maps, and Linux gives a process 65,530 of them."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
