"""Adapters against PEFT, live: it loads what is exported here, and gives the same logits, loss and gradients."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import minillm_jax as mj
from minillm_jax.config import ComputeConfig, LoraConfig, ModelConfig
from minillm_jax.lora import adapted_loss, combine, init_adapter
from minillm_jax.lora_peft import read_peft, write_peft
from minillm_jax.losses import language_model_loss
from minillm_jax.model import init_params
from minillm_jax.tokenizer import MissingTokenizer

pytestmark = pytest.mark.conformance

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
MODELS = {
    "llama": TINY,
    "qwen2": dataclasses.replace(TINY, attention_bias=True),
    "qwen3": dataclasses.replace(TINY, use_qk_norm=True, tie_word_embeddings=False),
    "qwen3_moe": dataclasses.replace(TINY, use_moe=True, use_qk_norm=True, n_shared_experts=0, num_experts=3),
}
ATTENTION = LoraConfig(lora_rank=4, lora_alpha=6.5, lora_targets=("q_proj", "v_proj", "o_proj"), use_rslora=True)
ALL = LoraConfig(lora_rank=3)


def error(ours, theirs):
    """Largest difference over the reference's largest value."""
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.fixture(params=MODELS, scope="module")
def case(request, tmp_path_factory):
    """A model and an adapter of ours, and both as PEFT loads them from what is exported."""
    config, lora = MODELS[request.param], ATTENTION if request.param in ("qwen2", "qwen3_moe") else ALL
    folder = tmp_path_factory.mktemp(request.param)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    fresh = init_adapter(params, lora, jax.random.key(1))
    adapter = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), fresh)
    mj.export_hf(mj.LanguageModel(config, params, MissingTokenizer.for_model(config.vocab_size, [])), folder / "base")
    (folder / "adapter").mkdir()
    write_peft(folder / "adapter", adapter, config, lora, str(folder / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).eval()
    return config, lora, params, adapter, theirs


def tokens_of(config):
    return np.random.default_rng(0).integers(0, config.vocab_size, (2, 21), np.int32)


def test_peft_loads_an_export_and_gives_our_logits(case):
    config, lora, params, adapter, theirs = case
    tokens = tokens_of(config)
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(tokens).long()).logits.numpy()
        with theirs.disable_adapter():
            base = theirs(input_ids=torch.from_numpy(tokens).long()).logits.numpy()
    assert error(mj.forward(combine(params, adapter, lora), config, tokens), expected) < 1e-5
    assert error(base, expected) > 0.01


def test_loss_and_gradients_are_pefts(case, tmp_path):
    config, lora, params, adapter, theirs = case
    config = dataclasses.replace(config, router_aux_loss_coef=0.0)
    row = tokens_of(config)
    tokens, targets = row[:, :-1], row[:, 1:]
    logits = theirs(input_ids=torch.from_numpy(tokens).long()).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).long().flatten())
    theirs.zero_grad()
    loss.backward()
    batch = {
        "tokens": tokens,
        "targets": targets,
        "weights": np.ones(tokens.shape, np.float32),
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape),
    }
    loss_fn = adapted_loss(language_model_loss(config, ComputeConfig()), lora)
    step = jax.jit(partial(jax.value_and_grad(loss_fn, has_aux=True), frozen={"base": params, "rest": None}, key=None))
    (total, (weight, _)), gradient = step(adapter, batch=batch)
    assert float(total / weight) == pytest.approx(float(loss.detach()), rel=1e-5)
    write_peft(tmp_path, jax.tree.map(lambda g: g / weight, gradient), config, lora, "")
    ours = load_file(tmp_path / "adapter_model.safetensors")
    trained = {n.replace(".default", ""): p.grad.numpy() for n, p in theirs.named_parameters() if p.requires_grad}
    assert ours.keys() == trained.keys()
    for name, array in trained.items():
        assert error(ours[name], array) < 1e-5, name


def test_what_peft_saves_is_read(case, tmp_path):
    config, lora, _, adapter, theirs = case
    theirs.save_pretrained(tmp_path)
    read, again = read_peft(tmp_path, config)
    assert read.lora_scale == pytest.approx(lora.lora_scale)
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


def test_peft_draws_new_adapters_as_we_do():
    """A uniform within 1 / sqrt(in), B zero."""
    linear = torch.nn.Sequential(torch.nn.Linear(400, 300, bias=False))
    layer = peft.get_peft_model(linear, peft.LoraConfig(r=50, target_modules=["0"])).base_model.model[0]
    theirs = layer.lora_A["default"].weight.detach().numpy()
    shapes = {"layers": {"q_proj": {"kernel": jax.ShapeDtypeStruct((1, 400, 300), np.float32)}}}
    ours = init_adapter(shapes, LoraConfig(50, lora_targets=("q_proj",)), jax.random.key(0))["layers"]["q_proj"]
    assert not layer.lora_B["default"].weight.any()
    assert not ours["b"].any()
    assert np.abs(ours["a"]).max() == pytest.approx(np.abs(theirs).max(), rel=1e-2) == pytest.approx(0.05, rel=1e-2)
    assert np.std(ours["a"]) == pytest.approx(theirs.std(), rel=2e-2)
