"""Path specs of the command line (`a.jsonl`, `a.jsonl:0.7`, a folder) to the files that they name and their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minillm_jax.data.errors import DataError


@dataclass(frozen=True)
class Source:
    """One path spec: the files that it names, in order, and its mixing weight if one was given."""

    path: Path
    files: tuple[Path, ...]
    weight: float | None = None


def parse_path_spec(spec: str) -> tuple[Path, float | None]:
    """Split `a.jsonl:0.7` into path and weight; a path that exists as written is never split.

    Raises:
        DataError: the weight is not a positive number.
    """
    head, colon, tail = spec.rpartition(":")
    if Path(spec).exists() or not colon:
        return Path(spec), None
    try:
        weight = float(tail)
    except ValueError:
        return Path(spec), None
    if not (weight > 0 and math.isfinite(weight)):
        raise DataError(f"{spec}: the weight after the colon must be a positive number, not {tail}")
    return Path(head), weight


def resolve_sources(path_specs: Sequence[str]) -> list[Source]:
    """Find the files behind path specs; a folder stands for every `*.jsonl` below it, sorted.

    Raises:
        DataError: nothing was named, a path does not exist, a folder holds no `*.jsonl`, or only some paths have
            weights.
    """
    if not path_specs:
        raise DataError("no data files were named; give one or more paths with --data_path")
    sources = []
    for spec in path_specs:
        path, weight = parse_path_spec(spec)
        if path.is_dir():
            files = tuple(sorted(p for p in path.rglob("*.jsonl") if p.is_file()))
            if not files:
                raise DataError(
                    f"{path}: the folder holds no *.jsonl files; convert its data to JSON objects, one a line"
                )
        elif path.is_file():
            files = (path,)
        elif path.exists():
            raise DataError(f"{path}: is neither a file nor a folder; save its rows to a file first")
        else:
            raise DataError(f"{path}: does not exist; give a .jsonl file or a folder of them")
        sources.append(Source(path, files, weight))
    if len({source.weight is None for source in sources}) > 1:
        bare = next(source.path for source in sources if source.weight is None)
        raise DataError(f"{bare}: has no weight while other paths have one; write {bare}:1.0, or leave all weights out")
    return sources
