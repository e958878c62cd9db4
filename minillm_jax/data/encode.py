"""Tokenise each file once: records in, a cached Arrow file of token ids, loss masks and pairs' margins out.

A cache entry is a folder named by everything that decides its contents: the file's absolute path, size and modification
time, the kind of row, the tokenizer's fingerprint, and FORMAT. Row lengths are no part of it: documents are kept whole,
and cut when rows are planned. An entry is built beside its place and renamed into it, so that a process that dies, or
two that race, never leave half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import numpy as np

from minillm_jax.chat import ChatError, Rendered, render
from minillm_jax.data.documents import Documents, read_documents
from minillm_jax.data.errors import DataError, OnBadRow, SkipReport
from minillm_jax.data.records import (
    PreferenceRecord,
    PretrainRecord,
    Record,
    SftRecord,
    Turns,
    bad_row,
    chat_field_error,
    read_file,
)
from minillm_jax.tokenizer import Tokenizer

FORMAT = 2
"""Raise it when the same file and tokenizer come to give other tokens, or they are stored in another way."""
CHUNK_BYTES = 1 << 20
"""Bytes of JSONL that are encoded together."""
BLOCK_TOKENS = 1 << 22
"""Tokens that are held in memory before they are written."""
_REPORT_SECONDS = 10.0
_STALE_SECONDS = 24 * 3600.0

Report = Callable[[str], None]


@dataclass(frozen=True)
class Encoded:
    """Some documents end to end: ids and mask are [tokens], lengths and margins [documents]."""

    ids: np.ndarray
    lengths: np.ndarray
    mask: np.ndarray | None = None
    margins: np.ndarray | None = None
    bad: Sequence[tuple[Record, ChatError]] = ()


@dataclass(frozen=True)
class TokenFile:
    """One file's documents, the bad rows left out of them, and whether they came from the cache."""

    documents: Documents
    skipped: SkipReport
    reused: bool


def _join(documents: Sequence[Sequence[int]], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(d, dtype) for d in documents)])


def encode_pretrain(tokenizer: Tokenizer, records: Sequence[PretrainRecord]) -> Encoded:
    """Encode each text as begin token, text, end token. A text without tokens gives a document of length 0."""
    texts = tokenizer.encode_batch([record.text for record in records])
    documents = [[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id] if ids else [] for ids in texts]
    return Encoded(_join(documents, np.int32), np.array([len(d) for d in documents], np.int64))


def encode_sft(tokenizer: Tokenizer, records: Sequence[SftRecord]) -> Encoded:
    """Render each conversation with the tokenizer's chat template; only assistant turns carry loss."""
    rendered, bad = [], []
    for record in records:
        try:
            rendered.append(render(tokenizer, record.conversations, tools=record.tools))
        except ChatError as error:
            bad.append((record, error))
    return Encoded(
        _join([r.token_ids for r in rendered], np.int32),
        np.array([len(r.token_ids) for r in rendered], np.int64),
        _join([r.mask for r in rendered], np.uint8),
        bad=bad,
    )


def encode_preference(tokenizer: Tokenizer, records: Sequence[PreferenceRecord]) -> Encoded:
    """Render each pair as two documents, chosen before rejected; only their last turns carry loss.

    Each document bears the margin of its pair, 0 where the row has none.
    """
    sides: list[Rendered] = []
    margins: list[float] = []
    bad = []
    for record in records:
        try:
            sides += _render_pair(tokenizer, record)
            margins += [record.margin or 0.0] * 2
        except ChatError as error:
            bad.append((record, error))
    return Encoded(
        _join([side.token_ids for side in sides], np.int32),
        np.array([len(side.token_ids) for side in sides], np.int64),
        _join([side.mask for side in sides], np.uint8),
        np.array(margins, np.float32),
        bad,
    )


def _render_pair(tokenizer: Tokenizer, record: PreferenceRecord) -> tuple[Rendered, Rendered]:
    """Render both sides of a pair behind the prompt that they share.

    Raises:
        ChatError: an answer is empty, prompts differ, or answers do not.
    """
    for name, turns in (("chosen", record.chosen), ("rejected", record.rejected)):
        last = turns[-1]
        if not any((str(last.get("content") or "").strip(), last.get("reasoning_content"), last.get("tool_calls"))):
            raise ChatError(f"{name}[{len(turns) - 1}].content: is empty; there is no answer to compare")
    prompt = _prompt_ids(tokenizer, record.chosen, record.tools, "chosen")
    if record.rejected[:-1] != record.chosen[:-1]:  # other turns may still render to the same prompt
        other = _prompt_ids(tokenizer, record.rejected, record.tools, "rejected")
        if other != prompt:
            raise ChatError("rejected: has another prompt than chosen; both must answer the same turns")
    chosen, rejected = (
        _last_turn_only(render(tokenizer, turns, tools=record.tools, field=name), prompt)
        for name, turns in (("chosen", record.chosen), ("rejected", record.rejected))
    )
    if chosen.token_ids == rejected.token_ids:
        raise ChatError("rejected: is the same as chosen; there is nothing to prefer")
    return chosen, rejected


