"""Adapters: what they compute, what they cost, what they leave on disk, and PEFT's numbers for the same."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_tokenizers import TOKENIZER
from safetensors.numpy import load_file, save_file

import minillm_jax as mj
from minillm_jax import checkpoint, lora_commands
from minillm_jax.adapter_file import ADAPTER_FILE, AdapterError, AdapterFile, read_adapter_file
from minillm_jax.cache import init_cache
from minillm_jax.checkpoint import CheckpointError
from minillm_jax.config import ComputeConfig, ConfigError, LoraConfig, ModelConfig, OptimConfig, RopeScaling
from minillm_jax.hf_config import HfError
from minillm_jax.lora import adapted_loss, adapter_axes, combine, init_adapter, merge, projections
from minillm_jax.lora_peft import read_peft, write_peft
from minillm_jax.losses import language_model_loss
from minillm_jax.model import forward, forward_hidden, init_params, param_axes, unembed
from minillm_jax.optim import make_optimizer
from minillm_jax.pretrained import load_adapter, load_params, read_model_config
from minillm_jax.run import write_run
from minillm_jax.trainer import init_state
from train.sft import SftConfig
from train.sft_lora import SftLoraConfig

GOLDEN = Path(__file__).parent / "golden"
TINY = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=512,
    initializer_range=0.2,
)
VARIANTS = {
    "dense": TINY,
    "moe": dataclasses.replace(TINY, use_moe=True, num_experts=3, moe_intermediate_size=24),
    "qk_norm_bias_untied": dataclasses.replace(TINY, use_qk_norm=True, attention_bias=True, tie_word_embeddings=False),
}
LORA = LoraConfig(lora_rank=3, lora_alpha=5.0)
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
TOKENS = jax.random.randint(jax.random.key(1), (2, 20), 0, TINY.vocab_size)
draw = jax.jit(init_params, static_argnums=0)
draw_adapter = jax.jit(init_adapter, static_argnums=1)
join = jax.jit(combine, static_argnums=2)
fuse = jax.jit(merge, static_argnums=2)
run = jax.jit(forward_hidden, static_argnames="config")
BATCH = {
    "tokens": TOKENS,
    "targets": jnp.roll(TOKENS, -1, 1),
    "weights": (jnp.arange(20) % 3 > 0) * jnp.ones((2, 1)),
    "segment_ids": jnp.ones_like(TOKENS),
    "positions": jnp.broadcast_to(jnp.arange(20), TOKENS.shape),
}


@partial(jax.jit, static_argnums=1)
def random_adapter(params, config=LORA):
    """One whose product is not zero."""
    fresh = init_adapter(params, config, jax.random.key(2))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), fresh)


@partial(jax.jit, static_argnums=(0, 1))
def loss_and_gradient(config, lora, adapter, params, batch):
    """Of an adapter, before the sum is divided by the weight."""
    loss_fn = adapted_loss(language_model_loss(config, ComputeConfig()), lora)
    frozen = {"base": params, "rest": None}
    return jax.value_and_grad(loss_fn, has_aux=True)(adapter, frozen, batch, None)


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def model(request):
    return request.param, draw(request.param, jax.random.key(0))


@pytest.fixture(scope="module")
def dense():
    return draw(TINY, jax.random.key(0))


# --- What they compute -------------------------------------------------------------------------------------------


def test_a_new_adapter_leaves_every_bit_of_the_logits(model):
    config, params = model
    combined = join(params, draw_adapter(params, LORA, jax.random.key(2)), LORA)
    np.testing.assert_array_equal(forward(combined, config, TOKENS), forward(params, config, TOKENS))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_combined_and_merged_parameters_give_the_same_logits(model, use_rslora):
    config, params = model
    lora = dataclasses.replace(LORA, use_rslora=use_rslora)
    adapter = random_adapter(params)
    merged = fuse(params, adapter, lora)
    logits = forward(merged, config, TOKENS)
    np.testing.assert_allclose(forward(join(params, adapter, lora), config, TOKENS), logits, **TOLERANCE)
    assert np.abs(logits - forward(params, config, TOKENS)).max() > 0.1
    assert jax.tree.structure(merged) == jax.tree.structure(params)


def test_the_scale_is_alpha_over_rank_or_its_root():
    assert LoraConfig(lora_rank=4, lora_alpha=8.0).lora_scale == 2.0
    assert LoraConfig(lora_rank=4, lora_alpha=8.0, use_rslora=True).lora_scale == 4.0


def test_the_gradient_of_the_factors_is_that_of_the_merged_weights(model):
    config, params = model
    loss_fn = language_model_loss(config, ComputeConfig())
    adapter = random_adapter(params)

    @jax.jit
    def merged_gradient(adapter):
        return jax.grad(lambda adapter: loss_fn(merge(params, adapter, LORA), None, BATCH, None)[0])(adapter)

    ours, theirs = loss_and_gradient(config, LORA, adapter, params, BATCH)[1], merged_gradient(adapter)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours, theirs)


def test_each_leaf_of_an_adapter_is_drawn_within_its_bound_and_apart_from_the_others(dense):
    adapter = draw_adapter(dense, LORA, jax.random.key(0))
    factors = [leaf for path, leaf in jax.tree_util.tree_flatten_with_path(adapter)[0] if path[-1].key == "a"]
    assert len(factors) == 7
    for a in factors:
        bound = 1 / np.sqrt(a.shape[-2])
        assert 0.9 * bound < np.abs(a).max() <= bound
    assert len({float(a[0, 0, 0]) * np.sqrt(a.shape[-2]) for a in factors}) == 7


def test_targets_choose_by_the_end_of_a_path(model):
    config, params = model
    names = dict(projections(params))
    chosen = LoraConfig(lora_rank=2, lora_targets=("self_attn.q_proj", "down_proj"))
    adapter = draw_adapter(params, chosen, jax.random.key(0))
    leaves = {".".join(k.key for k in path[1:-1]) for path, _ in jax.tree_util.tree_flatten_with_path(adapter)[0]}
    assert leaves == {"self_attn.q_proj"} | {name for name in names if name.endswith("down_proj")}
    if config.use_moe:
        assert {"mlp.experts.down_proj", "mlp.shared.down_proj"} <= leaves
        assert adapter["layers"]["mlp"]["experts"]["down_proj"]["a"].shape == (2, 3, 24, 2)


def test_unknown_targets_are_named_with_what_there_is(dense):
    with pytest.raises(ConfigError, match=r"query names no projection of this model; it has .*self_attn\.q_proj"):
        init_adapter(dense, LoraConfig(lora_rank=2, lora_targets=("q_proj", "query")), jax.random.key(0))
    with pytest.raises(ConfigError, match="lora_rank is 0"):
        init_adapter(dense, LoraConfig(), jax.random.key(0))


@pytest.mark.parametrize(
    "values", [{"lora_rank": -1}, {"lora_dropout": 1.0}, {"lora_alpha": 0.0}, {"lora_targets": ()}]
)
def test_settings_that_cannot_work_are_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        LoraConfig(**values)


def test_adapter_axes_follow_those_of_the_weights(model):
    config, params = model
    axes = adapter_axes(param_axes(config), params, LORA)
    adapter = draw_adapter(params, LORA, jax.random.key(0))
    ranks = jax.tree.map(jnp.ndim, adapter)
    assert jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple)) == ranks
    assert axes["layers"]["self_attn"]["q_proj"] == {
        "a": ("layers", "embed", None),
        "b": ("layers", None, "heads"),
    }


def test_dropout_is_on_with_a_key_only_and_keeps_the_mean(model):
    config, params = model
    lora = dataclasses.replace(LORA, lora_dropout=0.5)
    adapter = jax.tree.map(lambda x: 0.01 * x, random_adapter(params))  # small, so that the logits are nearly linear
    combined, plain = join(params, adapter, lora), join(params, adapter, LORA)
    np.testing.assert_array_equal(forward(combined, config, TOKENS), forward(plain, config, TOKENS))
    if config.use_moe:
        return  # routing is not linear

    @jax.jit
    def dropped(key):
        return unembed(params, config, forward_hidden(combined, config, TOKENS, dropout_key=key).hidden)

    keys = jax.random.split(jax.random.key(0), 200)
    samples = np.asarray(jax.lax.map(dropped, keys))
    base = np.asarray(forward(params, config, TOKENS))
    effect, wanted = samples.mean(0) - base, np.asarray(forward(plain, config, TOKENS)) - base
    assert np.abs(samples[0] - samples[1]).max() > 0
    assert np.linalg.norm(effect - wanted) < 0.2 * np.linalg.norm(wanted)


def test_cached_decoding_reads_the_adapter(dense):
    combined = join(dense, random_adapter(dense), LORA)
    output = run(combined, TINY, TOKENS[:, :12], cache=init_cache(TINY, 2, 32))
    output = run(combined, TINY, TOKENS[:, 12:], cache=output.cache)
    full = forward(combined, TINY, TOKENS)
    np.testing.assert_allclose(unembed(combined, TINY, output.hidden), full[:, 12:], **TOLERANCE)


def test_leaves_that_are_no_factors_join_as_they_are(dense):
    adapter = random_adapter(dense) | {"score": {"kernel": jnp.ones((32, 1))}}
    for make in (combine, merge):
        assert make(dense, adapter, LORA)["score"]["kernel"].shape == (32, 1)
    assert "score" not in dense


def test_a_bfloat16_base_is_merged_in_float32_and_stays_bfloat16(dense):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), dense)
    adapter = random_adapter(dense)
    merged = fuse(half, adapter, LORA)["layers"]["self_attn"]["q_proj"]["kernel"]
    factors = adapter["layers"]["self_attn"]["q_proj"]
    exact = half["layers"]["self_attn"]["q_proj"]["kernel"].astype(jnp.float32) + LORA.lora_scale * (
        factors["a"] @ factors["b"]
    )
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_allclose(merged.astype(jnp.float32), exact, rtol=2**-8)


# --- What they cost ----------------------------------------------------------------------------------------------


def test_optimizer_state_and_gradient_hold_the_adapter_only(model):
    adapter = draw_adapter(model[1], LORA, jax.random.key(0))
    state = init_state(adapter, make_optimizer(OptimConfig(), 10, adapter), seed=0)
    held = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    moments = [leaf for leaf in jax.tree.leaves(state["opt_state"]) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * held


def test_no_gradient_of_a_weight_is_ever_computed():
    config = dataclasses.replace(TINY, hidden_size=64, intermediate_size=256, num_hidden_layers=3)
    shapes = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    adapter = jax.eval_shape(partial(init_adapter, shapes, LORA), jax.random.key(0))
    loss_fn = language_model_loss(config, ComputeConfig())
    gradient = jax.jit(jax.grad(adapted_loss(loss_fn, LORA), has_aux=True))
    compiled = gradient.lower(adapter, {"base": shapes, "rest": None}, BATCH, None).compile().as_text()
    full = jax.jit(jax.grad(loss_fn, has_aux=True)).lower(shapes, None, BATCH, None).compile().as_text()
    stacked = "f32[3,64,256]"
    made = [line for line in compiled.splitlines() if f" = {stacked}" in line]
    assert all("parameter(" in line or "get-tuple-element(" in line or "copy" in line for line in made), made
    assert any(f" = {stacked}" in line and "dynamic-update-slice" in line for line in full.splitlines())


# --- What they leave on disk -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run `base` and the run `adapter` of an adapter on it."""
    folder = tmp_path_factory.mktemp("runs")
    config = dataclasses.replace(TINY, vocab_size=TOKENIZER.vocab_size, dropout=0.1).resolved()
    params = draw(config, jax.random.key(0))
    write_run(folder / "base", config, params, TOKENIZER, {"stage": "test"})
    lora = dataclasses.replace(LORA, lora_targets=("q_proj", "up_proj"))
    file = AdapterFile.of(lora, folder / "base" / "checkpoints" / "0", folder / "adapter")
    adapter = random_adapter(params, lora)
    write_run(folder / "adapter", config, adapter, TOKENIZER, {"stage": "test"}, files={ADAPTER_FILE: file.to_json()})
    return folder


