"""Folders of Hugging Face: what is read, what is written, and what is refused, always by name."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from example_tokenizers import TOKENIZER
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import minillm_jax as mj
from minillm_jax import hf
from minillm_jax.checkpoint import CheckpointError
from minillm_jax.config import ModelConfig, RopeScaling
from minillm_jax.hf_config import HfError, architecture_of, model_config_from_hf, model_config_to_hf
from minillm_jax.hf_tensors import param_shapes, to_hf
from minillm_jax.lm import LanguageModel
from minillm_jax.model import forward, init_params
from minillm_jax.pretrained import read_model_config
from minillm_jax.reward import reward_scores
from minillm_jax.tokenizer import MissingTokenizer, TokenizerError

DENSE = ModelConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    intermediate_size=20,
    max_position_embeddings=64,
    initializer_range=0.3,
    tie_word_embeddings=False,
)
MOE = dataclasses.replace(
    DENSE, use_moe=True, num_experts=3, n_shared_experts=0, moe_intermediate_size=12, router_aux_loss_scope="model"
)
KINDS = {
    "LlamaForCausalLM": DENSE,
    "MistralForCausalLM": dataclasses.replace(DENSE, num_attention_heads=5, head_dim=6),
    "Qwen2ForCausalLM": dataclasses.replace(DENSE, attention_bias=True, tie_word_embeddings=True),
    "Qwen3ForCausalLM": dataclasses.replace(DENSE, use_qk_norm=True, head_dim=10),
    "Qwen3MoeForCausalLM": dataclasses.replace(MOE, use_qk_norm=True, norm_topk_prob=False),
    "MixtralForCausalLM": dataclasses.replace(MOE, intermediate_size=MOE.expert_size),
}
ROPES = {
    "linear": RopeScaling("linear", 4.0, original_max_position_embeddings=16),
    "llama3": RopeScaling("llama3", 8.0, 32, low_freq_factor=1.5, high_freq_factor=3.0),
    "yarn": RopeScaling("yarn", 4.0, 16, beta_fast=24.0, beta_slow=2.0, attention_factor=1.25),
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 31, "hidden_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20, "max_position_embeddings": 128,
}  # fmt: skip
draw = jax.jit(init_params, static_argnums=0)


def model(config, seed=0):
    """A model whose biases and norms are not the zeros and ones that they start from."""
    params = draw(config, jax.random.key(seed))
    keys = iter(jax.random.split(jax.random.key(seed + 1), 100))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)
    return LanguageModel(config.resolved(), params, TOKENIZER)


def reward_model(config):
    lm = model(config)
    params = {name: leaf for name, leaf in lm.params.items() if name != "lm_head"}
    params["score"] = {"kernel": jax.random.normal(jax.random.key(5), (config.hidden_size, 1))}
    return dataclasses.replace(lm, params=params)


def tokens(config, length=12):
    return np.random.default_rng(3).integers(0, config.vocab_size, (2, length), np.int32)


def assert_same_tree(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def edit_json(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# --- There and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_an_export_names_its_architecture_and_comes_back_as_it_was(tmp_path, name):
    lm = model(KINDS[name])
    mj.export_hf(lm, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [name]
    back = mj.load(tmp_path / "out")
    assert back.config == lm.config
    assert back.tokenizer == lm.tokenizer
    assert_same_tree(back.params, lm.params)


@pytest.mark.parametrize("scaling", ROPES.values(), ids=ROPES)
def test_rotary_scaling_comes_back_as_it_was(scaling):
    config = dataclasses.replace(DENSE, rope_theta=1234.5, rope_scaling=scaling).resolved()
    back = model_config_from_hf(model_config_to_hf(config, dtype="float32"))
    assert back == config


@settings(max_examples=15)
@given(st.data())
def test_every_exportable_shape_survives_config_and_tensors(data):
    size = st.integers(1, 3)
    kv_heads = data.draw(size)
    kind = data.draw(st.sampled_from(["dense", "bias", "qk_norm", "moe", "moe_qk_norm"]))
    config = ModelConfig(
        vocab_size=data.draw(st.integers(3, 40)),
        hidden_size=data.draw(st.integers(2, 20)),
        num_hidden_layers=data.draw(size),
        num_attention_heads=kv_heads * data.draw(size),
        num_key_value_heads=kv_heads,
        head_dim=2 * data.draw(size),
        intermediate_size=data.draw(st.integers(1, 20)),
        tie_word_embeddings=data.draw(st.booleans()),
        attention_bias=kind == "bias",
        use_qk_norm="qk_norm" in kind,
        use_moe="moe" in kind,
        n_shared_experts=0,
        num_experts_per_tok=1,
        num_experts=data.draw(size),
        rope_theta=data.draw(st.floats(10, 1e7)),
    ).resolved()
    values = json.loads(json.dumps(model_config_to_hf(config, dtype="float32")))
    back = model_config_from_hf(values)
    same = {f.name for f in dataclasses.fields(config)} - {"router_aux_loss_scope", "n_shared_experts"}
    same -= set() if config.use_moe else {"num_experts", "num_experts_per_tok", "moe_intermediate_size"}
    same -= {"intermediate_size"} if architecture_of(config).model_type == "mixtral" else set()
    same -= set() if config.use_moe else {"router_aux_loss_coef"}
    assert {name: getattr(back, name) for name in same} == {name: getattr(config, name) for name in same}
    shapes = jax.tree.map(lambda x: x.shape, param_shapes(config))
    assert shapes == jax.tree.map(lambda x: x.shape, param_shapes(back))


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("scaling", ROPES.values(), ids=ROPES)
def test_both_spellings_of_rotary_scaling_mean_the_same(scaling, spelling):
    values = model_config_to_hf(dataclasses.replace(DENSE, rope_theta=5e5, rope_scaling=scaling), dtype="float32")
    expected = model_config_from_hf(values)
    if spelling == "rope_parameters":
        values["rope_parameters"] = values.pop("rope_scaling") | {"rope_theta": values.pop("rope_theta")}
    else:
        values["rope_scaling"]["type"] = values["rope_scaling"].pop("rope_type")  # the oldest spelling
    assert model_config_from_hf(values) == expected


def test_yarn_reads_what_it_can_leave_out():
    rope = {"rope_type": "yarn", "factor": 4.0, "beta_fast": None}
    config = model_config_from_hf(LLAMA | {"rope_scaling": rope})
    assert config.rope_scaling == RopeScaling("yarn", 4.0, original_max_position_embeddings=128)
    assert config.max_position_embeddings == 512
    rope |= {"original_max_position_embeddings": 32, "factor": None, "mscale": 0.7, "mscale_all_dim": 1.0}
    config = model_config_from_hf(LLAMA | {"rope_scaling": rope})
    log = 0.1 * np.log(4)
    assert config.rope_scaling.factor == 4
    assert config.rope_scaling.attention_factor == pytest.approx((0.7 * log + 1) / (log + 1))
    assert config.max_position_embeddings == 128


def test_absent_fields_take_the_defaults_of_their_architecture():
    llama = model_config_from_hf(LLAMA)
    assert (llama.num_key_value_heads, llama.rope_theta, llama.rms_norm_eps) == (4, 1e4, 1e-6)
    assert not llama.tie_word_embeddings
    qwen3 = model_config_from_hf(LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3",
                                          "num_key_value_heads": 2})  # fmt: skip
    assert (qwen3.head_dim, qwen3.use_qk_norm) == (128, True)
    mixtral = model_config_from_hf(LLAMA | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
                                            "num_key_value_heads": 2})  # fmt: skip
    assert (mixtral.num_experts, mixtral.num_experts_per_tok, mixtral.rope_theta) == (8, 2, 1e6)
    assert (mixtral.expert_size, mixtral.norm_topk_prob, mixtral.n_shared_experts) == (20, True, 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_kept_or_cast_while_reading(tmp_path, dtype):
    lm = model(DENSE)
    mj.export_hf(lm, tmp_path / "out", dtype=dtype)
    expected = jax.tree.map(lambda x: x.astype(dtype), lm.params)
    assert_same_tree(mj.load(tmp_path / "out", dtype="stored").params, expected)
    whole = jax.tree.map(lambda x: x.astype(jnp.float32), expected)
    assert_same_tree(mj.load(tmp_path / "out").params, whole)
    assert_same_tree(mj.load(tmp_path / "out", dtype="float32").params, whole)


def test_large_exports_are_split_with_an_index(tmp_path):
    lm = model(MOE)
    mj.export_hf(lm, tmp_path / "out", max_shard_size="20KB")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(files) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params))
    for file in files:
        held = load_file(tmp_path / "out" / file)
        assert {index["weight_map"][name] for name in held} == {file}
        assert len(held) == 1 or sum(array.nbytes for array in held.values()) <= 20_000
    assert_same_tree(mj.load(tmp_path / "out").params, lm.params)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3MoeForCausalLM", "Qwen2ForCausalLM"])
def test_reward_models_become_classifiers_with_one_label(tmp_path, name):
    lm = reward_model(KINDS[name])
    mj.export_hf(lm, tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["architectures"] == [name.replace("CausalLM", "SequenceClassification")]
    assert list(values["id2label"]) == ["0"]
    back = mj.load(tmp_path / "out")
    assert_same_tree(back.params, lm.params)
    ids, segment_ids = tokens(lm.config), np.asarray([[1] * 12, [1] * 7 + [0] * 5])
    scores = reward_scores(back.params, back.config, ids, segment_ids)
    alone = reward_scores(back.params, back.config, ids[1:, :7])
    np.testing.assert_allclose(scores[1], alone[0], rtol=1e-4, atol=1e-5)
    if not back.config.tie_word_embeddings:
        with pytest.raises(ValueError, match="no output head"):
            forward(back.params, back.config, ids)


def test_gradients_take_the_names_of_their_parameters():
    lm = model(KINDS["Qwen3MoeForCausalLM"])
    gradient = jax.tree.map(lambda x: 2 * x, lm.params)
    doubled = dict(to_hf(gradient, lm.config))
    for name, tensor in to_hf(lm.params, lm.config):
        np.testing.assert_array_equal(doubled[name], 2 * tensor)


def test_a_folder_without_a_tokenizer_works_on_token_ids(tmp_path):
    lm = model(DENSE)
    mj.export_hf(lm, tmp_path / "out")
    expected = mj.generate(lm, [[5, 6, 7]], mj.SamplingParams(max_new_tokens=20, temperature=0.0))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "out" / file).unlink()
    bare = mj.load(tmp_path / "out")
    assert isinstance(bare.tokenizer, MissingTokenizer)
    found = mj.generate(bare, [[5, 6, 7]], mj.SamplingParams(max_new_tokens=20, temperature=0.0))
    assert found[0].token_ids == expected[0].token_ids
    with pytest.raises(TokenizerError, match="token ids"):
        mj.generate(bare, ["text"])
    mj.export_hf(bare, tmp_path / "again")
    assert not (tmp_path / "again" / "tokenizer.json").exists()
    assert_same_tree(mj.load(tmp_path / "again").params, lm.params)


def test_every_end_token_of_the_generation_settings_ends_a_completion(tmp_path):
    lm = model(DENSE)
    mj.export_hf(lm, tmp_path / "out")
    free = mj.generate(lm, [[5, 6, 7]], mj.SamplingParams(max_new_tokens=9, temperature=0.0, ignore_eos=True))[0]
    end = free.token_ids[4]
    edit_json(tmp_path / "out" / "generation_config.json", eos_token_id=[lm.tokenizer.eos_token_id, end])
    ended = mj.generate(mj.load(tmp_path / "out"), [[5, 6, 7]], mj.SamplingParams(max_new_tokens=9, temperature=0.0))[0]
    assert ended.token_ids == free.token_ids[: free.token_ids.index(end) + 1]
    assert ended.finish_reason == "stop"


# --- What is refused on the way in -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma' is not implemented; known are llama"),
        ({"architectures": ["LlamaForQuestionAnswering"]}, "architectures: LlamaForQuestionAnswering"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "2 labels; only one"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias True is not implemented"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"sliding_window": 128}, "sliding_window 128"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not known for llama"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "sliding_window 4096"),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True,
          "num_key_value_heads": 2}, "use_sliding_window True"),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2,
          "layer_types": ["full_attention", "sliding_attention"]}, "layer_types: sliding_attention"),
        ({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": [0]},
         r"mlp_only_layers \[0\]"),
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "router_jitter_noise": 0.1},
         "router_jitter_noise 0.1"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4}}, "rope_scaling: rope_type 'longrope'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4}}, "rope_parameters: rope_type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing for rope_type 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "high_freq_factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "beta_fast": 32}}, "beta_fast is not known"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": False}}, "truncate false"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)  # fmt: skip
def test_a_field_that_is_not_implemented_is_named(changes, message):
    with pytest.raises(HfError, match=message):
        model_config_from_hf(LLAMA | changes)


@pytest.fixture
def folder(tmp_path):
    mj.export_hf(model(DENSE), tmp_path / "model")
    return tmp_path / "model"


def drop(name):
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("model.layers.1.mlp.up_proj.weight"), "tensor model.layers.1.mlp.up_proj.weight is missing$"),
        (drop("lm_head.weight"), "tensor lm_head.weight is missing$"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(24, np.float32)}),
         "tensor model.layers.0.self_attn.q_proj.bias has no place"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.zeros((20, 24), np.float32)}),
         "tensor model.layers.2.mlp.up_proj.weight has no place"),
        (lambda t: t.update({"model.norm.weight": np.zeros(25, np.float32)}), r"shape \[25\], not \[24\]"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight": np.zeros((24, 20), np.float32)}),
         r"model.layers.0.mlp.up_proj.weight has shape \[24, 20\], not \[20, 24\]"),
        (lambda t: t.update({"model.norm.weight": np.zeros(24, np.int8)}), "model.norm.weight is I8"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(folder, change, message):
    edit_tensors(folder / "model.safetensors", change)
    with pytest.raises(HfError, match=message):
        mj.load(folder)


def test_tables_of_early_releases_and_equal_tied_heads_are_accepted(tmp_path):
    lm = model(KINDS["Qwen2ForCausalLM"])
    mj.export_hf(lm, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    edit_tensors(weights, lambda t: t.update({
        "lm_head.weight": t["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32),
    }))  # fmt: skip
    assert_same_tree(mj.load(tmp_path / "model").params, lm.params)
    edit_tensors(weights, lambda t: t["lm_head.weight"].__setitem__((3, 4), 9))
    with pytest.raises(HfError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        mj.load(tmp_path / "model")


def test_damaged_and_missing_files_are_named(folder):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(HfError, match=r"model.safetensors: is damaged"):
        mj.load(folder)
    weights.unlink()
    with pytest.raises(HfError, match=r"no \*.safetensors file; weights in another format"):
        mj.load(folder)
    (folder / "model-00001-of-00002.safetensors").write_bytes(content)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HfError, match=r"model-00002-of-00002.safetensors is missing"):
        mj.load(folder)
    index["weight_map"].pop("b")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HfError, match="tensor a is not in model-00001"):
        mj.load(folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(HfError, match="cannot be understood"):
        mj.load(folder)


def test_folders_that_are_no_model_are_refused(folder, tmp_path):
    (folder / "config.json").write_text("not json")
    with pytest.raises(HfError, match=r"config.json: is not JSON"):
        mj.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(HfError, match=r"has weights but no config.json"):
        read_model_config(folder)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        mj.load(tmp_path / "nowhere")


# --- What is refused on the way out ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (dataclasses.replace(MOE, n_shared_experts=1), "n_shared_experts is 1"),
        (dataclasses.replace(MOE, scoring_func="sigmoid"), "scoring_func is sigmoid"),
        (dataclasses.replace(MOE, attention_bias=True), "attention_bias with use_moe"),
        (dataclasses.replace(MOE, norm_topk_prob=False), "norm_topk_prob"),
        (dataclasses.replace(DENSE, use_qk_norm=True, attention_bias=True), "use_qk_norm with attention_bias"),
    ],
)
def test_a_model_without_counterpart_is_refused_with_the_reason(tmp_path, config, reason):
    with pytest.raises(HfError, match=f"no counterpart in transformers: {reason}"):
        mj.export_hf(model(config), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_left_alone(folder, tmp_path):
    lm = model(KINDS["Qwen3ForCausalLM"])
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(HfError, match="is not empty"):
        mj.export_hf(lm, folder)
    assert (folder / "model.safetensors").read_bytes() == before
    mj.export_hf(lm, folder, overwrite=True)
    assert_same_tree(mj.load(folder).params, lm.params)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(HfError, match="holds no earlier export"):
        mj.export_hf(lm, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.txt").exists()


def test_what_reads_back_differently_is_never_published(folder, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()

    def careless(params, config, dtype=None):
        for name, tensor in to_hf(params, config, dtype):
            yield name, tensor * (1.01 if name == "model.norm.weight" else 1.0)

    monkeypatch.setattr(hf, "to_hf", careless)
    with pytest.raises(HfError, match=r"gives other logits when it is read back"):
        mj.export_hf(model(DENSE), folder, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_full_disk_is_noticed_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(hf.shutil, "disk_usage", lambda path: os.terminal_size((1, 1)) and type("U", (), {"free": 10}))
    with pytest.raises(HfError, match="GB are free"):
        mj.export_hf(model(DENSE), tmp_path / "out")
    monkeypatch.undo()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "save_file", full)
    with pytest.raises(HfError, match="No space left on device"):
        mj.export_hf(model(DENSE), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("size", "count"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("300", 300), (42, 42)])
def test_sizes_are_read_with_their_units(size, count):
    assert hf.parse_size(size) == count


@pytest.mark.parametrize("size", ["", "GB", "-3MB", "0", "five"])
def test_sizes_that_are_none_are_refused(size):
    with pytest.raises(HfError, match="write a number of bytes"):
        hf.parse_size(size)


# --- The command line and the mesh -------------------------------------------------------------------------------


def run_hf(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "minillm_jax.hf", *map(str, arguments)], capture_output=True, text=True, timeout=400
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_import_and_export_as_commands(folder, tmp_path):
    imported = run_hf("import", "--from", folder, "--out_dir", tmp_path / "run")
    assert imported.returncode == 0, imported.stderr
    expected = mj.load(folder)
    assert_same_tree(mj.load(tmp_path / "run").params, expected.params)
    assert mj.load(tmp_path / "run").tokenizer == expected.tokenizer
    exported = run_hf("export", "--model-path", tmp_path / "run", "--to", tmp_path / "again", "--dtype", "bfloat16")
    assert exported.returncode == 0, exported.stderr
    assert "LlamaForCausalLM" in exported.stdout
    tensors = load_file(tmp_path / "again" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    for arguments, message in [
        (["import", "--from", folder, "--out_dir", tmp_path / "run"], "is not empty"),
        (["import", "--from", tmp_path / "nowhere", "--out_dir", tmp_path / "x"], "is no Hugging Face folder"),
        (["export", "--model_path", tmp_path / "nowhere", "--to", tmp_path / "x"], "no checkpoint"),
    ]:
        refused = run_hf(*arguments)
        assert refused.returncode == 2
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr


SHARDED = """
import sys, jax, numpy as np, minillm_jax as mj
from minillm_jax.hf_tensors import TensorFiles
whole, shares = TensorFiles.read, []
def read(files, name, index=()):
    array = whole(files, name, index)
    if len(files.shape[name]) == 2 and "router" not in name and "mlp.gate.weight" not in name:
        shares.append(array.size / np.prod(files.shape[name]))
    return array
