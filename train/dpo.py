"""Preference optimisation: learn from pairs of a better and a worse answer to the same prompt.

    python -m train.dpo --data_path pairs.jsonl --model_path out/sft --out_dir out/dpo

Rows are `{"chosen": [turns], "rejected": [turns]}` that differ in their last turn. DPO is the default; `--loss_type`
chooses another loss. The model at `--model_path` is where training starts and, for losses that need one, the reference:
its log-probabilities are computed once before training and kept in the run folder, so that a resumed run has the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from minillm_jax.checkpoint import CHECKPOINTS
from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import (
    ComputeConfig,
    ConfigError,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    parse_cli,
)
from minillm_jax.data import PairRows
from minillm_jax.model import Params, param_axes
from minillm_jax.preference import PreferenceConfig, preference_loss, reference_logps
from minillm_jax.preference import dpo_loss as dpo_loss
from minillm_jax.pretrained import load_params, read_model_config
from minillm_jax.run import Run, load_stage_pairs, open_run, run_job
from minillm_jax.samples import answer_chats
from minillm_jax.sharding import data_parallelism, make_mesh, tree_shardings

REFERENCE_FILE = "reference.npz"


@dataclass(frozen=True)
class DpoConfig:
    """Settings of a preference optimisation run."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig = OptimConfig(weight_decay=0.0)
    compute: ComputeConfig = ComputeConfig()
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    lora: LoraConfig = LoraConfig()


def load_reference(config: DpoConfig, run: Run, mesh: Mesh) -> Params:
    """Load the model that training starts from, laid out over the mesh as the policy is."""
    shardings = tree_shardings(mesh, param_axes(run.model))
    return load_params(str(config.run.model_path), dtype=jnp.float32, shardings=shardings)[1]


def fingerprint(params: Params) -> str:
    """Tell two models apart by the sums of their parameters; the same model on another mesh may look different."""
    sums = jax.jit(lambda tree: [jnp.stack([x.sum(), jnp.abs(x).sum()]) for x in jax.tree.leaves(tree)])(params)
    return hashlib.sha256(np.asarray(jax.device_get(sums)).tobytes()).hexdigest()


def with_reference(config: DpoConfig, run: Run, parts: dict[str, PairRows]) -> dict[str, PairRows]:
    """Give pairs the reference's log-probabilities: those of the run folder, or new ones, which are then kept there.

    A run that has a checkpoint takes what it began with, whatever lies at `--model_path` by now.

    Raises:
        ConfigError: the run has a checkpoint, but began with other pairs.
    """
    path = run.folder / REFERENCE_FILE
    resuming = any(folder.name.isdigit() for folder in (run.folder / CHECKPOINTS).glob("*"))
    data = " ".join(rows.fingerprint() for rows in parts.values())
    saved = _read_reference(path)
    same_data = str(saved.get("data")) == data
    if resuming and saved and not same_data:
        raise ConfigError(
            f"{run.folder} holds a run on other pairs: the files of --data_path have changed since it began; "
            "use another --out_dir, or --overwrite to start afresh"
        )
    if not (resuming and same_data):
        mesh = make_mesh(config.run.mesh)
        params, ways = load_reference(config, run, mesh), data_parallelism(mesh)
        rows_at_once = ways * -(-config.data.batch_size // ways)
        model = fingerprint(params)
        if not (same_data and str(saved.get("model")) == model):
            print("computing the reference's log-probabilities")
            logps = {
                name: reference_logps(params, run.model, config.compute, rows, rows_at_once, mesh)
                for name, rows in parts.items()
            }
            saved = {"data": np.asarray(data), "model": np.asarray(model), **logps}
            if jax.process_index() == 0:
                _write_reference(path, saved)
    return {name: dataclasses.replace(rows, ref_logps=saved[name]) for name, rows in parts.items()}


def _read_reference(path: Path) -> dict[str, np.ndarray]:
    """Read what `_write_reference` wrote; nothing if there is nothing."""
    if not path.exists():
        return {}
    with np.load(path) as arrays:
        return dict(arrays)


def _write_reference(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the file so that a kill leaves all of it or none."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    temporary.replace(path)


def main() -> int:
    """Run the stage; returns the exit status."""
    with user_errors():
        config = parse_cli(DpoConfig, str(__doc__), read_model=read_model_config)
        if config.run.model_path is None:
            raise ConfigError("--model_path is needed: preferences are learnt by a model that can already answer")
        setup_jax()
        run = open_run(config)
        train_rows, valid_rows = load_stage_pairs(config, run, config.data.max_seq_len)
        parts = {"train": train_rows} | ({} if valid_rows is None else {"valid": valid_rows})
        needs_reference, online = config.preference.needs_reference, config.preference.reference == "online"
        if needs_reference and not online:
            parts = with_reference(config, run, parts)

        def reference(mesh: Mesh, base: Params | None) -> Params:
            return load_reference(config, run, mesh) if base is None else base  # an adapter's base is held once

        return run_job(
            config,
            run,
            preference_loss(run.model, config.compute, config.preference),
            parts["train"],
            parts.get("valid"),
            make_frozen=reference if needs_reference and online else None,
            sample=lambda lm: answer_chats(lm, config.run.sample_prompts),
        )


if __name__ == "__main__":
    sys.exit(main())
