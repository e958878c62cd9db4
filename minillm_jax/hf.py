"""Hugging Face folders in and out.

    python -m minillm_jax.hf import --from Qwen3-0.6B --out_dir out/qwen
    python -m minillm_jax.hf export --model_path out/sft --to out/sft-hf --dtype bfloat16

Import makes a run of a folder; every stage also takes such a folder as its `--model_path`. Export writes what
`transformers` and the engines beside it load strictly. It is written under another name, read back, and compared in
logits before it gets its own: a folder that exists is one that was checked.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.typing import ArrayLike
from safetensors import SafetensorError
from safetensors.numpy import save_file

from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import ComputeConfig, ConfigError, ModelConfig
from minillm_jax.hf_config import HfError, is_classifier, model_config_from_hf, model_config_to_hf
from minillm_jax.hf_tensors import INDEX_FILE, WEIGHTS_FILE, hf_tensor_shapes, read_params, to_hf
from minillm_jax.lm import LanguageModel, load
from minillm_jax.model import Params, forward
from minillm_jax.pretrained import CONFIG_FILE, GENERATION_CONFIG_FILE, load_params, load_tokenizer, read_hf_config
from minillm_jax.reward import is_reward_model, reward_scores
from minillm_jax.run import write_run
from minillm_jax.tokenizer import MissingTokenizer, Tokenizer

UNITS = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
CHECK_ROWS, CHECK_TOKENS = 2, 32
"""Random tokens whose logits an export must reproduce."""


def export_hf(
    lm: LanguageModel,
    folder: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
) -> None:
    """Write a model as a folder that `transformers` loads with no missing and no unexpected tensor.

    Dense models become Llama (or Mistral, where heads do not divide the width), Qwen2 with attention biases and Qwen3
    with QK-norm; mixtures of experts become Qwen3-MoE with QK-norm and Mixtral without; reward models become their
    `…ForSequenceClassification` with one label. The folder holds configuration, generation configuration, weights,
    tokenizer with chat template, and a model card.

    Args:
        lm: the model. One without a tokenizer gives a folder without one.
        folder: must not exist yet, or be empty, unless `overwrite`.
        dtype: floating-point type of the weights; None keeps that of the parameters.
        max_shard_size: bytes, or a string such as `5GB`, above which weights are split into several files.
        overwrite: replace a folder that holds an earlier export.

    Raises:
        HfError: the model has no counterpart, the folder is in use or cannot be written, or what was written does not
            give the same logits. Nothing is left behind, and an older folder stays as it was.
    """
    folder = Path(folder).absolute()
    name = dtype or str(jax.tree.leaves(lm.params)[0].dtype)
    if name not in ("float32", "bfloat16", "float16"):
        raise HfError(f"--dtype {name}: choose float32, bfloat16 or float16")
    limit = parse_size(max_shard_size)
    config_json = model_config_to_hf(lm.config, dtype=name, classifier=is_reward_model(lm.params))
    _refuse_used(folder, overwrite)
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _refuse_full_disk(partial, lm, name)
        _write_texts(partial, lm, config_json)
        write_weights(partial, lm.params, lm.config, dtype=name, max_shard_size=limit)
        _check_export(partial, lm, name)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise HfError(f"{folder}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def parse_size(size: str | int) -> int:
    """Read a number of bytes such as `5GB` or `300MiB`.

    Raises:
        HfError: it is not one.
    """
    text = str(size).strip()
    unit = next((unit for unit in UNITS if text.endswith(unit)), "")
    try:
        count = int(float(text.removesuffix(unit)) * UNITS.get(unit, 1))
    except ValueError:
        count = 0
    if count < 1:
        raise HfError(f"--max_shard_size {size}: write a number of bytes, such as 5GB or 300MB")
    return count


def write_weights(folder: Path, params: Params, config: ModelConfig, *, dtype: str, max_shard_size: int) -> None:
    """Write `model.safetensors`, or several files with an index; no more than one file's tensors are held at a time.

    Args:
        folder: exists.
        params: parameters.
        config: the model.
        dtype: floating-point type of the weights.
        max_shard_size: bytes per file; a single larger tensor gets a file of its own.
    """
    size = jnp.dtype(dtype).itemsize
    bytes_of = {name: int(np.prod(shape)) * size for name, shape in hf_tensor_shapes(params, config).items()}
    shards: list[list[str]] = [[]]
    room = max_shard_size
    for name, count in bytes_of.items():
        if shards[-1] and count > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(name)
        room -= count
    files = [WEIGHTS_FILE] if len(shards) == 1 else [
        f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
    ]  # fmt: skip
    tensors = to_hf(params, config, dtype)
    for file, names in zip(files, shards, strict=True):
        save_file({name: next(tensors)[1] for name in names}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o666 & ~_umask())  # the library makes it private
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(bytes_of.values())}, "weight_map": where}
        _write_json(folder / INDEX_FILE, index)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _refuse_used(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise HfError(f"{folder} is not empty; choose another folder, or --overwrite to replace an earlier export")
    if read_hf_config(folder) is None:
        raise HfError(f"--overwrite: {folder} holds no earlier export; delete it yourself")


def _refuse_full_disk(folder: Path, lm: LanguageModel, dtype: str) -> None:
    needed = sum(leaf.size for leaf in jax.tree.leaves(lm.params)) * jnp.dtype(dtype).itemsize + 2**24
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise HfError(f"{folder.parent}: the export needs {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free")


def _write_texts(folder: Path, lm: LanguageModel, config_json: dict[str, Any]) -> None:
    ends = list(lm.tokenizer.eos_token_ids)
    ids: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    if not isinstance(lm.tokenizer, MissingTokenizer):
        ids |= {"bos_token_id": lm.tokenizer.bos_token_id, "pad_token_id": lm.tokenizer.pad_token_id}
        lm.tokenizer.save(folder)
    _write_json(folder / CONFIG_FILE, config_json | ids)
    if not is_reward_model(lm.params):
        _write_json(folder / GENERATION_CONFIG_FILE, ids)
    (folder / "README.md").write_text(_model_card(lm, config_json), "utf-8")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _model_card(lm: LanguageModel, config_json: dict[str, Any]) -> str:
    scored = is_reward_model(lm.params)
    kind = "SequenceClassification" if scored else "CausalLM"
    c = lm.config
    experts = f", {c.num_experts} experts of which a token visits {c.num_experts_per_tok}" if c.use_moe else ""
    count = sum(leaf.size for leaf in jax.tree.leaves(lm.params))
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {'text-classification' if scored else 'text-generation'}",
        "tags: [minillm-jax]",
        "---",
        "",
        f"# {'A reward model' if scored else 'A language model'} trained with minillm-jax",
        "",
        f"{config_json['architectures'][0]}: {count:,} parameters in {config_json['torch_dtype']}, "
        f"{c.num_hidden_layers} layers of width {c.hidden_size}, {c.num_attention_heads} query and "
        f"{c.num_key_value_heads} key-value heads{experts}, a vocabulary of {c.vocab_size:,} and a context of "
        f"{c.max_position_embeddings:,} tokens. Exported by version {version('minillm-jax')} and checked: read back, "
        "it gives the logits of the model that was trained.",
        "",
        "```python",
        f"from transformers import AutoModelFor{kind}, AutoTokenizer",
        "",
        f'model = AutoModelFor{kind}.from_pretrained("PATH")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        "```",
        "",
        "Settings of training alone (dropout, and where the load of experts is balanced) are not part of this folder.",
        "",
    ]
    return "\n".join(lines)


def _check_export(folder: Path, lm: LanguageModel, dtype: str) -> None:
    """Read the folder back, and compare its logits with those of the parameters as they were cast."""
    values = read_hf_config(folder)
    assert values is not None
    config = model_config_from_hf(values)
    length = min(CHECK_TOKENS, config.max_position_embeddings)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (CHECK_ROWS, length), np.int32)
    outputs: Callable[..., ArrayLike] = reward_scores if is_classifier(values) else forward
    compute = ComputeConfig(dtype="float32")
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), lm.params)
    expected = np.asarray(outputs(cast, lm.config, tokens, compute=compute))
    del cast
    params = read_params(folder, config, scored=is_classifier(values))
    found = np.asarray(outputs(params, config, tokens, compute=compute))
    error = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))
    if not error <= 1e-5:
        raise HfError(
            f"{folder}: what was written gives other logits when it is read back (relative error {error:.1e}); "
            "the folder was removed"
        )


# --- The command line --------------------------------------------------------------------------------------------


def import_command(
    from_: Annotated[str, tyro.conf.arg(name="from")],
    out_dir: str,
    dtype: Literal["stored", "float32", "bfloat16"] = "stored",
    tokenizer_path: str | None = None,
    overwrite: bool = False,
) -> None:
    """Make a run of a Hugging Face folder.

    Args:
        from_: Folder with config.json, *.safetensors and tokenizer files.
        out_dir: Run folder to make.
        dtype: Type that parameters are kept in; training works on float32 whatever this is.
        tokenizer_path: Tokenizer folder, where the first one has none.
        overwrite: Delete what out_dir holds.
    """
    source, folder = Path(from_), Path(out_dir)
    if read_hf_config(source) is None:
        raise HfError(f"--from {source}: is no Hugging Face folder; expected {CONFIG_FILE} and *.safetensors files")
    tokenizer = load_tokenizer(source) if tokenizer_path is None else Tokenizer.load(tokenizer_path)
    if isinstance(tokenizer, MissingTokenizer):
        raise HfError(f"--from {source}: has no tokenizer.json; name a tokenizer with --tokenizer_path")
    if not overwrite and folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--out_dir {folder} is not empty; choose another folder, or --overwrite")
    config, params = load_params(source, dtype=None if dtype == "stored" else jnp.dtype(dtype))
    if tokenizer.vocab_size > config.vocab_size:
        raise HfError(f"the tokenizer has {tokenizer.vocab_size} tokens, and the model only {config.vocab_size}")
    settings = {"stage": "import", "source": str(source), "dtype": dtype}
    write_run(folder, config, params, tokenizer, settings, overwrite=overwrite)
    leaves = jax.tree.leaves(params)
    size = sum(leaf.nbytes for leaf in leaves) / 1e6
    print(f"{sum(leaf.size for leaf in leaves):,} parameters ({size:,.1f} MB in {leaves[0].dtype}) imported: {folder}")


def export_command(
    model_path: str,
    to: str,
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "stored",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Write a model as a Hugging Face folder.

    Args:
        model_path: Run, one of its checkpoints, or a Hugging Face folder.
        to: Folder to write.
        dtype: Type of the weights.
        max_shard_size: Size above which weights are split into several files, such as 300MB or 5GB.
        overwrite: Replace an earlier export.
    """
    lm = load(model_path, dtype="stored")
    export_hf(lm, to, dtype=None if dtype == "stored" else dtype, max_shard_size=max_shard_size, overwrite=overwrite)
    values = read_hf_config(to)
    assert values is not None
    count = sum(leaf.size for leaf in jax.tree.leaves(lm.params))
    print(
        f"{count:,} parameters as {values['architectures'][0]} in {values['torch_dtype']}; read back and compared: {to}"
    )


def main() -> int:
    """Import or export; returns the exit status."""
    with user_errors():
        setup_jax()
        jax.config.update("jax_platforms", "cpu")  # moving weights is the host's work, whose memory is the larger one
        tyro.extras.subcommand_cli_from_dict(
            {"import": import_command, "export": export_command},
            prog="python -m minillm_jax.hf",
            description=str(__doc__),
            use_underscores=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
