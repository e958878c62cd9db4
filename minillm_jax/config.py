"""Configuration: small frozen dataclasses, presets, JSON in and out, and the command line.

Every stage composes the dataclasses below into one of its own and hands it to `parse_cli`. A field exists only
when something reads it; its docstring is its `--help` text. This file never imports jax.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import tyro

from minillm_jax.errors import UserError

C = TypeVar("C")


class ConfigError(UserError, ValueError):
    """A configuration that cannot work; the message says which field and what would."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length a model was trained on.

    Field names follow Hugging Face. `linear` divides every frequency by `factor`; `yarn` (arXiv:2309.00071)
    interpolates low frequencies and keeps high ones; `llama3` is the Llama 3.1 blend of the two.
    """

    rope_type: Literal["linear", "yarn", "llama3"] = "yarn"
    """Which formula rescales the frequencies."""
    factor: float = 1.0
    """Context length after scaling over context length before."""
    original_max_position_embeddings: int = 2048
    """Context length, in tokens, before scaling (yarn and llama3)."""
    beta_fast: float = 32.0
    """Rotations within the original context above which a dimension is left alone (yarn)."""
    beta_slow: float = 1.0
    """Rotations within the original context below which a dimension is fully interpolated (yarn)."""
    attention_factor: float | None = None
    """Factor on cos and sin; None derives 0.1 ln(factor) + 1 (yarn)."""
    low_freq_factor: float = 1.0
    """Lower edge of the blend, in wavelengths per original context (llama3)."""
    high_freq_factor: float = 4.0
    """Upper edge of the blend, in wavelengths per original context (llama3)."""


def _parse_rope_scaling(values: list[str]) -> RopeScaling | None:
    text = values[0]
    return None if text.lower() in ("none", "null") else RopeScaling(**json.loads(text))


_RopeScalingFlag = Annotated[
    RopeScaling | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON|None",
        instance_from_str=_parse_rope_scaling,
        is_instance=lambda value: value is None or isinstance(value, RopeScaling),
        str_from_instance=lambda value: ["None" if value is None else json.dumps(dataclasses.asdict(value))],
    ),
]


@dataclass(frozen=True)
class ModelConfig:
    """Shape and mathematics of the transformer. Names are those of Hugging Face configurations."""

    vocab_size: int = 6400
    """Rows of the embedding table; at least the tokenizer's size."""
    hidden_size: int = 512
    """Width D of the residual stream."""
    num_hidden_layers: int = 8
    """Number of transformer blocks."""
    num_attention_heads: int = 8
    """Query heads N."""
    num_key_value_heads: int = 2
    """Key and value heads K (grouped-query attention); divides the query heads."""
    head_dim: int | None = None
    """Size H of one head; None derives hidden_size / num_attention_heads."""
    intermediate_size: int | None = None
    """Hidden width F of the SwiGLU layer; None derives 64 * ceil(8 * hidden_size / 3 / 64)."""
    max_position_embeddings: int = 32768
    """Longest context in tokens; longer inputs are refused."""
    rope_theta: float = 1e6
    """Base of the rotary frequencies."""
    rope_scaling: _RopeScalingFlag = None
    """Context extension as JSON, for example '{"rope_type": "yarn", "factor": 4}'."""
    rms_norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    tie_word_embeddings: bool = True
    """Use the embedding table as the output head."""
    use_qk_norm: bool = False
    """RMSNorm over each query and key head before the rotation (Qwen3)."""
    attention_bias: bool = False
    """Biases on the query, key and value projections (Qwen2)."""
    dropout: float = 0.0
    """Probability of dropping a residual branch's element while training."""
    initializer_range: float = 0.02
    """Standard deviation of initial weights; projections back into the residual stream get 1/sqrt(2 * layers) of it."""
    use_moe: bool = False
    """Replace every MLP by a mixture of experts."""
    num_experts: int = 4
    """Routed experts E per layer."""
    num_experts_per_tok: int = 2
    """Routed experts that each token visits."""
    n_shared_experts: int = 1
    """Experts that every token visits, as one MLP of this many times the expert width; 0 for none."""
    moe_intermediate_size: int | None = None
    """Hidden width of one expert; None takes intermediate_size."""
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become scores."""
    norm_topk_prob: bool = True
    """Rescale the chosen experts' scores to sum to one."""
    router_aux_loss_coef: float = 0.01
    """Weight of the load-balancing loss."""
    router_aux_loss_scope: Literal["sequence", "batch", "model"] = "sequence"
    """Where load is balanced: within each sequence (DeepSeek-V2) or over the whole batch (Switch), layer by layer; or
    over the batch and all layers at once (Mixtral and Qwen3-MoE in transformers)."""
    router_z_loss_coef: float = 0.0
    """Weight of the squared log-partition of router logits (ST-MoE)."""
    expert_capacity_factor: float | None = None
    """While training, most tokens that an expert takes from a row, as a multiple of an even share (GShard, Switch);
    later ones are dropped. None drops nothing, and like dropout this is off outside training."""

    def __post_init__(self) -> None:
        """Refuse impossible shapes."""
        if self.num_attention_heads < 1 or self.num_key_value_heads < 1:
            raise ConfigError("num_attention_heads and num_key_value_heads must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                f"({self.num_attention_heads}); set head_dim to choose the head size yourself"
            )
        if self.head_size % 2:
            raise ConfigError(f"head_dim ({self.head_size}) must be even: rotary embedding turns pairs")
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "mlp_size", "num_experts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must lie between 1 and "
                f"num_experts ({self.num_experts})"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout must lie in [0, 1), not {self.dropout}")
        if self.expert_capacity_factor is not None and self.expert_capacity_factor <= 0:
            raise ConfigError(
                f"expert_capacity_factor must be positive, or None to drop nothing, not {self.expert_capacity_factor}"
            )

    @property
    def head_size(self) -> int:
        """Size H of one attention head."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_attention_heads

    @property
    def mlp_size(self) -> int:
        """Hidden width F of the dense SwiGLU layer."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return 64 * math.ceil(8 * self.hidden_size / 3 / 64)

    @property
    def expert_size(self) -> int:
        """Hidden width of one expert."""
        return self.moe_intermediate_size if self.moe_intermediate_size is not None else self.mlp_size

    def resolved(self) -> ModelConfig:
        """Return the same model with every derived size written out, as it is saved."""
        return dataclasses.replace(
            self, head_dim=self.head_size, intermediate_size=self.mlp_size, moe_intermediate_size=self.expert_size
        )


