"""Train a tokenizer: JSONL documents in, a folder with `tokenizer.json` and `tokenizer_config.json` out.

    python -m train.tokenizer --data_path books.jsonl --out_dir out/tok

Every n-th document is held out, so that what is printed (bytes per token, vocabulary in use) is about text that the
merges were not learned from. Files are streamed, once to learn and once to measure.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from minillm_jax.config import ConfigError, parse_cli
from minillm_jax.data.errors import DataError, SkipReport
from minillm_jax.data.peek import row_kind
from minillm_jax.data.records import PretrainRecord, SftRecord, read_file
from minillm_jax.data.sources import resolve_sources
from minillm_jax.tokenizer import MIN_VOCAB_SIZE, Tokenizer, TokenizerError, train_tokenizer


@dataclass(frozen=True)
class TokenizerConfig:
    """What to learn a vocabulary from, how large, and where to put it."""

    data_path: tuple[str, ...]
    """JSONL files or folders of {"text"} or {"conversations"} rows."""
    out_dir: str
    """Folder to write; a tokenizer already there is replaced."""
    vocab_size: int = 6400
    """Tokens, the 256 bytes and 11 reserved ones included."""
    valid_fraction: float = 0.02
    """Share of documents to measure on instead of learning from; 0 for none."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at a bad row, or count and report it."""

    def __post_init__(self) -> None:
        """Refuse shares that leave nothing to learn from."""
        if not 0.0 <= self.valid_fraction <= 0.5:
            raise ConfigError(f"valid_fraction must lie between 0 and 0.5, not {self.valid_fraction}")


@dataclass(frozen=True)
class Measurement:
    """How a tokenizer does on some text."""

    documents: int
    bytes: int
    tokens: int
    token_ids_seen: frozenset[int]
    sample: str
    """The first characters of the first document."""

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes that one token stands for; higher is shorter sequences."""
        return self.bytes / max(self.tokens, 1)


def documents(config: TokenizerConfig, report: SkipReport | None = None, label: str = "") -> Iterator[str]:
    """Stream the text of every row, with a progress bar over bytes read.

    Args:
        config: which files, and what to do with bad rows.
        report: receives the skipped rows.
        label: what the bar says.

    Raises:
        DataError: a missing file, or a bad row.
    """
    files = [file for source in resolve_sources(config.data_path) for file in source.files]
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=sum(file.stat().st_size for file in files))
        done = 0
        for file in files:
            kind = "sft" if row_kind(file) == "sft" else "pretrain"
            for record, position in read_file(file, kind, config.on_bad_row, report):
                progress.update(task, completed=done + position)
                yield _text(record)
            done += file.stat().st_size


def _text(record: object) -> str:
    if isinstance(record, SftRecord):
        parts = [turn.get(key) for turn in record.conversations for key in ("reasoning_content", "content")]
        return "\n".join(part for part in parts if part)
    assert isinstance(record, PretrainRecord)
    return record.text


def split(texts: Iterable[str], valid_fraction: float, held_out: bool) -> Iterator[str]:
    """Yield the held-out texts, every n-th one with n = 1 / valid_fraction, or all the others."""
    every = round(1 / valid_fraction) if valid_fraction else 0
    for i, text in enumerate(texts, start=1):
        if (every > 0 and i % every == 0) == held_out:
            yield text


def measure(tokenizer: Tokenizer, texts: Iterable[str], batch_size: int = 256) -> Measurement:
    """Encode texts, a batch at a time, and count."""
    count = size = tokens = 0
    seen: set[int] = set()
    sample = ""
    stream = iter(texts)
    while batch := list(islice(stream, batch_size)):
        sample = sample or batch[0].strip()[:200]
        count += len(batch)
        size += sum(len(text.encode()) for text in batch)
        for ids in tokenizer.encode_batch(batch):
            tokens += len(ids)
            seen.update(ids)
    return Measurement(count, size, tokens, frozenset(seen), sample)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save, and print how the tokenizer does on held-out text."""
    console = Console()
    try:
        config = parse_cli(TokenizerConfig, "Train a byte-level BPE tokenizer.", argv=argv)
        report, started = SkipReport(), time.perf_counter()
        texts = split(documents(config, report, "learning merges"), config.valid_fraction, held_out=False)
        tokenizer = train_tokenizer(texts, config.vocab_size)
        seconds = time.perf_counter() - started
        tokenizer.save(config.out_dir)
        result = measure(tokenizer, split(documents(config, label="measuring"), config.valid_fraction, held_out=True))
        measured_on = "held-out text"
        if not result.tokens:
            result, measured_on = measure(tokenizer, documents(config, label="measuring")), "training text"
    except (ConfigError, DataError, TokenizerError) as error:
        sys.exit(f"error: {error}")
    for line in report.lines():
        console.print(line, markup=False, highlight=False)
    console.print(summary(tokenizer, result, measured_on, config.vocab_size, seconds))
    console.print(f"saved to {config.out_dir}", markup=False, highlight=False)


def summary(tokenizer: Tokenizer, result: Measurement, measured_on: str, asked: int, seconds: float) -> Table:
    """Lay out what a person wants to know about a new tokenizer."""
    size, used = tokenizer.vocab_size, len(result.token_ids_seen)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    short = "" if size == asked else f" (the text repeats too little for {asked:,}; give more text)"
    table.add_row("vocabulary", f"{size:,} tokens{short}")
    table.add_row("training time", f"{seconds:.1f} s")
    table.add_row("measured on", f"{measured_on}: {result.documents:,} documents, {result.bytes:,} bytes")
    table.add_row("bytes per token", f"{result.bytes_per_token:.2f}")
    table.add_row("vocabulary used", f"{used:,} of {size:,} tokens ({used / size:.1%}); {1 - used / size:.1%} unused")
    table.add_row("longest tokens", Text("  ".join(repr(token) for token in longest_tokens(tokenizer))))
    table.add_row("a sample", _shaded(tokenizer, result.sample))
    return table


def longest_tokens(tokenizer: Tokenizer, count: int = 8) -> list[str]:
    """Return the learned tokens that stand for the most characters, longest first."""
    texts = (tokenizer.decode([i]) for i in range(MIN_VOCAB_SIZE, tokenizer.vocab_size))
    return sorted(texts, key=lambda text: (-len(text), text))[:count]


def _shaded(tokenizer: Tokenizer, text: str) -> Text:
    """Show token boundaries: bars between tokens, and alternating shades where there is colour."""
    shaded = Text()
    for n, token_id in enumerate(tokenizer.encode(text)):
        piece = tokenizer.decode([token_id]).replace("\n", "⏎")
        shaded.append("|" if n else "", style="dim")
        shaded.append(piece, style="cyan" if n % 2 else "green")
    return shaded


if __name__ == "__main__":
    main()