def logits_of(lm):
    return forward(lm.params, lm.config, TOKENS)


def test_an_adapter_alone_is_loaded_for_a_base_of_its_shape(runs):
    config, params = load_params(runs / "base")
    adapter = load_adapter(runs / "adapter", config)
    assert adapter.config.lora_targets == ("q_proj", "up_proj")
    _, merged = load_params(runs / "adapter")
    expected, got = (
        forward(merged, config, TOKENS),
        forward(merge(params, adapter.params, adapter.config), config, TOKENS),
    )
    np.testing.assert_allclose(got, expected, **TOLERANCE)
    with pytest.raises(AdapterError, match=r"no adapter's run"):
        load_adapter(runs / "base", config)
    with pytest.raises(AdapterError, match=r"num_hidden_layers 2; the base has 3"):
        load_adapter(runs / "adapter", dataclasses.replace(config, num_hidden_layers=3))


def test_an_adapters_checkpoint_holds_its_arrays_and_what_they_belong_to(runs):
    metadata = json.loads((runs / "adapter/checkpoints/0/metadata.json").read_text())
    arrays = set(metadata["arrays"]) - {"step"}
    assert len(arrays) == 4
    assert all(name.endswith((".a", ".b")) for name in arrays)
    file = read_adapter_file(runs / "adapter")
    assert (file.lora.lora_rank, file.lora.lora_targets) == (3, ("q_proj", "up_proj"))
    assert file.base == str(runs / "base/checkpoints/0")
    assert read_adapter_file(runs / "base") is None