_MINIMIND3 = ModelConfig(
    hidden_size=768,
    num_key_value_heads=4,
    intermediate_size=2432,
    rms_norm_eps=1e-6,
    use_qk_norm=True,
    num_experts_per_tok=1,
    n_shared_experts=0,
    router_aux_loss_coef=5e-4,
    router_aux_loss_scope="batch",
)

PRESETS: dict[str, ModelConfig] = {
    "minillm": ModelConfig(),
    "minimind3": _MINIMIND3,
    "minimind3_moe": dataclasses.replace(_MINIMIND3, use_moe=True),
    "tiny": ModelConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
}
"""Named model shapes for `--preset`: MiniLLM's, MiniMind-3's, and one for tests."""


@dataclass(frozen=True)
class ComputeConfig:
    """How the model is computed. None of these fields changes what it computes, up to rounding."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Activations; auto is float32 on CPU and bfloat16 on accelerators. Parameters stay float32 while training."""
    attention_impl: Literal["auto", "xla", "cudnn", "splash", "tokamax"] = "auto"
    """Attention implementation: cudnn and tokamax (where installed) are for GPU, splash is for TPU; auto picks by
    device, dtype and shape."""
    remat: Literal["auto", "none", "dots", "full"] = "auto"
    """What the backward pass recomputes: nothing, all but matrix products and attention, or whole layers; auto is
    dots on CPU and none elsewhere."""
    unroll: int = 1
    """Layers per iteration of the layer scan; more is faster to run and slower to compile."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for matrices with adamw for everything else."""
    learning_rate: float = 5e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Shape after warm-up: cosine, warm-up-stable-decay, or constant."""
    warmup_ratio: float = 0.03
    """Share of all steps over which the rate rises linearly from zero."""
    decay_ratio: float = 0.2
    """Share of all steps over which wsd falls at the end."""
    min_lr_ratio: float = 0.1
    """Final rate over peak rate."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms, biases and embeddings are not decayed."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""All attention and MLP matrices, those of experts included."""


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter (LoRA, arXiv:2106.09685), trained in place of the model's own weights."""

    lora_rank: int = 0
    """Rank r of the adapter's factors; 0 trains all parameters instead."""
    lora_alpha: float = 16.0
    """The adapter's product is multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Probability of dropping an element of an adapter's input while training."""
    lora_targets: tuple[str, ...] = LORA_TARGETS
    """Projections to adapt, by the end of their path: q_proj, experts.gate_proj, shared.down_proj, router."""
    use_rslora: bool = False
    """Divide lora_alpha by the square root of the rank instead (rsLoRA, arXiv:2312.03732)."""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        if self.lora_rank < 0:
            raise ConfigError(f"lora_rank must be positive, or 0 for no adapter, not {self.lora_rank}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(f"lora_dropout must lie in [0, 1), not {self.lora_dropout}")
        if self.lora_alpha <= 0:
            raise ConfigError(f"lora_alpha must be positive, not {self.lora_alpha}")
        if not self.lora_targets:
            raise ConfigError("lora_targets names no projection; leave the flag out for all of them")

    @property
    def lora_scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.lora_rank) if self.use_rslora else self.lora_rank)


