"""What choosing an implementation needs: the platform that is compiled for, a trial of a kernel, a word on the choice.

A kernel of somebody else may not compile on a machine, or read a mask in another way than we do. So on an accelerator
one is chosen only after it gave, on a small example, what plain XLA operations give; that costs seconds, once.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

_log = logging.getLogger(__name__)

_said: set[tuple[str, ...]] = set()
_tried: dict[Any, str | None] = {}


def platform() -> str:
    """Name what the present program is compiled for, `cpu`, `gpu` or `tpu`: the mesh's devices, or the default ones.

    A mesh may consist of devices that this machine does not have, when programs are compiled ahead for them.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return present_platform() if device is None else _family(device.platform)


def present_platform() -> str:
    """Name the platform of the devices that programs run on here, if no other is asked for."""
    return _family(jax.default_backend())


def _family(name: str) -> str:
    return "gpu" if name in ("cuda", "rocm") else name


def announce(what: str, choice: str, platform: str, dtype: str, shape: str) -> None:
    """Log a choice, once per process: the first shape that it was made for stands for others."""
    if (key := (what, choice, platform, dtype)) not in _said:
        _said.add(key)
        _log.info("%s: %s (%s, %s, %s)", what, choice, platform, dtype, shape)


@functools.cache
def installed(module: str) -> bool:
    """Tell whether an optional package can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def trial(key: tuple[Any, ...], ours: Callable[[], Any], theirs: Callable[[], Any], tolerance: float) -> str | None:
    """Run a kernel and its definition on this process's first device, and compare; the first time for each key.

    Args:
        key: what the answer depends on; its first element names the kernel.
        ours: makes inputs, runs the kernel forward and backward, and returns a tree of arrays.
        theirs: does the same by definition.
        tolerance: of the largest difference, relative to the largest value of each array.

    Returns:
        None if they agree, else what went wrong.
    """
    if key not in _tried:
        # Another thread has neither the trace nor the mesh that we may be called in.
        with ThreadPoolExecutor(1) as pool:
            _tried[key] = pool.submit(_compare, ours, theirs, tolerance).result()
        if (reason := _tried[key]) is not None:
            _log.warning("%s is left out: %s", key[0], reason)
    return _tried[key]


def _compare(ours: Callable[[], Any], theirs: Callable[[], Any], tolerance: float) -> str | None:
    try:
        with jax.default_device(jax.local_devices()[0]):
            ours_, theirs_ = (jax.tree.map(np.asarray, jax.jit(function)()) for function in (ours, theirs))
    except Exception as error:  # whatever a compiler or a driver may raise: the kernel cannot be used
        return f"it failed with {type(error).__name__}: {str(error)[:300]}"
    for a, b in zip(jax.tree.leaves(ours_), jax.tree.leaves(theirs_), strict=True):
        a, b = a.astype(np.float32), b.astype(np.float32)
        error_ = np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
        if not error_ <= tolerance:
            return f"its results differ from XLA's by {error_:.2g} of the largest value"
    return None