@pytest.mark.parametrize("path", ["adapter", "adapter/checkpoints", "adapter/checkpoints/0"])
def test_loading_an_adapters_run_gives_its_base_with_the_adapter_merged(runs, path):
    base, adapter = mj.load(runs / "base"), checkpoint.load_params(runs / "adapter")[1]
    lm = mj.load(runs / path)
    expected = forward(join(base.params, adapter, read_adapter_file(runs / path).lora), base.config, TOKENS)
    np.testing.assert_allclose(logits_of(lm), expected, **TOLERANCE)
    assert lm.config == base.config == read_model_config(runs / path)
    assert lm.tokenizer.encode("hello") == base.tokenizer.encode("hello")


def test_runs_that_move_together_or_alone_find_each_other(runs, tmp_path):
    expected = logits_of(mj.load(runs / "adapter"))
    shutil.copytree(runs / "adapter", tmp_path / "alone" / "adapter")
    np.testing.assert_array_equal(logits_of(mj.load(tmp_path / "alone" / "adapter")), expected)
    shutil.copytree(runs, tmp_path / "together")
    assert AdapterFile.find_base(read_adapter_file(runs / "adapter"), tmp_path / "together" / "adapter").is_relative_to(
        tmp_path
    )


def test_a_missing_base_is_reported_with_what_to_pass(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "runs")
    text = (runs / "adapter/adapter.json").read_text()
    lost = dataclasses.replace(AdapterFile.from_json(text), base="/nowhere/base", base_from_run="../lost")
    config, adapter = checkpoint.load_params(runs / "adapter")
    write_run(tmp_path / "orphan", config, adapter, TOKENIZER, {"stage": "test"}, files={ADAPTER_FILE: lost.to_json()})
    with pytest.raises(AdapterError, match=r"its base /nowhere/base is gone.*minillm_jax\.load\(BASE, adapter="):
        mj.load(tmp_path / "orphan")
    lm = mj.load(runs / "base", adapter=tmp_path / "orphan")
    np.testing.assert_array_equal(logits_of(lm), logits_of(mj.load(runs / "adapter")))