@dataclass(frozen=True)
class DataConfig:
    """Where rows come from and how they become batches."""

    data_path: tuple[str, ...]
    """JSONL files or folders of them, each with an optional weight: a.jsonl:0.7 b.jsonl:0.3."""
    valid_path: tuple[str, ...] = ()
    """Held-out files; without them `valid_fraction` of the documents is set aside."""
    valid_fraction: float = 0.01
    """Share of documents set aside for validation when there is no valid_path; 0 for none."""
    max_seq_len: int = 512
    """Tokens T per row."""
    batch_size: int = 32
    """Rows per optimizer step and micro-batch, over all devices."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at a bad row before training starts, or count and report it."""
    num_proc: int = 1
    """Processes that tokenise."""
    cache_dir: str | None = None
    """Where tokenised files are kept; None is ~/.cache/minillm_jax."""


@dataclass(frozen=True)
class RunConfig:
    """What every training stage shares: where it starts, how long it runs, what it keeps."""

    out_dir: str
    """Run folder; starting again with the same one resumes it."""
    preset: str = "minillm"
    """Model shape to start from when there is no model_path: minillm, minimind3, minimind3_moe or tiny."""
    model_path: str | None = None
    """Run, checkpoint or Hugging Face folder to start from; None starts from random weights."""
    tokenizer_path: str | None = None
    """Tokenizer folder; None takes the one beside model_path."""
    epochs: float = 1.0
    """Passes over the data."""
    steps: int | None = None
    """Optimizer steps, in place of epochs."""
    accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    save_interval: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints kept beside the best one."""
    log_interval: int = 10
    """Steps between logged metrics."""
    eval_interval: int = 200
    """Steps between validation losses, which saving measures as well; 0 for never."""
    sample_interval: int = 0
    """Steps between sample generations; 0 for never."""
    sample_prompts: tuple[str, ...] = ("Once upon a time", "Hello!")
    """Prompts of the sample generations."""
    seed: int = 42
    """Seed of initial weights, data order and dropout."""
    mesh: str = "data=-1"
    """Device mesh as axis=size pairs over data, fsdp, tensor and expert; -1 fills an axis."""
    overwrite: bool = False
    """Delete what out_dir holds and start afresh."""
    max_skipped_steps: int = 10
    """Steps in a row with a non-finite gradient after which training stops."""
    wandb_project: str | None = None
    """Weights & Biases project to log to as well."""


def to_json(config: Any) -> str:
    """Write a (nested) configuration dataclass as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def model_config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """Read a ModelConfig from JSON values.

    Raises:
        ConfigError: a field is unknown, so that a newer or foreign file is never half understood.
    """
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"unknown model field(s) {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    values = dict(values)
    if isinstance(values.get("rope_scaling"), dict):
        values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
    return ModelConfig(**values)


