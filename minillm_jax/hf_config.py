"""`config.json` of a Hugging Face folder to a `ModelConfig`, and back.

One table says which architectures are known, what `transformers` assumes where a field is absent, and which fields
must have their plain value because nothing here implements another. Whatever is left over is an error that names it:
a model that would come out slightly different never loads. This file never imports jax.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minillm_jax.config import ConfigError, ModelConfig, RopeScaling

CAUSAL_LM, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"


class HfError(ConfigError):
    """A Hugging Face folder that cannot be read or written; the message names the field, tensor or file."""


@dataclass(frozen=True)
class Architecture:
    """What sets one family of models apart.

    Attributes:
        model_type: its name in `config.json`.
        prefix: its class names without `ForCausalLM`.
        defaults: values of absent fields, as `transformers` has them.
        plain: fields of this family that must have one value, where other values change the model.
        use_qk_norm: see `ModelConfig`; likewise attention_bias and use_moe.
        rope_theta: base of the rotary frequencies where none is given.
    """

    model_type: str
    prefix: str
    defaults: Mapping[str, Any]
    plain: Mapping[str, Any] = field(default_factory=dict)
    use_qk_norm: bool = False
    attention_bias: bool = False
    use_moe: bool = False
    rope_theta: float = 1e4


_NO_WINDOW = {"use_sliding_window": False}
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
ARCHITECTURES = {
    family.model_type: family
    for family in (
        Architecture("llama", "Llama", {"max_position_embeddings": 2048}, {"mlp_bias": False, "pretraining_tp": 1}),
        Architecture("mistral", "Mistral", {"num_key_value_heads": 8, "max_position_embeddings": 131072}),
        Architecture("qwen2", "Qwen2", _QWEN, _NO_WINDOW, attention_bias=True),
        Architecture("qwen3", "Qwen3", _QWEN | {"head_dim": 128}, _NO_WINDOW, use_qk_norm=True),
        Architecture(
            "qwen3_moe",
            "Qwen3Moe",
            _QWEN
            | {"num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
            | {"norm_topk_prob": False, "router_aux_loss_coef": 0.001},
            _NO_WINDOW | {"decoder_sparse_step": 1, "mlp_only_layers": []},
            use_qk_norm=True,
            use_moe=True,
        ),
        Architecture(
            "mixtral",
            "Mixtral",
            {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
            | {"num_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001},
            {"router_jitter_noise": 0.0},
            use_moe=True,
            rope_theta=1e6,
        ),
    )
}
_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_DENSE_FIELDS = (*_REQUIRED, *_DEFAULTS, "max_position_embeddings")
_EXPERT_FIELDS = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")
_PLAIN: dict[str, Any] = {"attention_dropout": 0.0, "partial_rotary_factor": 1.0}
"""Fields of every family with the only value that is implemented."""
_WITHOUT_EFFECT = {
    "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "use_cache",
    "output_router_logits", "max_window_layers", "bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id",
    "num_labels", "problem_type", "hidden_act", "sliding_window", "layer_types", "rope_scaling", "rope_parameters",
    "rope_theta", "original_max_position_embeddings",
}  # fmt: skip
"""Fields that describe rather than change the model, or that have rules of their own below."""
_ROPE_FIELDS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale",
        "mscale_all_dim", "truncate",
    },
}  # fmt: skip


def is_classifier(values: Mapping[str, Any]) -> bool:
    """Whether a `config.json` describes a sequence classifier, which here is a reward model."""
    return any(name.endswith(CLASSIFIER) for name in values.get("architectures") or ())


def model_config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """Read a `config.json`.

    Raises:
        HfError: an unknown architecture, a missing field, or a field whose value is not implemented; all are named.
    """
    family = ARCHITECTURES.get(str(values.get("model_type")))
    names = values.get("architectures") or []
    known = f"known are {', '.join(ARCHITECTURES)}"
    if family is None:
        raise HfError(f"config.json: model_type {values.get('model_type')!r} is not implemented; {known}")
    if strange := [name for name in names if name not in (family.prefix + CAUSAL_LM, family.prefix + CLASSIFIER)]:
        raise HfError(f"config.json: architectures: {strange[0]} is not implemented for {family.model_type}; {known}")
    if is_classifier(values) and _num_labels(values) != 1:
        raise HfError(f"config.json: {_num_labels(values)} labels; only one, that of a reward model, is implemented")
    _refuse_what_is_not_plain(values, family)
    assumed = {**_DEFAULTS, **family.defaults}
    fields: dict[str, Any] = {name: _value(values, name, assumed) for name in _DENSE_FIELDS}
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if family.use_moe:
        fields |= _expert_fields(values, assumed)
    fields["rope_theta"], fields["rope_scaling"] = _read_rope(values, family)
    fields["max_position_embeddings"] = _extended(fields["max_position_embeddings"], fields["rope_scaling"])
    try:
        return ModelConfig(
            **fields, use_qk_norm=family.use_qk_norm, attention_bias=family.attention_bias, use_moe=family.use_moe
        ).resolved()
    except ConfigError as error:
        raise HfError(f"config.json: {error}") from error


def _num_labels(values: Mapping[str, Any]) -> int:
    labels = values.get("id2label")
    return len(labels) if labels else values.get("num_labels", 2)


def _value(values: Mapping[str, Any], name: str, assumed: Mapping[str, Any]) -> Any:
    value = values.get(name)
    if value is None and name not in assumed:
        raise HfError(f"config.json: {name} is missing")
    return assumed[name] if value is None else value


def _expert_fields(values: Mapping[str, Any], assumed: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(values)
    values.setdefault("num_experts", values.get("num_local_experts"))  # the name depends on family and version
    fields = {name: _value(values, name, assumed) for name in _EXPERT_FIELDS}
    mixtral = "moe_intermediate_size" not in assumed
    fields["moe_intermediate_size"] = _value(
        values, "intermediate_size" if mixtral else "moe_intermediate_size", assumed
    )
    fields["norm_topk_prob"] = mixtral or _value(values, "norm_topk_prob", assumed)
    return fields | {"n_shared_experts": 0, "router_aux_loss_scope": "model"}


def _refuse_what_is_not_plain(values: Mapping[str, Any], family: Architecture) -> None:
    plain = {**_PLAIN, **family.plain, "attention_bias": family.attention_bias}
    understood = {*_DENSE_FIELDS, *plain, *_WITHOUT_EFFECT}
    if family.use_moe:
        understood |= {*_EXPERT_FIELDS, "num_local_experts", "moe_intermediate_size", "norm_topk_prob"}
    for name, value in values.items():
        if name in plain and value not in (None, plain[name]):
            raise HfError(f"config.json: {name} {value!r} is not implemented, only {plain[name]!r} is")
        if name not in understood and value not in (None, False, "", 0) and value not in ([], {}):
            raise HfError(
                f"config.json: {name} {value!r} is not known for {family.model_type}; if it does not change the "
                "model's output, take it out of config.json"
            )
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise HfError(f"config.json: hidden_act {values['hidden_act']!r} is not implemented, only 'silu' is")
    window = values.get("sliding_window", 4096 if family.model_type == "mistral" else None)  # transformers' default
    if window is not None and "use_sliding_window" not in family.plain:
        raise HfError(f"config.json: sliding_window {window} is not implemented, only null is")
    if others := {kind for kind in values.get("layer_types") or () if kind != "full_attention"}:
        raise HfError(f"config.json: layer_types: {min(others)} is not implemented, only full_attention is")


def _read_rope(values: Mapping[str, Any], family: Architecture) -> tuple[float, RopeScaling | None]:
    """Read both spellings: `rope_scaling` beside `rope_theta`, and `rope_parameters` that holds both."""
    where = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = dict(values.get(where) or {})
    if set(rope) == {"full_attention"}:  # written for each type of layer
        rope = dict(rope["full_attention"])
    theta = float(rope.pop("rope_theta", None) or values.get("rope_theta") or family.rope_theta)
    old_name = rope.pop("type", None)
    kind: Any = rope.pop("rope_type", None) or old_name or "default"
    if kind not in _ROPE_FIELDS:
        known = ", ".join(_ROPE_FIELDS)
        raise HfError(f"config.json: {where}: rope_type {kind!r} is not implemented; known are {known}")
    rope = {name: value for name, value in rope.items() if value is not None}
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise HfError(f"config.json: {where}: partial_rotary_factor is not implemented, only 1.0 is")
    if unknown := sorted(set(rope) - _ROPE_FIELDS[kind]):
        raise HfError(f"config.json: {where}: {unknown[0]} is not known for rope_type {kind!r}")
    if not rope.pop("truncate", True):
        raise HfError(f"config.json: {where}: truncate false is not implemented, only true is")
    if kind == "default":
        return theta, None
    positions = _value(values, "max_position_embeddings", family.defaults)
    if kind == "linear":
        rope["original_max_position_embeddings"] = positions
    else:
        outside = values.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = outside or rope.get("original_max_position_embeddings", positions)
    if kind == "yarn":
        rope.setdefault("factor", positions / rope["original_max_position_embeddings"])
        rope = _fold_mscale(rope)
    elif missing := sorted(_ROPE_FIELDS[kind] - set(rope)):
        raise HfError(f"config.json: {where}: {missing[0]} is missing for rope_type {kind!r}")
    return theta, RopeScaling(kind, **rope)


def _fold_mscale(rope: dict[str, Any]) -> dict[str, Any]:
    """Turn DeepSeek's `mscale` pair into the attention factor that it stands for."""
    mscale, mscale_all_dim = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
    if rope.get("attention_factor") is None and mscale and mscale_all_dim and rope["factor"] > 1:
        log = 0.1 * math.log(rope["factor"])
        rope["attention_factor"] = (mscale * log + 1) / (mscale_all_dim * log + 1)
    return {name: value for name, value in rope.items() if name not in ("beta_fast", "beta_slow") or value}


