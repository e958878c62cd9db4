"""What every benchmark says and does alike: the machine it ran on, medians with their spread, one JSON line.

Benchmarks are run as modules from the repository's root (`python -m benchmarks.train`): run by its path, a script would
find its neighbours `serve.py` and `train.py` in place of the packages of these names.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def cpu_name() -> str:
    """The processor's marketing name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


@functools.cache
def machine() -> dict[str, Any]:
    """Return the fields that a line must have for its numbers to mean anything: hardware, versions, memory.

    `memory_gib` is what JAX may use of the first device's memory, or on CPU what the machine has.
    """
    import jax  # here, because what measures other libraries must not start it

    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    memory = stats.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "hardware": f"{device.device_kind} {platform.machine()}",
        "devices": jax.device_count(),
        "memory_gib": round(memory / 2**30, 1),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "driver": _driver() if device.platform == "gpu" else None,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "flax": version("flax"),
    }


def _driver() -> str | None:
    """Version of NVIDIA's driver, where its tool is installed."""
    if shutil.which("nvidia-smi") is None:
        return None
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(words, capture_output=True, text=True).stdout.split()
    return lines[0] if lines else None


def peak_memory_gib() -> float | None:
    """Most memory that arrays and programs of this process have had on the first device; None where it is not told."""
    import jax

    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else round(peak / 2**30, 3)


def timed(call: Callable[[], Any], count: int, warmup: int = 1) -> list[float]:
    """Time calls one by one.

    Args:
        call: does the work and waits for it.
        count: timed calls.
        warmup: calls before the clock starts.

    Returns:
        Seconds of each timed call.
    """
    seconds = []
    for _ in range(warmup + count):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return seconds[warmup:]


def spread(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Return median and interquartile range of seconds, to four digits; a single value has no spread."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [*seconds] * 3
    return {f"{name}_median": digits(median), f"{name}_iqr": digits(high - low)}


def digits(value: float) -> float:
    """Round to four significant digits: a step of a GPU may take a tenth of a millisecond."""
    return float(f"{value:.4g}")


def emit(line: Mapping[str, Any], append: str | None = None) -> None:
    """Print a measurement as one JSON line, and append it to a file at once, so that an interrupted run keeps it."""
    text = json.dumps(line)
    print(text, flush=True)
    if append is not None:
        path = Path(append)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def note(text: str) -> None:
    """Say on stderr what is going on; stdout is for measurements."""
    print(text, file=sys.stderr, flush=True)
