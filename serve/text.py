"""From tokens to text that may be sent: no half characters, nothing that may turn out to begin a stop string.

Text is assembled once, in small steps; the pieces given out add up to what the whole would have been.
"""

from __future__ import annotations

from collections.abc import Sequence

from minillm_jax.tokenizer import StreamDecoder, Tokenizer


class StopStrings:
    """Cuts a text that arrives in pieces at the first stop string, which is left out."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.hit = False

    @property
    def any(self) -> bool:
        """Whether there is a stop string at all."""
        return bool(self._stops)

    def push(self, piece: str) -> str:
        """Return what is certain to come before any stop string; after a hit nothing more comes."""
        if not self._stops or self.hit:
            return "" if self.hit else piece
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.hit, self._held = True, ""
            return text[: min(found)]
        kept = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """Return what was held back in vain, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins the stop string, without being all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class TokenText:
    """Spells single tokens, for log-probabilities."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._spelled: dict[int, str] = {}

    def spell(self, token: int) -> str:
        """Return a token's text; one that is part of a character is written in bytes, so that none look alike."""
        text = self._spelled.get(token)
        if text is None:
            data = self._tokenizer.token_bytes(token)
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError:
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            self._spelled[token] = text
        return text

    def bytes(self, token: int) -> list[int]:
        """Return a token's bytes as numbers."""
        return list(self._tokenizer.token_bytes(token))


class TokenDecoder:
    """Turns a completion's tokens into text, control tokens and the end left out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens=True)

    def push(self, tokens: Sequence[int]) -> str:
        """Return the text that these tokens complete."""
        push = self._decoder.push
        return "".join([push(token) for token in tokens])

    def flush(self) -> str:
        """Return the replacement characters of bytes that never became a character."""
        return self._decoder.flush()
