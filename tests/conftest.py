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


# --- The chat page -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    """A headless browser, or a skipped test."""
    from browser import launched

    with launched() as browser:
        yield browser


@pytest.fixture
def scripted():
    """The stand-in for the API."""
    from scripted_api import serving

    with serving() as server:
        yield server


@pytest.fixture
def page(chromium, scripted):
    """The chat page, connected to the stand-in; fails the test if anything goes wrong in it."""
    from browser import ready, watched

    with watched(chromium, scripted.url) as page:
        ready(page)
        yield page
