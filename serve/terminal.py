"""The terminal: replies go to stdout and everything else to stderr, so that either end can be a pipe.

Nothing that a model or a server says can drive the terminal: control characters are shown as symbols. This file needs
no jax.
"""

from __future__ import annotations

import importlib
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from rich.console import Console


@dataclass(frozen=True)
class Screen:
    """Where replies go, and where everything else goes."""

    write: Callable[[str], None]
    notice: Callable[[str], None]
    show_speed: bool = False


def open_screen() -> Screen:
    """Write replies to stdout and dim notices to stderr."""
    console = Console(stderr=True, highlight=False)
    at_terminal = sys.stdout.isatty()

    def write(text: str) -> None:
        sys.stdout.write(printable(text) if at_terminal else text)
        sys.stdout.flush()

    def notice(text: str) -> None:
        console.print(text, style="dim", markup=False, soft_wrap=True)

    return Screen(write, notice, show_speed=at_terminal)


def typed_lines() -> Iterator[str]:
    """Yield lines typed at the terminal, with line editing where Python has it, until Ctrl-D."""
    with suppress(ImportError):
        importlib.import_module("readline")  # importing it is what makes input() editable
    while True:
        try:
            yield input("> ")
        except EOFError:
            print(file=sys.stderr)
            return


def printable(text: str) -> str:
    """Show control characters as symbols, so that no model can drive the terminal."""
    return "".join(
        _symbol(char) if unicodedata.category(char) == "Cc" and char not in "\n\t" else char for char in text
    )


def _symbol(control: str) -> str:
    return chr(0x2400 + ord(control)) if control < " " else "�"
