"""Folders on disk that are whole or not there: atomic publication, checksums, and clearing up after a kill.

A folder under construction goes in and appears under its name by one rename, with a manifest of the size and SHA-256 of
every file in it. The storage layer beneath does not notice a flipped bit in a weight; `verify` does.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST_FILE = "manifest.json"
UNFINISHED, DELETING, REPLACED, DAMAGED = ".partial", ".deleting", ".replaced", ".damaged"
"""Suffixes of folders that are not, or no longer, what their name says."""


class DamageError(Exception):
    """A folder does not hold what its manifest says."""


def publish(unfinished: Path, final: Path) -> None:
    """Seal a complete folder with its manifest and give it its name; an older folder of that name gives way.

    Killed at any moment, this leaves the old folder, the new one, or leftovers that `clear_leftovers` knows.
    """
    write_texts(unfinished, {MANIFEST_FILE: json.dumps({"files": _fingerprints(unfinished)}, indent=1)})
    _sync(unfinished)
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        final.rename(replaced)
    unfinished.rename(final)
    _sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def clear_leftovers(folder: Path) -> None:
    """Undo what a kill interrupted: unfinished saves and deletions go, a half-made replacement is taken back."""
    for entry in list(folder.iterdir()):
        if entry.suffix == REPLACED and not (original := entry.with_suffix("")).exists():
            entry.rename(original)
        elif entry.suffix in (UNFINISHED, DELETING, REPLACED):
            shutil.rmtree(entry)


def verify(folder: Path, part: str = "") -> None:
    """Compare a published folder with its manifest.

    Args:
        folder: the folder.
        part: checksums are compared of files whose relative names begin with this; sizes of all files are.

    Raises:
        DamageError: a file is missing, cannot be read, or differs; the message says which.
    """
    try:
        expected = read_json(folder, MANIFEST_FILE)["files"]
        for name, (size, _) in expected.items():  # cheap, so that a torn file is found before gigabytes are read
            if (actual := (folder / name).stat().st_size) != size:
                raise DamageError(f"{name} has {actual} bytes instead of {size}")
        found = _fingerprints(folder, [name for name in expected if name.startswith(part)])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamageError(f"{MANIFEST_FILE} cannot be understood ({error})") from error
    except FileNotFoundError as error:
        raise DamageError(f"{Path(error.filename).relative_to(folder)} is missing") from error
    except OSError as error:
        raise DamageError(f"it cannot be read ({error})") from error
    for name, fingerprint in found.items():
        if fingerprint != expected[name]:
            raise DamageError(f"{name} does not have the checksum it was saved with")


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write text files, relative name → text, through to the disk."""
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def read_json(folder: Path, name: str) -> Any:
    """Read one JSON file of a folder."""
    return json.loads((folder / name).read_text(encoding="utf-8"))


def _fingerprints(folder: Path, names: Iterable[str] | None = None) -> dict[str, list[int | str]]:
    """Size and SHA-256 of files, by name relative to the folder; of all its files by default."""
    if names is None:
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = list(names)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing releases the interpreter lock
        return dict(zip(names, threads.map(lambda name: _fingerprint(folder / name), names), strict=True))


def _fingerprint(path: Path) -> list[int | str]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _sync(path: Path) -> None:
    """Flush a folder's entries, so that a rename outlives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
