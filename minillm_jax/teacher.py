"""The teacher of a distillation: opened and checked, and, when it is large, asked once and remembered.

A folder goes in; a model whose vocabulary is the student's comes out. `store_teacher` runs it over all rows and keeps
its k likeliest tokens in a memory-mapped file beside the run, so that training never needs the teacher itself.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from minillm_jax.config import ComputeConfig, ConfigError, ModelConfig
from minillm_jax.data import Batch, TokenRows
from minillm_jax.data.loader import Share
from minillm_jax.distillation import top_k_logprobs
from minillm_jax.losses import map_tokens
from minillm_jax.model import Params, compute_dtype, forward_hidden, param_axes, unembed
from minillm_jax.pretrained import load_params, load_tokenizer, read_model_config
from minillm_jax.sharding import check_mesh, data_parallelism, tree_shardings
from minillm_jax.tokenizer import MissingTokenizer, Tokenizer
from minillm_jax.trainer import put_batch

FLUSH_ROWS = 512
"""Rows after which what was stored is safe from a kill."""


@dataclass(frozen=True)
class Teacher:
    """A model on disk that a student may learn from."""

    path: str
    config: ModelConfig

    def load(self, mesh: Mesh, compute: ComputeConfig) -> Params:
        """Load the parameters onto the mesh, in the dtype that they are computed in.

        Raises:
            ConfigError: the mesh cannot split them.
        """
        check_mesh(mesh, self.config, self.path)
        shardings = tree_shardings(mesh, param_axes(self.config))
        return load_params(self.path, dtype=compute_dtype(compute), shardings=shardings)[1]


def open_teacher(path: str, student: ModelConfig, tokenizer: Tokenizer, max_seq_len: int) -> Teacher:
    """Read a teacher's shape and compare vocabularies: id by id, whatever chat templates say.

    Args:
        path: run, checkpoint or Hugging Face folder.
        student: shape of the model that learns.
        tokenizer: the student's.
        max_seq_len: tokens per row.

    Raises:
        ConfigError: the vocabularies differ, and how; or the teacher's context is shorter than a row.
        HfError, CheckpointError: the folder holds no model.
    """
    config = read_model_config(path)
    if config.vocab_size != student.vocab_size:
        raise ConfigError(
            f"{path} has a vocabulary of {config.vocab_size} and the student one of {student.vocab_size}; distillation "
            f"needs the same one: give a new student the teacher's tokenizer and --vocab_size {config.vocab_size}"
        )
    theirs = load_tokenizer(path)
    if not isinstance(theirs, MissingTokenizer) and (difference := vocabulary_difference(tokenizer, theirs)):
        raise ConfigError(
            f"{path} has another vocabulary than the student: {difference}; train both with the same tokenizer"
        )
    if max_seq_len > config.max_position_embeddings:
        raise ConfigError(
            f"--max_seq_len {max_seq_len} is more than the {config.max_position_embeddings} positions of {path}"
        )
    return Teacher(path, config)


def vocabulary_difference(ours: Tokenizer, theirs: Tokenizer) -> str | None:
    """Say how another model's vocabulary ("there") differs from ours, at the first id that does; None if none does."""
    for i in range(max(ours.vocab_size, theirs.vocab_size)):
        a, b = ours.id_to_token(i), theirs.id_to_token(i)
        if a != b:
            return f"token {i} is {'nothing' if b is None else repr(b)} there and {'nothing' if a is None else repr(a)}"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# A stored teacher


@dataclass(frozen=True)
class TaughtRows:
    """Rows with what the teacher says about each of their tokens."""

    rows: TokenRows
    ids: np.ndarray  # [rows, T, k] uint16 or int32
    logprobs: np.ndarray  # [rows, T, k + 1] float16, or k where that is the whole vocabulary

    @property
    def shares(self) -> tuple[Share, ...]:
        """Those of the rows."""
        return self.rows.shares

    def __len__(self) -> int:
        """Rows."""
        return len(self.rows)

    def gather(self, indices: Sequence[int]) -> Batch:
        """Return rows as arrays `[B, T]`, with `teacher_ids` and `teacher_logprobs` beside them."""
        at = np.asarray(indices)
        stored = {"teacher_ids": self.ids[at].astype(np.int32), "teacher_logprobs": self.logprobs[at]}
        return self.rows.gather(indices) | stored


