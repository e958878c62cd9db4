"""The run folder, and what every training stage does around its loss: open, resume or refuse, load, report errors.

What a run trains is decided here: with `--lora_rank` an adapter takes the place of the parameters, in optimizer state
and checkpoints alike, and a stage's loss does not notice. `open_run` turns a stage's configuration into a folder on
disk with `config.json` and `tokenizer/` in it. A folder that already holds a run is resumed, and only when the flags
describe the same run.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from minillm_jax.adapter_file import ADAPTER_FILE, AdapterFile
from minillm_jax.checkpoint import TOKENIZER, Checkpointer
from minillm_jax.config import (
    ComputeConfig,
    ConfigError,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    to_json,
)
from minillm_jax.data import PairRows, Rows, TokenRows, load_pairs, load_rows
from minillm_jax.lm import LanguageModel
from minillm_jax.lora import adapted_loss, adapter_axes, combine, init_adapter, target_paths
from minillm_jax.losses import LossFn
from minillm_jax.metrics import plot_curves
from minillm_jax.model import Params, init_params, param_axes
from minillm_jax.pretrained import load_params, load_reward_params, load_tokenizer, pin, read_hf_config
from minillm_jax.reward import reward_axes, reward_shapes
from minillm_jax.sharding import check_mesh, check_rows, make_mesh, tree_shardings
from minillm_jax.tokenizer import Tokenizer
from minillm_jax.trainer import Job, TransformBatch, train

MAY_CHANGE = {
    "run": {"epochs", "steps", "save_interval", "keep", "log_interval", "eval_interval", "sample_interval",
            "sample_prompts", "mesh", "overwrite", "max_skipped_steps", "wandb_project", "out_dir"},
    "data": {"cache_dir", "num_proc"},
    "compute": {"dtype", "attention_impl", "remat", "unroll"},
    "reason": {"report_rows", "report_max_new_tokens", "report_temperature", "report_batch_size"},
    "rollout": {"eval_prompts", "save_rollouts", "rollout_batch_size"},
    "health": {"min_reward", "min_reward_std", "max_kl", "min_entropy", "max_entropy", "min_eos_rate",
               "max_completion_length", "max_zero_variance", "max_ratio", "max_clip_fraction",
               "min_explained_variance", "health_patience"},
}  # fmt: skip
"""Settings that a resumed run may change: none of them alters which rows come next or what is optimised."""

LoadParams = Callable[..., tuple[ModelConfig, Params]]
"""`pretrained.load_params`, or `load_reward_params`, which makes a reward model of whatever it finds."""


class ModelStageConfig(Protocol):
    """What the configuration of a stage that trains a model holds; with a group `lora` it can train an adapter."""

    @property
    def run(self) -> RunConfig: ...  # noqa: D102
    @property
    def model(self) -> ModelConfig: ...  # noqa: D102
    @property
    def optim(self) -> OptimConfig: ...  # noqa: D102
    @property
    def compute(self) -> ComputeConfig: ...  # noqa: D102


class StageConfig(ModelStageConfig, Protocol):
    """What a supervised stage's configuration holds."""

    @property
    def data(self) -> DataConfig: ...  # noqa: D102


@dataclass(frozen=True)
class Run:
    """An open run folder.

    Attributes:
        folder: where everything goes.
        model: the model's shape, with the vocabulary of the tokenizer and every derived size written out.
        tokenizer: of the model.
    """

    folder: Path
    model: ModelConfig
    tokenizer: Tokenizer


def open_run(config: ModelStageConfig) -> Run:
    """Create or reopen the run folder of a stage.

    Raises:
        ConfigError: the folder holds a run with other settings or files that are no run, no tokenizer was named, an
            adapter was asked for without a base, or on targets that the model has not; or the mesh cannot split the
            model or the rows of a batch.
    """
    folder = Path(config.run.out_dir)
    saved_path = folder / "config.json"
    if config.run.overwrite:
        clear_run(folder)
    tokenizer = _find_tokenizer(config.run, folder)
    model = _fit_vocabulary(config.model, tokenizer, config.run.model_path).resolved()
    mesh = make_mesh(config.run.mesh)
    check_mesh(mesh, model)
    if isinstance(data := getattr(config, "data", None), DataConfig):  # reinforcement splits prompts in its own way
        check_rows(mesh, data.batch_size)
    if (lora := lora_of(config)) is not None:
        if config.run.model_path is None:
            raise ConfigError("--lora_rank needs --model_path: an adapter is trained on a model that exists")
        target_paths(_model_shapes(model), lora)
    settings = json.loads(to_json(config))
    settings["model"] = dataclasses.asdict(model)
    settings = json.loads(json.dumps(settings))
    if saved_path.exists():
        _check_same_run(json.loads(saved_path.read_text()), settings, folder)
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--out_dir {folder} is neither empty nor a run; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / "tokenizer")
    write_atomically(saved_path, json.dumps(settings, indent=2) + "\n")
    return Run(folder, model, tokenizer)


