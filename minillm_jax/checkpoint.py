"""Checkpoints: everything that a run needs to go on, written while training continues.

The train state, the data iterator's state, the model's shape and the tokenizer go in, and come out bit for bit. A
checkpoint is a folder that appears by one rename and carries the checksum of each of its files, because the storage
layer returns a flipped bit in a weight without a word: what is unfinished or damaged is never taken for a checkpoint.

    RUN/checkpoints/STEP/
        state/              parameters, optimizer state, step and key, in Orbax's format
        data_state.json     where the data iterator stands
        model_config.json   the model's shape
        tokenizer/          the tokenizer, loadable by itself
        metadata.json       step, metrics, and the name, dtype and shape of every array
        manifest.json       size and SHA-256 of all files above; written last
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from minillm_jax.checkpoint_files import (
    DAMAGED,
    DELETING,
    MANIFEST_FILE,
    UNFINISHED,
    DamageError,
    clear_leftovers,
    publish,
    read_json,
    verify,
    write_texts,
)
from minillm_jax.config import ModelConfig, model_config_from_dict
from minillm_jax.errors import UserError

CHECKPOINTS = "checkpoints"
STATE = "state"
TOKENIZER = "tokenizer"
DATA_STATE_FILE = "data_state.json"
MODEL_CONFIG_FILE = "model_config.json"
METADATA_FILE = "metadata.json"
CRITIC = "critic"
"""What PPO keeps beside the parameters of its policy, under this name: needed to go on, and no part of the model."""
SCORE = "params.score.kernel"
"""Name of the array that only reward models have."""

Report = Callable[[str], object]

# Orbax logs every phase of a save, and prints the traceback of a failed one that is raised again here.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be written, found or used; the message says which and what to do."""


@dataclass(frozen=True)
class Restored:
    """What a checkpoint brought back.

    Attributes:
        state: the train state, bit for bit as it was saved, in the asked-for shardings.
        data_state: the data iterator's state.
        step: the step after which it was saved.
    """

    state: Any
    data_state: dict[str, Any]
    step: int


