"""Models on disk: whatever `--model_path` names, a run, one of its checkpoints or a Hugging Face folder.

A path goes in; the model's shape, its parameters or its tokenizer come out, in the same form for each kind of folder.
The run of an adapter stands for the model that it makes of its base.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from minillm_jax import checkpoint
from minillm_jax.adapter_file import AdapterError, AdapterFile, read_adapter_file
from minillm_jax.checkpoint import Report
from minillm_jax.config import ModelConfig, shape_difference
from minillm_jax.hf_config import HfError, is_classifier, model_config_from_hf
from minillm_jax.hf_tensors import read_params
from minillm_jax.lora import Adapter, merge
from minillm_jax.model import Params, param_axes
from minillm_jax.reward import is_reward_model, reward_axes, scored
from minillm_jax.sharding import tree_shardings
from minillm_jax.tokenizer import MissingTokenizer, Tokenizer

CONFIG_FILE, GENERATION_CONFIG_FILE = "config.json", "generation_config.json"
PEFT_CONFIG_FILE = "adapter_config.json"


def read_hf_config(path: str | Path) -> dict[str, Any] | None:
    """Read the `config.json` of a Hugging Face folder; None when the folder is of another kind.

    Raises:
        HfError: the folder has weights but no configuration, or one that is not JSON.
    """
    file = Path(path) / CONFIG_FILE
    if not file.is_file():
        if (Path(path) / PEFT_CONFIG_FILE).is_file():
            raise HfError(f"{path}: is an adapter of PEFT; make a run of it with python -m minillm_jax.lora import")
        if any(Path(path).glob("*.safetensors")):
            raise HfError(f"{path}: has weights but no {CONFIG_FILE}")
        return None
    try:
        values = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise HfError(f"{file}: is not JSON ({error})") from error
    return values if isinstance(values, dict) and {"model_type", "architectures"} & set(values) else None


def read_model_config(path: str | Path) -> ModelConfig:
    """Read a model's shape.

    Raises:
        HfError, CheckpointError: the folder holds no model, or one that cannot be read.
    """
    values = read_hf_config(path)
    return checkpoint.read_model_config(path) if values is None else _in_folder(path, values)


def load_params(
    path: str | Path,
    *,
    base: str | Path | None = None,
    dtype: Any = None,
    shardings: Any = None,
    report: Report = warnings.warn,
) -> tuple[ModelConfig, Params]:
    """Load a model's shape and parameters; see `checkpoint.load_params` and `hf_tensors.read_params`.

    Args:
        path: the folder. An adapter's run gives the parameters of its base with the adapter merged into them.
        base: base to put an adapter onto, in place of the one that it was trained on.
        dtype: what to cast parameters to while reading; None keeps what is stored.
        shardings: tree like the parameters; None puts them on the first device.
        report: called with one sentence per damaged checkpoint that was passed over.

    Raises:
        HfError, CheckpointError: the folder holds no model, or one that cannot be read.
        AdapterError: an adapter's base is missing or has another shape, or a base was given and `path` is no adapter.
    """
    values = read_hf_config(path)
    file = read_adapter_file(path) if values is None else None
    if file is not None:
        return _load_adapted(path, file, base, dtype, shardings, report)
    if base is not None:
        raise AdapterError(f"{path} is no adapter's run")
    if values is None:
        return checkpoint.load_params(path, dtype=dtype, shardings=shardings, report=report)
    config = _in_folder(path, values)
    return config, read_params(Path(path), config, scored=is_classifier(values), dtype=dtype, shardings=shardings)


def load_adapter(path: str | Path, base: ModelConfig, *, report: Report = warnings.warn) -> Adapter:
    """Load an adapter alone, to be used with a base that is loaded already.

    Args:
        path: run of the adapter, or one of its checkpoints.
        base: shape of the base.
        report: see `load_params`.

    Raises:
        CheckpointError: the folder holds no checkpoint.
        AdapterError: it holds a whole model, or the base has another shape than the one the adapter was trained on.
    """
    file = read_adapter_file(path) if read_hf_config(path) is None else None
    if file is None:
        raise AdapterError(f"{path} is no adapter's run; give the run of a stage that was started with --lora_rank")
    config, params = checkpoint.load_params(path, report=report)
    if difference := shape_difference(config.resolved(), base.resolved()):
        name, ours, theirs = difference
        raise AdapterError(f"{path} adapts a model with {name} {ours}; the base has {theirs}")
    if is_reward_model(params):
        raise AdapterError(f"{path} adapts a reward model, which writes no text")
    return Adapter(params, file.lora)


def holds_reward_model(path: str | Path) -> bool:
    """Tell whether a folder holds a reward model, by its names alone.

    Raises:
        HfError, CheckpointError: the folder holds no model.
    """
    values = read_hf_config(path)
    if values is not None:
        return is_classifier(values)
    metadata = checkpoint.read_file(path, checkpoint.METADATA_FILE)
    return metadata is not None and checkpoint.SCORE in json.loads(metadata)["arrays"]


def axes_of(path: str | Path) -> Params:
    """Name the axes of the parameters that `load_params` gives; raises like `holds_reward_model`."""
    return (reward_axes if holds_reward_model(path) else param_axes)(read_model_config(path))


def load_reward_params(
    path: str | Path, *, dtype: Any = None, shardings: Any = None, report: Report = warnings.warn
) -> tuple[ModelConfig, Params]:
    """Load a reward model's shape and parameters, or make one of a language model by giving it a head of zeros.

    A head of zeros calls all answers equal, with a loss of ln 2 and probabilities of one half: nothing random has to
    be unlearnt, and no seed changes the result. It has a gradient at once, and the layers below from the second step.

    Args, shardings being those of a reward model, and errors are those of `load_params`.
    """
    if holds_reward_model(path):
        return load_params(path, dtype=dtype, shardings=shardings, report=report)
    head, below = None, None
    if shardings is not None:
        head = shardings["score"]["kernel"]
        below = tree_shardings(head.mesh, param_axes(read_model_config(path)))
    config, params = load_params(path, dtype=dtype, shardings=below, report=report)
    width = params["embed_tokens"]["embedding"]
    return config, scored(params, jnp.zeros((width.shape[1], 1), width.dtype, device=head))


def pin(path: str | Path) -> Path:
    """Name a model so that it stays what it is now: of a run, the newest good checkpoint.

    Raises:
        HfError, CheckpointError: the folder holds no model.
    """
    return Path(path).absolute() if read_hf_config(path) is not None else checkpoint.find_checkpoint(path)


def _load_adapted(
    path: str | Path, file: AdapterFile, base: str | Path | None, dtype: Any, shardings: Any, report: Report
) -> tuple[ModelConfig, Params]:
    config, adapter = checkpoint.load_params(path, report=report)
    base = file.find_base(path) if base is None else base
    load_base = load_reward_params if is_reward_model(adapter) else load_params
    base_config, params = load_base(base, dtype=dtype, shardings=shardings, report=report)
    if difference := shape_difference(config.resolved(), base_config.resolved()):
        name, ours, theirs = difference
        raise AdapterError(f"{path} adapts a model with {name} {ours}; {base} has {theirs} and cannot be its base")
    where = dict(jax.tree_util.tree_flatten_with_path(jax.tree.map(lambda leaf: leaf.sharding, params))[0])
    if isinstance(first := next(iter(where.values())), NamedSharding):
        adapter = jax.device_put(adapter, NamedSharding(first.mesh, PartitionSpec()))
    merged = jax.jit(merge, static_argnums=2, donate_argnums=0)(params, adapter, file.lora)
    return config, jax.tree.map_with_path(lambda key, leaf: jax.device_put(leaf, where.get(key, leaf.sharding)), merged)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a model's tokenizer; a Hugging Face folder without one gives a `MissingTokenizer`.

    Raises:
        CheckpointError, TokenizerError: there is none, or it cannot be read.
    """
    values = read_hf_config(path)
    if values is None:
        return Tokenizer.from_files(checkpoint.load_tokenizer_files(path))
    if (Path(path) / "tokenizer.json").is_file():
        return Tokenizer.load(path)
    file = Path(path) / GENERATION_CONFIG_FILE
    ends = (json.loads(file.read_text("utf-8")) if file.is_file() else values).get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    vocab_size = _in_folder(path, values).vocab_size
    return MissingTokenizer.for_model(vocab_size, [end for end in ends if end < vocab_size])


def _in_folder(path: str | Path, values: dict[str, Any]) -> ModelConfig:
    try:
        return model_config_from_hf(values)
    except HfError as error:
        raise HfError(f"{path}: {error}") from error