def test_another_shape_cannot_be_the_base(runs, tmp_path):
    lm = mj.load(runs / "base")
    config = dataclasses.replace(lm.config, num_hidden_layers=3)
    write_run(tmp_path / "other", config, draw(config, jax.random.key(0)), lm.tokenizer, {})
    with pytest.raises(AdapterError, match=r"adapts a model with num_hidden_layers 2; .* has 3"):
        mj.load(tmp_path / "other", adapter=runs / "adapter")
    with pytest.raises(AdapterError, match="is no adapter's run"):
        mj.load(runs / "base", adapter=runs / "base")


def test_settings_of_training_may_differ_between_adapter_and_base(runs, tmp_path):
    lm = mj.load(runs / "base")
    config = dataclasses.replace(lm.config, dropout=0.0, rope_scaling=RopeScaling("linear", 2.0))
    write_run(tmp_path / "other", config, lm.params, lm.tokenizer, {})
    assert mj.load(tmp_path / "other", adapter=runs / "adapter").config == lm.config


def test_adapters_may_stand_on_adapters(runs, tmp_path):
    lm = mj.load(runs / "adapter")
    adapter = random_adapter(lm.params)
    file = AdapterFile.of(LORA, runs / "adapter", tmp_path / "second")
    write_run(tmp_path / "second", lm.config, adapter, lm.tokenizer, {}, files={ADAPTER_FILE: file.to_json()})
    expected = forward(join(lm.params, adapter, LORA), lm.config, TOKENS)
    np.testing.assert_allclose(logits_of(mj.load(tmp_path / "second")), expected, **TOLERANCE)