def _extended(positions: int, scaling: RopeScaling | None) -> int:
    """Longest context with scaling: `linear` files state it before scaling, others before or after."""
    if scaling is None or scaling.rope_type == "llama3":
        return positions
    return max(positions, round(scaling.original_max_position_embeddings * scaling.factor))


def architecture_of(config: ModelConfig) -> Architecture:
    """Choose the family that a model is exported as.

    Raises:
        HfError: none computes the same; the message says what stands in the way.
    """

    def refuse(what: str) -> HfError:
        return HfError(f"this model has no counterpart in transformers: {what}")

    if config.use_moe:
        if config.n_shared_experts:
            raise refuse(f"n_shared_experts is {config.n_shared_experts}, and Qwen3-MoE and Mixtral have none")
        if config.scoring_func != "softmax":
            raise refuse(f"scoring_func is {config.scoring_func}, and Qwen3-MoE and Mixtral use softmax")
        if config.attention_bias:
            raise refuse("attention_bias with use_moe: Mixtral has none, Qwen3-MoE has one on o_proj too")
        if not config.use_qk_norm and not config.norm_topk_prob:
            raise refuse("norm_topk_prob is off without use_qk_norm, and Mixtral always normalises")
        return ARCHITECTURES["qwen3_moe" if config.use_qk_norm else "mixtral"]
    if config.use_qk_norm and config.attention_bias:
        raise refuse("use_qk_norm with attention_bias: Qwen3 puts a bias on o_proj too")
    if config.use_qk_norm or config.attention_bias:
        return ARCHITECTURES["qwen3" if config.use_qk_norm else "qwen2"]
    # LlamaConfig insists on whole heads; Mistral without its window computes the same and does not.
    return ARCHITECTURES["mistral" if config.hidden_size % config.num_attention_heads else "llama"]


