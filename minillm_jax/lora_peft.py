"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, in and out.

A factor here stacks all layers and multiplies from the right; there, each layer's is a matrix of its own, `lora_A`
being `[r, in]` and `lora_B` `[out, r]`. Names of modules are those of `hf_tensors`. Whatever a folder asks for that is
not implemented here is an error that names it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from minillm_jax.config import LoraConfig, ModelConfig
from minillm_jax.hf_config import HfError
from minillm_jax.hf_tensors import leaf_pieces, param_shapes
from minillm_jax.lora import projections, target_paths
from minillm_jax.model import Params

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR_NAMES = {"a": "lora_A.weight", "b": "lora_B.weight"}
PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base as it is; others subtract something from its weights."""
READ_FIELDS = {"r", "lora_alpha", "lora_dropout", "use_rslora"}
SILENT_FIELDS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
"""Fields that change nothing about what is computed, or that the tensors' names say as well."""


def write_peft(folder: Path, adapter: Params, model: ModelConfig, lora: LoraConfig, base: str) -> None:
    """Write an adapter as `peft.PeftModel.from_pretrained` reads it, and read it back.

    Args:
        folder: exists.
        adapter: its factors, and nothing else.
        model: shape of the base.
        lora: settings of the adapter.
        base: what the folder says that it belongs to, a folder or a name.

    Raises:
        HfError: PEFT or transformers has no counterpart of the model, or of what is adapted.
    """
    tensors: dict[str, np.ndarray] = {}
    targets = _targets(model, lora)
    for target in targets:
        factors = _at(adapter, target.path)
        for factor, name in FACTOR_NAMES.items():
            for module, matrix in zip(target.modules, np.asarray(factors[factor], np.float32), strict=True):
                tensors[f"{PREFIX}{module}.{name}"] = np.ascontiguousarray(matrix.T)
    if len(jax.tree.leaves(adapter)) != 2 * len(targets):
        raise HfError("this adapter has parameters that are no factors of a projection; PEFT's format has no place")
    alpha = lora.lora_alpha
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.lora_rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": lora.lora_dropout,
        "use_rslora": lora.use_rslora,
        "target_modules": sorted({target.path[-1] for target in targets}),
        "bias": "none",
        "fan_in_fan_out": False,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    (folder / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
    again = read_peft(folder, model)[1]
    if not jax.tree.all(jax.tree.map(np.array_equal, again, adapter)):
        raise HfError(f"{folder}: what was written differs when it is read back")


def read_peft(folder: Path, model: ModelConfig) -> tuple[LoraConfig, Params]:
    """Read an adapter that PEFT saved, as float32.

    Args:
        folder: holds the two files.
        model: shape of the base.

    Raises:
        HfError: it holds something that is not implemented, or tensors that do not fit the base; they are named.
    """
    try:
        values = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise HfError(f"{folder}: is no adapter of PEFT ({error})") from error
    _refuse_other_kinds(folder, values)
    shapes = param_shapes(model)
    adapter: Params = {}
    targets = []
    for name, path in projections(shapes):
        target = None if _without_counterpart(path, model) else _target(path, shapes, model)
        if target is None or not any(f"{PREFIX}{module}.{FACTOR_NAMES['a']}" in tensors for module in target.modules):
            continue
        targets.append(name)
        node = adapter
        for key in target.path:
            node = node.setdefault(key, {})
        node |= {factor: _read_factor(folder, target, factor, values["r"], tensors) for factor in FACTOR_NAMES}
    if tensors:
        raise HfError(f"{folder}: tensor {min(tensors)} has no place in the base")
    if not targets:
        raise HfError(f"{folder}: adapts nothing")
    alpha, dropout = float(values["lora_alpha"]), float(values.get("lora_dropout") or 0.0)
    return LoraConfig(values["r"], alpha, dropout, tuple(targets), bool(values.get("use_rslora", False))), adapter


def _read_factor(folder: Path, target: _Target, factor: str, rank: int, tensors: dict[str, np.ndarray]) -> jax.Array:
    """Take one factor of all layers out of `tensors`: `[L, in, r]` or `[L, r, out]`."""
    names = [f"{PREFIX}{module}.{FACTOR_NAMES[factor]}" for module in target.modules]
    wanted = (rank, target.width) if factor == "a" else (target.features, rank)
    for name in names:
        if name not in tensors:
            raise HfError(f"{folder}: tensor {name} is missing; adapters of some layers only are not read")
        if tensors[name].shape != wanted:
            raise HfError(
                f"{folder}: tensor {name} has shape {list(tensors[name].shape)}, not {list(wanted)}; it belongs to "
                "another base or has another rank"
            )
    return jnp.stack([tensors.pop(name).astype(np.float32).T for name in names])


@dataclass(frozen=True)
class _Target:
    """One adapted projection: its path in the tree, the module of each layer there, and its weight's `[in, out]`."""

    path: tuple[str, ...]
    modules: list[str]
    width: int
    features: int


def _target(path: tuple[str, ...], shapes: Params, model: ModelConfig) -> _Target:
    shape = _at(shapes, path).shape
    modules = [piece.name.removesuffix(".weight") for piece in leaf_pieces(".".join(path), shape, model)]
    return _Target(path[:-1], modules, *shape[-2:])


def _targets(model: ModelConfig, lora: LoraConfig) -> list[_Target]:
    """List what an adapter adapts; raises HfError where there is no counterpart."""
    shapes = param_shapes(model)
    paths = target_paths(shapes, lora)
    if inside := [path for path in paths if _without_counterpart(path, model)]:
        raise HfError(
            f"{'.'.join(inside[0])} is adapted, and PEFT has no counterpart of adapters on experts or routers: "
            "transformers fuses gate and up of all experts into one parameter. Train with --lora_targets q_proj k_proj "
            "v_proj o_proj, or merge the adapter and export the model with minillm_jax.hf"
        )
    return [_target(path, shapes, model) for path in paths]


def _without_counterpart(path: tuple[str, ...], model: ModelConfig) -> bool:
    return model.use_moe and "mlp" in path


def _at(tree: Params, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _refuse_other_kinds(folder: Path, values: dict[str, Any]) -> None:
    if values.get("peft_type") != "LORA":
        raise HfError(f"{folder}: is an adapter of type {values.get('peft_type')}; only LORA is read")
    if values.get("init_lora_weights", True) not in PLAIN_INITIALISATIONS:
        raise HfError(
            f"{folder}: init_lora_weights {values['init_lora_weights']} changes the base's weights; save the adapter "
            "as plain LoRA (path_initial_model_for_weight_conversion) first"
        )
    for name, value in values.items():
        if name not in READ_FIELDS | SILENT_FIELDS and value not in (None, False, {}, [], "none"):
            raise HfError(f"{folder}: {name} = {value} in {CONFIG_FILE} is not implemented")
    for name in ("r", "lora_alpha"):
        if name not in values:
            raise HfError(f"{folder}: {CONFIG_FILE} has no {name}")
