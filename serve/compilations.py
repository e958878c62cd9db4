"""Counts the programs that XLA compiles, by thread, so that a server can show that it compiles none while it serves.

JAX reports each one to its monitoring listeners on the thread that asked for it, those found in the persistent cache
included.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import jax.monitoring

COMPILED = "/jax/core/compile/backend_compile_duration"

_by_thread: Counter[int] = Counter()


def _count(event: str, duration_secs: float, **_: Any) -> None:
    if event == COMPILED:
        _by_thread[threading.get_ident()] += 1


jax.monitoring.register_event_duration_secs_listener(_count)


def compilations_here() -> int:
    """Count the programs that this thread has had compiled."""
    return _by_thread[threading.get_ident()]
