"""API keys: read from a file and the environment, kept as hashes, compared in constant time.

No keys at all means that everybody who reaches the server may use it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from pathlib import Path

from minillm_jax.errors import UserError

ENVIRONMENT = "MINILLM_API_KEYS"
CLIENT_ENVIRONMENT = "MINILLM_API_KEY"


class KeyFileError(UserError):
    """API keys that cannot be read."""


class ApiKeys:
    """A set of keys that remembers only their hashes."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._hashes = [_hash(key) for key in dict.fromkeys(keys)]

    def __bool__(self) -> bool:
        """Tell whether a key is needed at all."""
        return bool(self._hashes)

    def accept(self, authorization: str | None) -> bool:
        """Check an `Authorization: Bearer KEY` header; every key is compared, so that time tells nothing."""
        scheme, _, key = (authorization or "").partition(" ")
        presented = _hash(key.strip())
        matches = [hmac.compare_digest(presented, known) for known in self._hashes]
        return any(matches) and scheme.lower() == "bearer"


def read_keys(file: str | None, environment: Mapping[str, str]) -> ApiKeys:
    """Read keys from a file, one a line, and from `MINILLM_API_KEYS`, separated by commas.

    Raises:
        KeyFileError: the file cannot be read, holds no key, or a key is not printable ASCII without spaces.
    """
    keys = [key.strip() for key in environment.get(ENVIRONMENT, "").split(",") if key.strip()]
    return ApiKeys(_checked(keys + ([] if file is None else _listed(file))))


def read_key(file: str | None, environment: Mapping[str, str]) -> str | None:
    """Read the one key that a client sends: the first of a file, or else `MINILLM_API_KEY`; None if there is neither.

    Raises:
        KeyFileError: as `read_keys`.
    """
    key = environment.get(CLIENT_ENVIRONMENT, "").strip()
    keys = _checked(_listed(file) if file is not None else [key] if key else [])
    return keys[0] if keys else None


def _listed(file: str) -> list[str]:
    """Read a file with one key a line; empty lines and those that begin with `#` are skipped."""
    try:
        lines = [line.strip() for line in Path(file).read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise KeyFileError(f"--api_key_file {file}: {reason}") from error
    listed = [line for line in lines if line and not line.startswith("#")]
    if not listed:
        raise KeyFileError(f"--api_key_file {file}: holds no key; write one a line")
    return listed


def _checked(keys: list[str]) -> list[str]:
    for number, key in enumerate(keys, 1):
        if not key.isascii() or not key.isprintable() or " " in key:
            raise KeyFileError(f"API key {number}: must be printable ASCII characters without spaces")
    return keys


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
