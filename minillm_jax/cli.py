"""What every command does around its work: tell people about errors in one line, and set JAX up for the machine."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from minillm_jax.errors import UserError


@contextmanager
def user_errors() -> Iterator[None]:
    """Print errors that are meant for people as one line and exit with status 2; exit with 130 on Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        sys.exit(130)
    except UserError as error:
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True)
        sys.exit(2)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def setup_jax() -> None:
    """Keep compiled programs in ~/.cache/minillm_jax/jax, and freed memory for reuse; say which kernels are chosen.

    JAX's own variables JAX_COMPILATION_CACHE_DIR and JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS come first.
    """
    import jax  # here, because not every command needs it, and it takes seconds

    defaults = {
        "jax_compilation_cache_dir": str(Path("~/.cache/minillm_jax/jax").expanduser()),
        "jax_persistent_cache_min_compile_time_secs": 0,  # small ones add up to a second
    }
    for name, value in defaults.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    _say_choices()
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        _keep_freed_memory()


class _ToStderr(logging.Handler):
    """Print records to whatever standard error is at the time: a progress bar puts its own in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _say_choices() -> None:
    """Show which implementations are chosen for this machine."""
    log = logging.getLogger("minillm_jax.kernels")
    if not log.handlers:
        log.addHandler(_ToStderr())
        log.setLevel(logging.INFO)
        log.propagate = False


def _keep_freed_memory() -> None:
    """Make glibc keep large buffers for reuse.

    XLA's CPU backend frees a step's buffers when it ends; by default they go back to the kernel, and the next step
    pays a page fault for every 4 KiB that it touches again (a tenth of a training step of the default model).
    """
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