def clear_run(folder: Path) -> None:
    """Delete a run folder, if there is one.

    Raises:
        ConfigError: the folder holds something else.
    """
    if not folder.exists():
        return
    if not (folder / "config.json").exists() and any(folder.iterdir()):
        raise ConfigError(f"--overwrite: {folder} does not look like a run (no config.json); delete it yourself")
    if read_hf_config(folder) is not None:
        raise ConfigError(f"--overwrite: {folder} is a Hugging Face folder and no run; delete it yourself")
    shutil.rmtree(folder)


def _find_tokenizer(run: RunConfig, folder: Path) -> Tokenizer:
    if run.tokenizer_path is not None:
        return Tokenizer.load(run.tokenizer_path)
    if run.model_path is not None:
        return load_tokenizer(run.model_path)
    if (folder / "tokenizer").exists():
        return Tokenizer.load(folder / "tokenizer")
    raise ConfigError("--tokenizer_path is needed when there is no --model_path; make one with train.tokenizer")


def _fit_vocabulary(model: ModelConfig, tokenizer: Tokenizer, model_path: str | None) -> ModelConfig:
    """Give a new model the tokenizer's vocabulary, unless a larger one was asked for."""
    size = tokenizer.vocab_size
    if model_path is None and model.vocab_size == ModelConfig().vocab_size:
        return dataclasses.replace(model, vocab_size=size)
    if model.vocab_size < size:
        raise ConfigError(
            f"vocab_size {model.vocab_size} is smaller than the tokenizer's {size}; use the model's own tokenizer"
        )
    return model