class Checkpointer:
    """Saves the states of one run, restores the newest good one, and deletes those no longer needed.

    One process of a run may save at a time. In a multi-process run every process makes the same calls on the same
    (shared) folder.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        keep: int,
        model_config: ModelConfig | None,
        tokenizer_files: Mapping[str, str] | None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        """Open the run's `checkpoints` folder, and clear away what a killed save or deletion left there.

        Args:
            run_dir: the run folder; made when it is missing.
            keep: how many of the newest checkpoints stay, beside the one with the lowest `valid_loss`.
            model_config: saved in each checkpoint.
            tokenizer_files: file name → text, saved in each checkpoint.
            files: further ones, saved beside the model's shape.

        Raises:
            CheckpointError: `keep` is less than 1, or the folder cannot be written.
        """
        if keep < 1:
            raise CheckpointError(f"keep must be at least 1, not {keep}: a run that keeps nothing cannot be resumed")
        self.folder = Path(run_dir).absolute() / CHECKPOINTS
        self.keep = keep
        self._texts = {f"{TOKENIZER}/{name}": text for name, text in (tokenizer_files or {}).items()}
        self._texts |= files or {}
        if model_config is not None:
            self._texts[MODEL_CONFIG_FILE] = json.dumps(asdict(model_config), indent=2)
        if jax.process_index() == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                clear_leftovers(self.folder)
            except OSError as error:
                raise CheckpointError(f"cannot write checkpoints to {self.folder}: {error}") from error
        # Compressing float32 weights saves 7 % of the space and takes seven times as long.
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    @property
    def latest_step(self) -> int | None:
        """Step of the newest finished checkpoint."""
        return max(_steps(self.folder), default=None)

    @property
    def best_step(self) -> int | None:
        """Step of the finished checkpoint with the lowest `valid_loss`; None when none has a finite one."""
        losses = {step: _valid_loss(self.folder / str(step)) for step in _steps(self.folder)}
        return min((step for step in losses if losses[step] < math.inf), key=lambda step: losses[step], default=None)

    def save(self, state: Any, data_state: dict[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Take the state as it is now and write it in the background.

        When this returns the state may be donated to the next step. A save that is still being written is waited for
        first, so that no more than one copy of the state is held.

        Args:
            state: pytree of arrays with an int32 scalar `step` at its top, which names the checkpoint.
            data_state: the data iterator's state; anything that JSON can hold.
            metrics: kept with the checkpoint; `valid_loss` decides which one is the best.

        Raises:
            CheckpointError: this save could not start, or the one before it failed. Older checkpoints are intact.
        """
        self.wait()
        step = int(state["step"])
        arrays = _flatten(state)
        metadata = {
            "step": step,
            "metrics": {name: float(value) for name, value in (metrics or {}).items()},
            "arrays": {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in arrays.items()},
        }
        texts = {DATA_STATE_FILE: json.dumps(data_state), METADATA_FILE: json.dumps(metadata, indent=1), **self._texts}
        unfinished = self.folder / f"{step}{UNFINISHED}"
        try:
            if jax.process_index() == 0:
                shutil.rmtree(unfinished, ignore_errors=True)  # late writes of a save that failed at this step
                unfinished.mkdir()
            # Arrays reach host memory in this call. On CPU they are read in place: as long as somebody reads an array,
            # JAX gives a step that was donated it a new buffer instead.
            self._orbax.save(unfinished / STATE, args=ocp.args.PyTreeSave(arrays))
        except Exception as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise _cannot_save(step, self.folder, error) from error
        self._pending = self._thread.submit(self._finish, step, unfinished, texts)

    def _finish(self, step: int, unfinished: Path, texts: dict[str, str]) -> None:
        """Wait for the arrays, add the rest, and give the folder its name (in the background)."""
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                write_texts(unfinished, texts)
                publish(unfinished, self.folder / str(step))
                self._delete_old()
        except Exception as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise _cannot_save(step, self.folder, error) from error

    def _delete_old(self) -> None:
        steps = sorted(_steps(self.folder))
        for step in set(steps[: -self.keep]) - {self.best_step}:
            doomed = self.folder / f"{step}{DELETING}"
            (self.folder / str(step)).rename(doomed)
            shutil.rmtree(doomed)

    def restore(self, abstract_state: Any, report: Report = warnings.warn) -> Restored | None:
        """Bring back the newest good checkpoint.

        Damaged checkpoints that are newer are reported and renamed to `STEP.damaged`.

        Args:
            abstract_state: `jax.ShapeDtypeStruct`s like the saved state. Their shardings decide where arrays go, and
                may differ from those of the run that saved.
            report: called with one sentence per damaged checkpoint.

        Returns:
            The state, or None when the run has no checkpoint yet.

        Raises:
            CheckpointError: every checkpoint is damaged, or the newest good one holds another model or optimizer.
        """
        self.wait()
        damaged: list[Path] = []
        folder = _newest_good(self.folder, report, damaged)
        if folder is None:
            return None
        if jax.process_index() == 0:
            for path in damaged:
                shutil.rmtree(aside := path.with_name(path.name + DAMAGED), ignore_errors=True)
                path.rename(aside)
        metadata = read_json(folder, METADATA_FILE)
        asked = _flatten(abstract_state)
        _refuse_other_shapes(folder, metadata["arrays"], asked)
        arrays = _restore_arrays(folder, asked)
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), [arrays[name] for name in asked])
        return Restored(state, read_json(folder, DATA_STATE_FILE), metadata["step"])

    def wait(self) -> None:
        """Wait until the save in the background is on disk.

        Raises:
            CheckpointError: it failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the last save and release the threads; raises like `wait`."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # what ended the run matters more


# ---------------------------------------------------------------------------------------------------------------------
# Reading without a run: evaluation, sampling, serving, fine-tuning


def read_model_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Read the model's shape from a run folder, its `checkpoints` folder or one checkpoint.

    Raises:
        CheckpointError: there is no checkpoint, all are damaged, or it was saved without a model.
    """
    return _model_config(_resolve(path, warnings.warn, MODEL_CONFIG_FILE))


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Find the checkpoint that a path means: itself, or the newest good one of a run.

    Raises:
        CheckpointError: there is none, or all are damaged.
    """
    return _resolve(path, warnings.warn, MODEL_CONFIG_FILE)


def read_file(path: str | os.PathLike[str], name: str) -> str | None:
    """Read one of a checkpoint's further files, given it or its run; None when it was saved without.

    Raises:
        CheckpointError: there is no checkpoint, or all are damaged.
    """
    file = _resolve(path, warnings.warn, name) / name
    return file.read_text("utf-8") if file.is_file() else None


def load_params(
    path: str | os.PathLike[str], *, dtype: Any = None, shardings: Any = None, report: Report = warnings.warn
) -> tuple[ModelConfig, dict[str, Any]]:
    """Load a model's parameters, and nothing of the optimizer, from a run folder or one checkpoint.

    Args:
        path: a run folder or its `checkpoints` folder (the newest good checkpoint is taken), or one checkpoint.
        dtype: what to cast floating-point parameters to while reading; None leaves them as trained, in float32.
        shardings: tree like the parameters; None puts them on the first device.
        report: called with one sentence per damaged checkpoint that was passed over.

    Returns:
        The model's shape and its parameters, nested as the model takes them.

    Raises:
        CheckpointError: there is no checkpoint, or all are damaged.
    """
    folder = _resolve(path, report, "")
    placement = {} if shardings is None else _flatten({"params": shardings})
    asked = {}
    for name, (dtype_name, shape) in read_json(folder, METADATA_FILE)["arrays"].items():
        if name.startswith("params.") and not name.startswith(f"params.{CRITIC}."):
            floating = dtype is not None and jnp.issubdtype(dtype_name, jnp.floating)
            asked[name] = jax.ShapeDtypeStruct(
                tuple(shape), dtype if floating else dtype_name, sharding=placement.get(name)
            )
    if missing := sorted(asked.keys() ^ placement.keys()) if placement else []:
        if SCORE in missing:
            is_one, needed = ("reward", "language") if SCORE in asked else ("language", "reward")
            raise CheckpointError(f"{folder} holds a {is_one} model, where a {needed} model is needed")
        raise CheckpointError(f"the shardings do not fit {folder}: {missing[0]} is only in one of the two")
    return _model_config(folder), _nest(_restore_arrays(folder, asked))["params"]


def load_tokenizer_files(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the tokenizer's files, name → text, from a run folder, its `checkpoints` folder or one checkpoint.

    Raises:
        CheckpointError: there is no checkpoint, all are damaged, or it was saved without a tokenizer.
    """
    folder = _resolve(path, warnings.warn, TOKENIZER) / TOKENIZER
    if not folder.is_dir():
        raise CheckpointError(f"{folder.parent} was saved without a tokenizer; name one with --tokenizer_path")
    return {file.name: file.read_bytes().decode() for file in sorted(folder.iterdir())}