def store_teacher(
    teacher: Teacher,
    rows: TokenRows,
    folder: Path,
    *,
    k: int,
    temperature: float,
    batch_size: int,
    mesh: Mesh,
    compute: ComputeConfig,
    load: Callable[[], Params],
    report: Callable[[str], None] = print,
) -> TaughtRows:
    """Run the teacher over all rows, or reuse what an earlier call stored; one that was interrupted goes on.

    Args:
        teacher: who is asked.
        rows: about what.
        folder: holds `ids.npy`, `logprobs.npy` and `info.json`.
        k: tokens to keep.
        temperature: of the distillation; the store serves no other.
        batch_size: rows per call, rounded up to what the mesh can share.
        mesh: where the parameters lie.
        compute: dtype and attention of the teacher.
        load: gives the teacher's parameters; called only when rows are missing.
        report: receives lines for the screen.

    Raises:
        ConfigError: k is not one of 1 to V, several processes share the run, or the folder cannot be written.
    """
    vocab = teacher.config.vocab_size
    if not 1 <= k <= vocab:
        raise ConfigError(f"--teacher_top_k must lie between 1 and the vocabulary's {vocab}, not {k}; 0 stores nothing")
    if jax.process_count() > 1:
        raise ConfigError("--teacher_top_k stores with one process; make the store on one machine and resume there")
    ways = data_parallelism(mesh)
    batch_size = ways * -(-batch_size // ways)
    shape = (len(rows), rows.plan.seq_len)
    wanted = _fingerprint(teacher, rows, k, temperature)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        done = _rows_done(folder, wanted)
        mode = "r+" if done else "w+"
        dtype = np.uint16 if vocab <= 1 << 16 else np.int32
        ids = np.lib.format.open_memmap(folder / "ids.npy", mode, dtype, (*shape, k))
        logprobs = np.lib.format.open_memmap(folder / "logprobs.npy", mode, np.float16, (*shape, min(k + 1, vocab)))
        if done < len(rows):
            report(f"asking {teacher.path} about {len(rows) - done:,} rows, {k} tokens each; stored in {folder}")
            flushed = done
            for part, (found, values) in _ask(teacher, rows, done, batch_size, k, temperature, mesh, compute, load()):
                ids[part], logprobs[part] = found, values
                if part.stop - flushed >= FLUSH_ROWS or part.stop == len(rows):
                    ids.flush()
                    logprobs.flush()
                    flushed = part.stop
                    _write_info(folder, {"fingerprint": wanted, "rows_done": flushed})
    except OSError as error:
        raise ConfigError(f"{folder}: the teacher's store cannot be written: {error.strerror or error}") from error
    return TaughtRows(rows, ids, logprobs)


def _ask(
    teacher: Teacher,
    rows: TokenRows,
    first: int,
    batch_size: int,
    k: int,
    temperature: float,
    mesh: Mesh,
    compute: ComputeConfig,
    params: Params,
) -> Iterator[tuple[slice, tuple[np.ndarray, np.ndarray]]]:
    """Yield row numbers and what the teacher says about them, `[rows, T, k]` and `[rows, T, k + 1]`."""
    with jax.set_mesh(mesh):
        for begin in range(first, len(rows), batch_size):
            part = slice(begin, min(begin + batch_size, len(rows)))
            count = part.stop - part.start
            host = rows.gather(range(part.start, part.stop))
            padded = {name: np.pad(array, ((0, batch_size - count), (0, 0))) for name, array in host.items()}
            found = _top_k(params, teacher.config, put_batch(padded, mesh), k, temperature, compute)
            ids, logprobs = jax.device_get(found)
            yield part, (ids[:count], logprobs[:count])


@functools.partial(jax.jit, static_argnames=("config", "k", "temperature", "compute"))
def _top_k(
    params: Params, config: ModelConfig, batch: dict[str, jax.Array], k: int, temperature: float, compute: ComputeConfig
) -> tuple[jax.Array, jax.Array]:
    positions, segment_ids = batch["positions"], batch["segment_ids"]
    hidden = forward_hidden(
        params, config, batch["tokens"], positions=positions, segment_ids=segment_ids, branched=False, compute=compute
    ).hidden

    def likeliest(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        return top_k_logprobs(unembed(params, config, hidden), k, temperature)

    ids, logprobs = map_tokens(likeliest, (hidden,), config.vocab_size)
    return ids, logprobs.astype(jnp.float16)


def _fingerprint(teacher: Teacher, rows: TokenRows, k: int, temperature: float) -> str:
    """Hash all that decides a store's contents: the teacher's files, the rows' tokens and layout, k and temperature."""
    digest = hashlib.sha256()
    root = Path(teacher.path)
    # A checkpoint's manifest holds checksums of all that it is made of.
    patterns = ("manifest.json", "*/manifest.json", "checkpoints/*/manifest.json", "*.safetensors")
    files = sorted(path for pattern in patterns for path in root.glob(pattern))
    stats = [(str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    digest.update(json.dumps([str(root.resolve()), stats, k, temperature, rows.plan.seq_len]).encode())
    plan, documents = rows.plan, rows.documents
    layout = (plan.row_splits, plan.document, plan.start, plan.stop, documents.chunk, documents.start)
    for array in (*layout, *documents.tokens):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _rows_done(folder: Path, fingerprint: str) -> int:
    """How many rows a store holds already; 0 when there is none, or one of another teacher or other rows."""
    try:
        info = json.loads((folder / "info.json").read_text("utf-8"))
        return int(info["rows_done"]) if info["fingerprint"] == fingerprint else 0
    except (OSError, ValueError, KeyError):
        return 0


def _write_info(folder: Path, info: dict[str, Any]) -> None:
    temporary = folder / "info.json.tmp"
    temporary.write_text(json.dumps(info), encoding="utf-8")
    temporary.replace(folder / "info.json")
