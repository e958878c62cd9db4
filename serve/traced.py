"""Programs kept as tracing left them, so that a restart traces nothing.

JAX keeps what compiling gave, but finds it by what tracing gave, and tracing the engine's programs takes longer than
reading them from disk. A kept program is found by everything that tracing reads: the function and its settings, shapes
of its arguments, JAX's configuration, versions, and the source files of this project.
"""

from __future__ import annotations

import functools
import hashlib
import os
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax import export

import minillm_jax
from minillm_jax.sampling import Penalties, SamplingArrays
from minillm_jax.slots import SlotCache
from serve.programs import Chunk, Logprobs, Piece, Rows, Segments, State

MOST_FILES = 256
"""Files that are kept; those unused for longest are removed."""
DIGEST = hashlib.sha256().digest_size
"""Bytes at a file's beginning that the others must have as their digest."""

for _kind in (Chunk, Logprobs, Penalties, Piece, Rows, SamplingArrays, Segments, SlotCache, State):
    export.register_pytree_node_serialization(
        _kind,
        serialized_name=f"{_kind.__module__}.{_kind.__qualname__}",
        serialize_auxdata=lambda _: b"",
        deserialize_auxdata=lambda _: (),
    )


def folder() -> Path | None:
    """Return where programs are kept: beside the compiled ones, and nowhere if those are not kept."""
    compiled: str | None = jax.config.values["jax_compilation_cache_dir"]
    return None if compiled is None else Path(compiled) / "traced"


def lower(function: functools.partial[Any], donated: int, *arguments: Any) -> jax.stages.Lowered:
    """Lower a function for arrays of one device, as `jax.jit(function, donate_argnums=donated).lower(*arguments)` does.

    Args:
        function: of a module's function and settings whose `repr` says all.
        donated: number of the argument whose buffers the result may take.
        arguments: arrays, or what has their shapes.
    """
    kept = folder()
    if kept is None:
        return jax.jit(function, donate_argnums=donated).lower(*arguments)
    path = kept / f"{function.func.__name__}-{_key(function, donated, arguments)}"
    program = _read(path)
    if program is None:
        program = export.export(jax.jit(function, donate_argnums=donated))(*arguments)
        _write(path, bytes(program.serialize()))
    return jax.jit(program.call, donate_argnums=donated).lower(*arguments)


def _key(function: functools.partial[Any], donated: int, arguments: tuple[Any, ...]) -> str:
    leaves, tree = jax.tree.flatten(arguments)
    shapes = [(leaf.shape, str(leaf.dtype), getattr(leaf, "weak_type", False)) for leaf in leaves]
    settings = sorted(function.keywords.items()), function.args, donated
    versions = *map(version, ("jax", "jaxlib", "flax")), jax.default_backend()
    values = sorted((name, str(value)) for name, value in jax.config.values.items())
    text = repr((function.func.__module__, settings, str(tree), shapes, versions, values, _sources()))
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _sources() -> str:
    """Digest the files of the packages that programs are traced from."""
    digest = hashlib.sha256()
    for package in (Path(minillm_jax.__file__).parent, Path(__file__).parent):
        for path in sorted(package.rglob("*.py")):
            digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _read(path: Path) -> export.Exported | None:
    """Read a file that `_write` wrote; None if there is none, or another version's, or a damaged one."""
    try:
        data = path.read_bytes()
        if hashlib.sha256(data[DIGEST:]).digest() != data[:DIGEST]:
            return None
        os.utime(path)
        return export.deserialize(bytearray(data[DIGEST:]))
    except (OSError, ValueError):
        return None


def _write(path: Path, data: bytes) -> None:
    """Write a file at once or not at all, and remove the oldest ones; a full disk only costs time at the next start."""
    new = path.with_name(f"{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(hashlib.sha256(data).digest() + data)
        new.replace(path)
        for old in sorted(path.parent.iterdir(), key=lambda file: file.stat().st_mtime)[:-MOST_FILES]:
            old.unlink(missing_ok=True)
    with suppress(OSError):
        new.unlink(missing_ok=True)