def _prompt_ids(tokenizer: Tokenizer, turns: Turns, tools: Any, field: str) -> list[int]:
    """Tokens of the turns before the last, with the opening of the assistant's turn."""
    if len(turns) < 2:
        raise ChatError(f"{field}: has no turn before the answer")
    return render(tokenizer, turns[:-1], tools=tools, add_generation_prompt=True, field=field).token_ids


def _last_turn_only(rendered: Rendered, prompt: Sequence[int]) -> Rendered:
    """Keep the loss mask of the last turn, which is what follows the prompt.

    A template without generation tags may split the prompt's text into tokens in another way once it is answered; then
    the last turn is the last run of trained tokens, since such templates make one of each turn.
    """
    ids, mask = rendered.token_ids, rendered.mask
    begin = len(prompt)
    if ids[:begin] != list(prompt):
        trained = np.flatnonzero(mask)
        begin = int(trained[np.flatnonzero(np.diff(trained, prepend=-2) > 1)[-1]])
    return Rendered(ids, [0] * begin + mask[begin:])


ENCODERS: dict[str, Callable[[Tokenizer, Any], Encoded]] = {
    "pretrain": encode_pretrain,
    "sft": encode_sft,
    "preference": encode_preference,
}
"""Kinds of row that become training documents; a preference row becomes two."""


def cache_folder(cache_dir: str | None) -> Path:
    """Return where tokenised files are kept: `cache_dir`, else $MINILLM_CACHE, else ~/.cache/minillm_jax."""
    return Path(cache_dir or os.environ.get("MINILLM_CACHE") or "~/.cache/minillm_jax").expanduser() / "tokens"


def _entry_name(file: Path, kind: str, tokenizer: Tokenizer) -> str:
    stat = file.stat()
    identity = [FORMAT, kind, str(file.resolve()), stat.st_size, stat.st_mtime_ns, tokenizer.fingerprint]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _chunks(rows: Iterable[tuple[Record, int]]) -> Iterator[tuple[list[Record], int]]:
    """Group records into chunks of about CHUNK_BYTES, each with the bytes of the file read by its end."""
    chunk: list[Record] = []
    begin = position = 0
    for record, position in rows:
        chunk.append(record)
        if position - begin >= CHUNK_BYTES:
            yield chunk, position
            chunk, begin = [], position
    if chunk:
        yield chunk, position


def _encode_in_worker(kind: str, tokenizer: Tokenizer, records: list[Record]) -> Encoded:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    return ENCODERS[kind](tokenizer, records)


def _encode_chunks(
    chunks: Iterator[tuple[list[Record], int]], kind: str, tokenizer: Tokenizer, num_proc: int
) -> Iterator[tuple[Encoded, int]]:
    """Encode chunks in order, in this process or `num_proc` others, reading only a few chunks ahead."""
    if num_proc <= 1:
        yield from ((ENCODERS[kind](tokenizer, records), position) for records, position in chunks)
        return
    # Not fork: a parent that has initialised jax or run the tokenizer's threads may leave a forked child hanging.
    with ProcessPoolExecutor(num_proc, mp_context=get_context("spawn")) as pool:
        pending: deque[tuple[Future[Encoded], int]] = deque()
        for records, position in chunks:
            pending.append((pool.submit(_encode_in_worker, kind, tokenizer, records), position))
            if len(pending) > 2 * num_proc:
                future, done = pending.popleft()
                yield future.result(), done
        for future, done in pending:
            yield future.result(), done


def _blocks(chunks: Iterable[Encoded]) -> Iterator[Encoded]:
    """Join chunks until BLOCK_TOKENS are there, so that a file becomes few large Arrow batches."""
    held: list[Encoded] = []
    for chunk in chunks:
        held.append(chunk)
        if sum(len(h.ids) for h in held) >= BLOCK_TOKENS:
            yield _merge(held)
            held = []
    if held:
        yield _merge(held)


def _merge(chunks: list[Encoded]) -> Encoded:
    masks = [chunk.mask for chunk in chunks if chunk.mask is not None]
    margins = [chunk.margins for chunk in chunks if chunk.margins is not None]
    return Encoded(
        np.concatenate([chunk.ids for chunk in chunks]),
        np.concatenate([chunk.lengths for chunk in chunks]),
        np.concatenate(masks) if masks else None,
        np.concatenate(margins) if margins else None,
    )