def test_parameters_are_cast_while_loading(runs):
    lm = mj.load(runs / "adapter", dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(lm.params)} == {jnp.dtype(jnp.bfloat16)}


def test_the_command_merges_into_a_plain_run(runs, tmp_path):
    lora_commands.merge_command(str(runs / "adapter"), str(tmp_path / "merged"))
    assert read_adapter_file(tmp_path / "merged") is None
    merged, adapted = mj.load(tmp_path / "merged"), mj.load(runs / "adapter")
    jax.tree.map(np.testing.assert_array_equal, merged.params, adapted.params)
    with pytest.raises(ConfigError, match="is not empty"):
        lora_commands.merge_command(str(runs / "adapter"), str(tmp_path / "merged"))
    with pytest.raises(AdapterError, match="is no adapter's run"):
        lora_commands.merge_command(str(runs / "base"), str(tmp_path / "again"))


def test_a_path_without_a_checkpoint_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load_params(tmp_path)


# --- PEFT --------------------------------------------------------------------------------------------------------


def test_an_export_imported_again_is_the_same_adapter(runs, tmp_path):
    lora_commands.export_command(str(runs / "adapter"), str(tmp_path / "peft"), base_name="someone/base")
    tensors = load_file(tmp_path / "peft/adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"].shape == (3, 32)
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].shape == (32, 3)
    values = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == "someone/base"
    assert (values["r"], values["lora_alpha"], values["target_modules"]) == (3, 5, ["q_proj", "up_proj"])
    lora_commands.import_command(str(tmp_path / "peft"), str(runs / "base"), str(tmp_path / "again"))
    ours, theirs = (checkpoint.load_params(path)[1] for path in (runs / "adapter", tmp_path / "again"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    np.testing.assert_array_equal(logits_of(mj.load(tmp_path / "again")), logits_of(mj.load(runs / "adapter")))


def test_a_peft_folder_as_a_model_path_is_pointed_to_the_import():
    with pytest.raises(HfError, match=r"is an adapter of PEFT; .* minillm_jax\.lora import"):
        mj.load(GOLDEN / "lora_all" / "adapter")


def test_adapters_of_experts_are_not_exported(tmp_path):
    config = dataclasses.replace(VARIANTS["moe"], use_qk_norm=True, n_shared_experts=0)
    params = draw(config, jax.random.key(0))
    with pytest.raises(HfError, match=r"mlp\.experts\.down_proj is adapted, and PEFT has no counterpart"):
        write_peft(tmp_path, random_adapter(params), config, LORA, "base")
    attention = dataclasses.replace(LORA, lora_targets=("q_proj", "o_proj"))
    write_peft(tmp_path, random_adapter(params, attention), config, attention, "base")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "type LOHA; only LORA"),
        ({"use_dora": True}, "use_dora = True .* is not implemented"),
        ({"bias": "all"}, "bias = all"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "pissa changes the base"),
        ({"r": 4}, r"down_proj\.lora_A\.weight has shape \[3, 26\], not \[4, 26\]"),
    ],
)
def test_what_an_import_cannot_honour_is_an_error_that_names_it(tmp_path, changes, message):
    shutil.copytree(GOLDEN / "lora_all" / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(HfError, match=message):
        read_peft(tmp_path / "adapter", read_model_config(GOLDEN / "lora_all" / "base"))


@pytest.mark.parametrize(("drop", "add", "message"), [(True, False, "is missing"), (False, True, "has no place")])
def test_tensors_that_are_missing_or_left_over_are_named(tmp_path, drop, add, message):
    shutil.copytree(GOLDEN / "lora_all" / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    tensor = tensors.pop(name) if drop else tensors[name]
    save_file(tensors | ({name.replace("v_proj", "x_proj"): tensor} if add else {}), file)
    with pytest.raises(HfError, match=f"{'v' if drop else 'x'}_proj.lora_B.weight {message}"):
        read_peft(tmp_path / "adapter", read_model_config(GOLDEN / "lora_all" / "base"))


@pytest.mark.parametrize("case", ["lora_all", "lora_rslora"])
def test_logits_loss_and_gradient_are_pefts(case, tmp_path):
    expected = load_file(GOLDEN / case / "expected.safetensors")
    config, params = load_params(GOLDEN / case / "base")
    lora, adapter = read_peft(GOLDEN / case / "adapter", config)
    tokens = expected["tokens"]
    close = partial(np.testing.assert_allclose, rtol=1e-5)
    largest = lambda array: {"atol": 1e-5 * np.abs(array).max()}
    logits = forward(join(params, adapter, lora), config, tokens)
    close(logits, expected["logits"], **largest(expected["logits"]))
    batch = {name: expected[name] for name in ("tokens", "targets", "weights")}
    batch |= {
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape),
    }
    (total, (weight, _)), gradient = loss_and_gradient(config, lora, adapter, params, batch)
    close(total / weight, expected["loss"])
    write_peft(tmp_path, jax.tree.map(lambda g: g / weight, gradient), config, lora, "")
    ours = load_file(tmp_path / "adapter_model.safetensors")
    theirs = {k.removeprefix("gradient."): v for k, v in expected.items() if k.startswith("gradient.")}
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        close(ours[name], array, **largest(array))


# --- Settings of the stage ---------------------------------------------------------------------------------------


def test_the_stage_differs_from_full_fine_tuning_in_defaults_only():
    fields = {f.name: f.default for f in dataclasses.fields(SftLoraConfig)}
    assert fields.keys() == {f.name for f in dataclasses.fields(SftConfig)}
    assert fields["lora"].lora_rank == 8
    assert fields["optim"].learning_rate > dataclasses.fields(SftConfig)[3].default.learning_rate