def _check_same_run(saved: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    for group, values in asked.items():
        if not isinstance(values, dict):
            continue
        for name, value in values.items():
            old = saved.get(group, {}).get(name, value)  # a field that is newer than the run has always been so
            if old != value and name not in MAY_CHANGE.get(group, ()):
                raise ConfigError(
                    f"{folder} holds a run with {name} = {old}, but {value} was asked for; "
                    "use the same flags to resume it, another --out_dir, or --overwrite to start afresh"
                )


def write_run(
    folder: Path,
    model: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    *,
    files: dict[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Make a run of parameters that nothing was trained for here: one checkpoint, of step 0.

    Args:
        folder: the run folder to make.
        model: shape of the model.
        params: parameters, or an adapter.
        tokenizer: of the model.
        settings: what `config.json` says about where they come from.
        files: saved in the checkpoint and in the folder.
        overwrite: delete a run that is already there.

    Raises:
        ConfigError: the folder is in use, or cannot be written.
        CheckpointError: the parameters cannot be written.
    """
    if overwrite:
        clear_run(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--out_dir {folder} is not empty; choose another folder, or --overwrite")
    settings = settings | {"model": dataclasses.asdict(model)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in {"config.json": json.dumps(settings, indent=2) + "\n", **(files or {})}.items():
            write_atomically(folder / name, text)
        tokenizer.save(folder / TOKENIZER)
    except OSError as error:
        raise ConfigError(f"--out_dir {folder}: cannot be written: {error}") from error
    with Checkpointer(
        folder, keep=1, model_config=model, tokenizer_files=tokenizer.files(), files=files
    ) as checkpointer:
        checkpointer.save({"params": params, "step": jnp.zeros((), jnp.int32)}, {})


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def initial_params(run: Run, config: RunConfig, load: LoadParams = load_params) -> Callable[[Any], Params]:
    """Make the function that gives a job its first parameters: loaded from `model_path`, or drawn from the seed."""
    if config.model_path is not None:
        path = config.model_path
        return lambda shardings: load(path, dtype=jnp.float32, shardings=shardings)[1]
    draw = partial(init_params, run.model)
    return lambda shardings: jax.jit(draw, out_shardings=shardings)(jax.random.key(config.seed))


def _model_shapes(model: ModelConfig) -> Params:
    return jax.eval_shape(partial(init_params, model), jax.random.key(0))


def lora_of(config: ModelStageConfig) -> LoraConfig | None:
    """Return a stage's adapter settings; None when it trains all parameters."""
    lora: LoraConfig = getattr(config, "lora", LoraConfig())
    return lora if lora.lora_rank else None


@dataclass(frozen=True)
class Trained:
    """What the steps of a run change: all parameters, or an adapter on a frozen base.

    Attributes:
        init_params: makes the first of them, given their shardings.
        param_shapes: tree of their abstract shapes.
        param_axes: tree of their logical axis names.
        lora: settings of the adapter; None for all parameters.
        load_base: loads the adapter's base onto a mesh; None for all parameters.
        files: what a checkpoint needs beside them.
    """

    init_params: Callable[[Any], Params]
    param_shapes: Params
    param_axes: Any
    lora: LoraConfig | None = None
    load_base: Callable[[Mesh], Params] | None = None
    files: dict[str, str] = dataclasses.field(default_factory=dict)

    def loss(self, loss_fn: LossFn) -> LossFn:
        """Make a loss of all parameters one of what is trained; its `frozen` is then what `make_frozen` returns."""
        return loss_fn if self.lora is None else adapted_loss(loss_fn, self.lora)

    def make_frozen(self, rest: Callable[[Mesh, Params | None], Any] | None) -> Callable[[Mesh], Any] | None:
        """Add the base, which is loaded once, to what else a loss takes; `rest` gets the base, or None."""
        load_base = self.load_base
        if load_base is None:
            return None if rest is None else lambda mesh: rest(mesh, None)

        def make(mesh: Mesh) -> dict[str, Any]:
            base = load_base(mesh)
            return {"base": base, "rest": None if rest is None else rest(mesh, base)}

        return make

    def rest(self, frozen: Any) -> Any:
        """Return what the function given to `make_frozen` returned."""
        return frozen if self.lora is None else frozen["rest"]

    def params(self, trained: Params, frozen: Any) -> Params:
        """Return parameters that the model takes, given what is trained and what `make_frozen` returned."""
        return trained if self.lora is None else combine(frozen["base"], trained, self.lora)


def what_to_train(config: ModelStageConfig, run: Run, *, scored: bool = False) -> Trained:
    """Decide by `--lora_rank` what a run trains: all parameters or an adapter, of a language model or a reward model.

    A new run of an adapter pins its base in `adapter.json`; a resumed one takes the base that stands there. A reward
    model's adapter has the whole head beside its factors, which starts as the base's.
    """
    load: LoadParams = load_reward_params if scored else load_params
    shapes = reward_shapes(run.model) if scored else _model_shapes(run.model)
    axes = reward_axes(run.model) if scored else param_axes(run.model)
    if (lora := lora_of(config)) is None:
        return Trained(initial_params(run, config.run, load), shapes, axes)
    path = run.folder / ADAPTER_FILE
    if path.exists():
        file = AdapterFile.from_json(path.read_text("utf-8"))
    else:
        file = AdapterFile.of(lora, pin(str(config.run.model_path)), run.folder)
        write_atomically(path, file.to_json())
    draw = partial(init_adapter, shapes, lora)
    key = jax.random.key(config.run.seed)

    def load_base(mesh: Mesh) -> Params:
        return load(file.find_base(run.folder), dtype=jnp.float32, shardings=tree_shardings(mesh, axes))[1]

    def first(shardings: Any) -> Params:
        factors = {name: branch for name, branch in shardings.items() if name != "score"}
        adapter = jax.jit(draw, out_shardings=factors)(key)
        return adapter | (_head(load_base(shardings["score"]["kernel"].mesh)) if scored else {})

    return Trained(
        init_params=first,
        param_shapes=jax.eval_shape(draw, key) | (_head(shapes) if scored else {}),
        param_axes=adapter_axes(axes, shapes, lora) | (_head(axes) if scored else {}),
        lora=lora,
        load_base=load_base,
        files={ADAPTER_FILE: file.to_json()},
    )


def _head(tree: Params) -> Params:
    """Keep the head of a reward model's tree alone."""
    return {"score": tree["score"]}


def train_on_rows(
    config: StageConfig,
    run: Run,
    kind: str,
    loss_fn: LossFn,
    sample: Callable[[LanguageModel], list[str]] | None = None,
) -> int:
    """Tokenise, pack and train: the body of the stages that learn from packed rows.

    Args:
        config: the stage's configuration.
        run: its open folder.
        kind: row format, `pretrain` or `sft`.
        loss_fn: the loss.
        sample: texts to show every `sample_interval` steps.

    Returns:
        The exit status of the stage.
    """
    train_rows, valid_rows = load_stage_rows(config, run, kind)
    return run_job(config, run, loss_fn, train_rows, valid_rows, sample=sample)


def load_stage_rows(config: StageConfig, run: Run, kind: str) -> tuple[TokenRows, TokenRows | None]:
    """Tokenise and pack the rows that a stage's configuration names; see `data.load_rows`."""
    data = config.data
    return load_rows(
        data.data_path,
        kind,
        run.tokenizer,
        data.max_seq_len,
        on_bad_row=data.on_bad_row,
        cache_dir=data.cache_dir,
        num_proc=data.num_proc,
        seed=config.run.seed,
        valid_fraction=data.valid_fraction,
        valid_path=data.valid_path,
    )


def load_stage_pairs(config: StageConfig, run: Run, max_seq_len: int) -> tuple[PairRows, PairRows | None]:
    """Tokenise the pairs that a stage's configuration names, for rows of at most this many slots; see `load_pairs`."""
    data = config.data
    return load_pairs(
        data.data_path,
        run.tokenizer,
        max_seq_len,
        on_bad_row=data.on_bad_row,
        cache_dir=data.cache_dir,
        num_proc=data.num_proc,
        seed=config.run.seed,
        valid_fraction=data.valid_fraction,
        valid_path=data.valid_path,
    )


def run_job(
    config: StageConfig,
    run: Run,
    loss_fn: LossFn,
    train_rows: Rows,
    valid_rows: Rows | None,
    *,
    make_frozen: Callable[[Mesh, Params | None], Any] | None = None,
    sample: Callable[[LanguageModel], list[str]] | None = None,
    transform_batch: TransformBatch | None = None,
    scored: bool = False,
) -> int:
    """Train the model of a run, or an adapter on it where the configuration has a group `lora` with a rank.

    Args:
        config: the stage's configuration.
        run: its open folder.
        loss_fn: the loss, a function of all parameters in either case.
        train_rows: rows to learn from.
        valid_rows: held-out rows, or None.
        make_frozen: makes the loss's argument that is not trained, given the mesh and the base of an adapter, already
            there (None when all parameters are trained): a reference model that is the base need not be loaded again.
        sample: texts to show every `sample_interval` steps.
        transform_batch: see `trainer.Job`.
        scored: what is trained is a reward model, with a new head where `--model_path` holds a language model.

    Returns:
        The exit status of the stage.
    """
    trained = what_to_train(config, run, scored=scored)

    def show(params: Params, frozen: Any) -> list[str]:
        return [] if sample is None else sample(LanguageModel(run.model, trained.params(params, frozen), run.tokenizer))

    job = Job(
        run=config.run,
        optim=config.optim,
        model=run.model,
        loss_fn=trained.loss(loss_fn),
        init_params=trained.init_params,
        param_shapes=trained.param_shapes,
        param_axes=trained.param_axes,
        train_rows=train_rows,
        valid_rows=valid_rows,
        batch_size=config.data.batch_size,
        max_seq_len=config.data.max_seq_len,
        tokenizer_files=run.tokenizer.files(),
        settings=json.loads(to_json(config)),
        make_frozen=trained.make_frozen(make_frozen),
        sample=None if sample is None else show,
        transform_batch=transform_batch,
        files=trained.files,
        frozen_weights=trained.lora is not None,
    )
    status = train(job)
    plot_curves(run.folder)
    return status