def _default_instance(cls: type[Any]) -> Any:
    """Build `cls` with its defaults, required fields marked missing, so that one nested default can be replaced."""
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        if f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING:
            continue
        values[f.name] = _default_instance(hints[f.name]) if dataclasses.is_dataclass(hints[f.name]) else tyro.MISSING
    return cls(**values)


def _peek(argv: Sequence[str], flag: str) -> str | None:
    """Read one flag's value before the full parse, in either spelling (`--model_path X`, `--model-path=X`)."""
    for i, arg in enumerate(argv):
        name, equals, value = arg.partition("=")
        if name.replace("-", "_") == "__" + flag:
            return value if equals else (argv[i + 1] if i + 1 < len(argv) else None)
    return None


def parse_cli(
    cls: type[C],
    description: str,
    *,
    argv: Sequence[str] | None = None,
    read_model: Callable[[str], ModelConfig] | None = None,
) -> C:
    """Parse the command line of a stage into its configuration dataclass.

    Nested dataclasses are flattened: `--hidden_size 256` and `--hidden-size 256` both set `model.hidden_size`. With
    `--model_path` the checkpoint's shape replaces the preset's, and a shape flag that contradicts it is refused.

    Args:
        cls: the stage's dataclass; a field `model: ModelConfig` makes it a model stage.
        description: shown above `--help`.
        argv: arguments; None takes `sys.argv[1:]`.
        read_model: reads the ModelConfig of a `--model_path`.

    Raises:
        ConfigError: unknown preset, or a shape flag that contradicts the checkpoint.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    default = _default_instance(cls)
    path, preset = _peek(argv, "model_path"), _peek(argv, "preset")
    fixed: ModelConfig | None = None
    if get_type_hints(cls).get("model") is ModelConfig:
        if preset is not None and preset not in PRESETS:
            raise ConfigError(f"--preset {preset}: unknown; choose from {', '.join(PRESETS)}")
        if path is not None and read_model is not None:
            fixed = read_model(path)
        default = dataclasses.replace(default, model=fixed or PRESETS[preset or "minillm"])
    config = tyro.cli(
        cls,
        args=argv,
        default=default,
        description=description,
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    if fixed is not None:
        _refuse_contradictions(fixed, config.model, str(path))
    return config


FREE_MODEL_FIELDS = (
    "dropout",
    "rope_scaling",
    "max_position_embeddings",
    "router_aux_loss_coef",
    "router_aux_loss_scope",
    "router_z_loss_coef",
    "expert_capacity_factor",
)
"""Model fields that may differ from the checkpoint's: they leave its weights as they are."""


def shape_difference(ours: ModelConfig, theirs: ModelConfig) -> tuple[str, Any, Any] | None:
    """Find the first field in which two models differ in their weights: its name, our value and theirs."""
    for f in dataclasses.fields(ModelConfig):
        pair = getattr(ours, f.name), getattr(theirs, f.name)
        if pair[0] != pair[1] and f.name not in FREE_MODEL_FIELDS:
            return f.name, *pair
    return None


def _refuse_contradictions(saved: ModelConfig, asked: ModelConfig, path: str) -> None:
    if difference := shape_difference(asked, saved):
        name, ours, theirs = difference
        raise ConfigError(f"--{name} {ours} contradicts {path}, which was trained with {theirs}; leave the flag out")
