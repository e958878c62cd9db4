"""What `python -m minillm_jax.lora` does: merge an adapter into its base, and change its format to PEFT's and back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import tyro

from minillm_jax import checkpoint, lora
from minillm_jax.adapter_file import ADAPTER_FILE, AdapterError, AdapterFile, read_adapter_file
from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.hf_config import HfError
from minillm_jax.lora_peft import CONFIG_FILE, read_peft, write_peft
from minillm_jax.model import Params
from minillm_jax.pretrained import load_params, load_tokenizer, pin, read_hf_config, read_model_config
from minillm_jax.run import write_run
from minillm_jax.tokenizer import MissingTokenizer, Tokenizer


def _adapter_file(path: str) -> AdapterFile:
    file = read_adapter_file(path) if read_hf_config(path) is None else None
    if file is None:
        raise AdapterError(f"--model_path {path} is no adapter's run: it holds a whole model")
    return file


def merge_command(
    model_path: str,
    out_dir: str,
    base: str | None = None,
    dtype: Literal["stored", "float32", "bfloat16"] = "stored",
    overwrite: bool = False,
) -> None:
    """Make a plain run of an adapter and its base.

    Args:
        model_path: Run of an adapter, or one of its checkpoints.
        out_dir: Run folder to make.
        base: Another copy of the base, where the one it was trained on is gone.
        dtype: Type that parameters are kept in.
        overwrite: Delete what out_dir holds.
    """
    file = _adapter_file(model_path)
    config, params = load_params(model_path, base=base, dtype=None if dtype == "stored" else jnp.dtype(dtype))
    settings = {"stage": "merge", "adapter": model_path, "base": base or str(file.find_base(model_path))}
    write_run(Path(out_dir), config, params, load_tokenizer(model_path), settings, overwrite=overwrite)
    print(f"{_count(params)} parameters; the run is {out_dir}")


def export_command(model_path: str, to: str, base_name: str | None = None, overwrite: bool = False) -> None:
    """Write an adapter as PEFT reads it.

    Args:
        model_path: Run of an adapter, or one of its checkpoints.
        to: Folder to write.
        base_name: What the folder calls its base, such as a Hugging Face export of it; None is its path.
        overwrite: Replace an earlier export.
    """
    file = _adapter_file(model_path)
    folder = Path(to).absolute()
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise HfError(f"--to {to} is not empty; choose another folder, or --overwrite")
        if not (folder / CONFIG_FILE).exists():
            raise HfError(f"--overwrite: {to} holds no earlier export; delete it yourself")
    config, adapter = checkpoint.load_params(model_path)
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_peft(partial, adapter, config, file.lora, base_name or file.base)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        raise HfError(f"{folder}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{_count(adapter)} parameters of rank {file.lora.lora_rank} in {to}; read back and compared")


def import_command(
    from_: Annotated[str, tyro.conf.arg(name="from")],
    model_path: str,
    out_dir: str,
    tokenizer_path: str | None = None,
    overwrite: bool = False,
) -> None:
    """Make a run of an adapter that PEFT saved.

    Args:
        from_: Folder with adapter_config.json and adapter_model.safetensors.
        model_path: Its base: a run, a checkpoint or a Hugging Face folder.
        out_dir: Run folder to make.
        tokenizer_path: Tokenizer folder, where the base has none.
        overwrite: Delete what out_dir holds.
    """
    tokenizer = load_tokenizer(model_path) if tokenizer_path is None else Tokenizer.load(tokenizer_path)
    if isinstance(tokenizer, MissingTokenizer):
        raise HfError(f"--model_path {model_path}: has no tokenizer.json; name a tokenizer with --tokenizer_path")
    config = read_model_config(model_path).resolved()
    settings, adapter = read_peft(Path(from_), config)
    file = AdapterFile.of(settings, pin(model_path), Path(out_dir))
    write_run(
        Path(out_dir),
        config,
        adapter,
        tokenizer,
        {"stage": "import", "source": from_},
        files={ADAPTER_FILE: file.to_json()},
        overwrite=overwrite,
    )
    print(f"{_count(adapter)} parameters of rank {settings.lora_rank} from {from_}; the run is {out_dir}")


def _count(params: Params) -> str:
    return f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,}"


def main() -> int:
    """Merge, export or import; returns the exit status."""
    with user_errors():
        setup_jax()
        tyro.extras.subcommand_cli_from_dict(
            {"merge": merge_command, "export": export_command, "import": import_command},
            prog="python -m minillm_jax.lora",
            description=str(lora.__doc__),
            use_underscores=True,
        )
    return 0