def _write_arrow(path: Path, blocks: Iterable[Encoded], kind: str, vocab_size: int) -> None:
    import datasets
    import pyarrow as pa
    from datasets.arrow_writer import ArrowWriter

    dtype = np.uint16 if vocab_size <= 1 << 16 else np.int32
    columns = {"input_ids": datasets.List(datasets.Value(np.dtype(dtype).name))}
    if kind != "pretrain":
        columns["loss_mask"] = datasets.List(datasets.Value("uint8"))
    if kind == "preference":
        columns["margin"] = datasets.Value("float32")
    with ArrowWriter(path=str(path), features=datasets.Features(columns)) as writer:
        for block in blocks:
            offsets = pa.array(np.concatenate([[0], np.cumsum(block.lengths)]).astype(np.int32))
            table = {"input_ids": pa.ListArray.from_arrays(offsets, block.ids.astype(dtype))}
            if block.mask is not None:
                table["loss_mask"] = pa.ListArray.from_arrays(offsets, block.mask)
            if block.margins is not None:
                table["margin"] = pa.array(block.margins)
            writer.write_table(pa.table(table), writer_batch_size=max(1, len(block.lengths)))
        writer.finalize()


def _tokenize(
    file: Path, kind: str, tokenizer: Tokenizer, folder: Path, on_bad_row: OnBadRow, num_proc: int, report: Report
) -> None:
    """Write `documents.arrow` and `info.json` for one file into `folder`."""
    skipped, size, begin = SkipReport(), file.stat().st_size, time.monotonic()
    name, last = _entry_name(file, kind, tokenizer), begin

    def chunks() -> Iterator[Encoded]:
        nonlocal last
        rows = read_file(file, kind, on_bad_row, skipped)
        for chunk, position in _encode_chunks(_chunks(rows), kind, tokenizer, num_proc):
            for record, error in chunk.bad:
                bad_row(record, chat_field_error(error), on_bad_row, skipped)
            if (now := time.monotonic()) - last > _REPORT_SECONDS:
                last = now
                report(f"tokenising {file}: {position / size:.0%}, {position / (now - begin) / 1e6:.1f} MB/s")
            yield chunk

    path = folder / "documents.arrow"
    _write_arrow(path, _blocks(chunks()), kind, vocab_size=tokenizer.vocab_size)
    if _entry_name(file, kind, tokenizer) != name:
        raise DataError(f"{file}: changed while it was being read; start again when it is complete")
    info = {
        "file": str(file),
        "arrow_bytes": path.stat().st_size,
        "skipped": {"counts": skipped.counts, "examples": skipped.examples},
    }
    (folder / "info.json").write_text(json.dumps(info), encoding="utf-8")


def _read_entry(entry: Path) -> tuple[Documents, SkipReport] | None:
    """Read a cache entry; None when there is none, or one that a crash of the machine cut short."""
    path = entry / "documents.arrow"
    try:
        info = json.loads((entry / "info.json").read_text(encoding="utf-8"))
        if path.stat().st_size != info["arrow_bytes"]:
            return None
    except (OSError, ValueError):
        return None
    skipped = SkipReport(Counter(info["skipped"]["counts"]), info["skipped"]["examples"])
    return read_documents(path), skipped


def _sweep(root: Path) -> None:
    """Remove what processes that were killed a day ago or earlier left unfinished."""
    for folder in root.glob("unfinished-*"):
        try:
            if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:
            continue  # another process swept it


def _publish(folder: Path, entry: Path) -> None:
    """Move a finished folder into its place, unless another process was first."""
    if entry.exists() and _read_entry(entry) is None:
        shutil.rmtree(entry, ignore_errors=True)
    try:
        folder.rename(entry)
    except OSError:
        if not entry.exists():
            raise


def tokenize_file(
    file: Path,
    kind: str,
    tokenizer: Tokenizer,
    *,
    on_bad_row: OnBadRow = "error",
    cache_dir: str | None = None,
    num_proc: int = 1,
    report: Report = print,
) -> TokenFile:
    """Tokenise one JSONL file, or reuse what an earlier call made of it.

    Args:
        file: rows of `kind`.
        kind: "pretrain", "sft" or "preference".
        tokenizer: encodes plain text and, for sft, carries the chat template.
        on_bad_row: "error" stops at the first bad row; "skip" leaves it out and counts it.
        cache_dir: where tokenised files are kept; None is $MINILLM_CACHE or ~/.cache/minillm_jax.
        num_proc: processes that encode; with 1, this one does, in which the tokenizer uses its own threads.
        report: receives a line of progress every ten seconds.

    Raises:
        DataError: a bad row, an unreadable file, or a cache folder that cannot be written.
    """
    root = cache_folder(cache_dir)
    try:
        entry = root / _entry_name(file, kind, tokenizer)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    found, reused = _read_entry(entry), True
    if found is None:
        reused, folder = False, root / f"unfinished-{uuid.uuid4().hex}"
        try:
            folder.mkdir(parents=True)
            _sweep(root)
            _tokenize(file, kind, tokenizer, folder, on_bad_row, num_proc, report)
            _publish(folder, entry)
        except OSError as error:
            advice = "make room there, or choose another folder with --cache_dir or $MINILLM_CACHE"
            raise DataError(
                f"{root}: the token cache cannot be written: {error.strerror or error}; {advice}"
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        found = cast(tuple[Documents, SkipReport], _read_entry(entry))
    documents, skipped = found
    if skipped.total and on_bad_row == "error":
        raise DataError(skipped.examples[0])
    return TokenFile(documents, skipped, reused)