def model_config_to_hf(config: ModelConfig, *, dtype: str, classifier: bool = False) -> dict[str, Any]:
    """Write a `config.json` that every release of `transformers` since Qwen3 reads, in the older rope spelling.

    Args:
        config: the model.
        dtype: name of the dtype that tensors are written in.
        classifier: whether it is a reward model.

    Raises:
        HfError: see `architecture_of`.
    """
    family, config = architecture_of(config), config.resolved()
    values: dict[str, Any] = {
        "architectures": [family.prefix + (CLASSIFIER if classifier else CAUSAL_LM)],
        "model_type": family.model_type,
        "torch_dtype": dtype,
        "hidden_act": "silu",
        **({} if family.attention_bias else {"attention_bias": False}),
        **family.plain,
        **{name: getattr(config, name) for name in _DENSE_FIELDS},
    }
    if family.use_moe:
        values |= {name: getattr(config, name) for name in _EXPERT_FIELDS} | {"output_router_logits": False}
    if family.model_type == "qwen3_moe":
        values |= {"moe_intermediate_size": config.expert_size, "norm_topk_prob": config.norm_topk_prob}
    if family.model_type == "mixtral":
        values |= {"intermediate_size": config.expert_size, "num_local_experts": values.pop("num_experts")}
    values |= {"sliding_window": None, "use_cache": True} | _write_rope(config)
    if classifier:
        values |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    return values


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    fields = _ROPE_FIELDS[scaling.rope_type] & {f.name for f in dataclasses.fields(scaling)}
    rope = {"rope_type": scaling.rope_type} | {name: getattr(scaling, name) for name in sorted(fields)}
    rope = {name: value for name, value in rope.items() if value is not None}
    positions: int = config.max_position_embeddings
    if scaling.rope_type == "linear":  # whose convention is the context before scaling
        positions = math.ceil(positions / scaling.factor)
    return {"rope_theta": config.rope_theta, "rope_scaling": rope, "max_position_embeddings": positions}