def _model_config(folder: Path) -> ModelConfig:
    if not (folder / MODEL_CONFIG_FILE).exists():
        raise CheckpointError(f"{folder} was saved without a model's shape; it cannot be loaded by itself")
    return model_config_from_dict(read_json(folder, MODEL_CONFIG_FILE))


def _resolve(path: str | os.PathLike[str], report: Report, part: str) -> Path:
    """Find the one checkpoint folder that a path means, undamaged as far as the files whose names begin with `part`."""
    root = Path(path).absolute()
    if (root / MANIFEST_FILE).exists() or (root.name.isdigit() and (root / STATE).exists()):
        try:
            verify(root, part)
        except DamageError as damage:
            raise CheckpointError(f"checkpoint {root} is damaged: {damage}") from damage
        return root
    folder = root / CHECKPOINTS if (root / CHECKPOINTS).is_dir() else root
    found = _newest_good(folder, report, [], part)
    if found is None:
        raise CheckpointError(
            f"no checkpoint in {root}; expected a run folder with {CHECKPOINTS}/STEP/, one checkpoint with a "
            f"{MANIFEST_FILE}, or a Hugging Face folder with config.json and *.safetensors"
        )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def _steps(folder: Path) -> list[int]:
    return [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()] if folder.is_dir() else []


def _newest_good(folder: Path, report: Report, damaged: list[Path], part: str = "") -> Path | None:
    """Find the newest undamaged checkpoint, reporting the damaged ones before it and adding them to `damaged`."""
    for step in sorted(_steps(folder), reverse=True):
        try:
            verify(folder / str(step), part)
        except DamageError as damage:
            damaged.append(folder / str(step))
            report(f"checkpoint {damaged[-1]} is damaged and passed over: {damage}")
        else:
            return folder / str(step)
    if damaged:
        raise CheckpointError(f"every checkpoint in {folder} is damaged; move them away to start afresh")
    return None


def _valid_loss(folder: Path) -> float:
    """The checkpoint's `valid_loss`; infinity when it has none that can be compared."""
    try:
        loss = float(read_json(folder, METADATA_FILE)["metrics"]["valid_loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf
    return loss if math.isfinite(loss) else math.inf


def _cannot_save(step: int, folder: Path, error: Exception) -> CheckpointError:
    reason = str(error).strip().splitlines()
    return CheckpointError(
        f"the checkpoint of step {step} could not be written to {folder}: {reason[0] if reason else repr(error)}; "
        "older checkpoints are intact. Make room or mend the folder, and start again to resume"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Arrays


def _flatten(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path, in tree order: independent of the containers' types, which may change between releases."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _refuse_other_shapes(folder: Path, saved: Mapping[str, list[Any]], asked: Mapping[str, Any]) -> None:
    """Raise a CheckpointError that names the first array that only one side has, or that differs."""
    for name in sorted({**asked, **saved}, key=lambda name: not name.startswith("params.")):  # moments only follow
        theirs = "nothing" if name not in saved else f"{saved[name][0]}{saved[name][1]}"
        ours = "nothing" if name not in asked else f"{asked[name].dtype}{list(asked[name].shape)}"
        if theirs != ours:
            raise CheckpointError(
                f"{folder} was saved by a different model or optimizer: {name} is {theirs} there and {ours} here; "
                "set the model and optimizer flags as in its run, or choose another --out_dir"
            )


def _restore_arrays(folder: Path, asked: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Read the named arrays only, each into its sharding (or onto the first device)."""
    first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    restore_args = {
        name: ocp.ArrayRestoreArgs(sharding=leaf.sharding or first_device, global_shape=leaf.shape, dtype=leaf.dtype)
        for name, leaf in asked.items()
    }
    args = ocp.args.PyTreeRestore(item=dict(asked), restore_args=restore_args, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(folder / STATE, args=args)