TensorFiles.read = read
for folder in sys.argv[1:]:
    plain = mj.load(folder)
    for mesh in ("fsdp=8", "data=2,fsdp=2,tensor=2", "tensor=2,expert=2,fsdp=2"):
        shares.clear()
        lm = mj.load(folder, mesh=mesh)
        if mesh == "fsdp=8":  # neither a device nor the host ever held a whole matrix
            assert set(shares) == {1 / 8}, set(shares)
        table = lm.params["embed_tokens"]["embedding"]
        assert max(s.data.size for s in table.addressable_shards) < table.size, mesh
        jax.tree.map(np.testing.assert_array_equal, lm.params, plain.params)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_folders_are_read_onto_a_mesh_part_by_part(tmp_path):
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 384,
             "intermediate_size": 16}  # fmt: skip
    mj.export_hf(model(dataclasses.replace(DENSE, **shape)), tmp_path / "dense")
    moe = dataclasses.replace(MOE, **shape, num_experts=4, moe_intermediate_size=16)
    mj.export_hf(model(moe), tmp_path / "moe")
    env = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    command = [sys.executable, "-c", SHARDED, str(tmp_path / "dense"), str(tmp_path / "moe")]
    result = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=800, cwd=Path(__file__).parent.parent
    )
    assert result.returncode == 0, result.stderr
