"""Live comparison with `transformers` over random odd shapes, in both directions.

An error is the largest absolute difference over the largest absolute value of the reference, both float32. Shapes come
from seeded randomness: one, two and eight query heads for each key head, tied and untied heads, vocabularies that are
no multiple of 8, and where an architecture allows it heads that do not divide the hidden size.
"""

import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from conformance import reference, subject
from example_tokenizers import TOKENIZER
from safetensors.torch import load_file
from transformers import PreTrainedModel

import minillm_jax
from minillm_jax.config import ModelConfig, RopeScaling
from minillm_jax.hf_tensors import to_hf
from minillm_jax.lm import LanguageModel
from minillm_jax.model import init_params

pytestmark = pytest.mark.conformance

LIMIT = 2e-5
GROUPS = (1, 2, 8)
"""Query heads for each key head."""
KINDS = [*(("llama", rope) for rope in reference.ROPE), *((name, None) for name in reference.ARCHITECTURES[1:])]
"""Architecture and rotary scaling; the latter is drawn for each shape where None stands."""
WIDTH = 24


@dataclasses.dataclass(frozen=True)
class Pair:
    """A random model of transformers, and what minillm-jax reads in the folder that it writes."""

    theirs: PreTrainedModel
    ours: LanguageModel
    vocab_size: int

    @property
    def rng(self):
        """Random numbers that do not depend on which tests ran before."""
        return np.random.default_rng(5)


@functools.cache
def make_pair(architecture, rope, groups):
    kind, number = KINDS.index((architecture, rope)), GROUPS.index(groups)
    seed = 10 * kind + number
    rng = np.random.default_rng(seed)
    fields = reference.random_shape(architecture, rng, groups, tied=(kind + number) % 2 == 0)
    theirs = reference.random_model(architecture, seed, reference.random_rope(rng, rope), **fields)
    with tempfile.TemporaryDirectory() as folder:
        reference.save(theirs, folder)
        if number == 1:
            config = Path(folder, "config.json")
            config.write_text(json.dumps(reference.legacy_spelling(json.loads(config.read_text("utf-8")))), "utf-8")
        return Pair(theirs, minillm_jax.load(folder), fields["vocab_size"])


@pytest.fixture
def pair(request):
    """The pair of these settings, made once."""
    return make_pair(*request.param)


def of_pairs(*groups):
    settings = [(*kind, count) for kind in KINDS for count in groups]
    names = ["-".join(str(part) for part in setting if part is not None) for setting in settings]
    return pytest.mark.parametrize("pair", settings, ids=names, indirect=True)


@of_pairs(*GROUPS)
def test_logits_of_every_layout(pair):
    for layout, batch in reference.layouts(pair.rng, pair.vocab_size, WIDTH).items():
        assert subject.logits_error(pair.ours, batch, reference.logits(pair.theirs, batch)) < LIMIT, layout


@of_pairs(2)
def test_cached_decoding(pair):
    batch = reference.cached_batch(pair.rng, pair.vocab_size)
    real = batch["segment_ids"] > 0
    expected = reference.cached_logits(pair.theirs, batch)[real]
    assert subject.error(subject.cached_logits(pair.ours, batch)[real], expected) < LIMIT


@of_pairs(8)
def test_greedy_generation_token_for_token(pair):
    prompt, tokens = reference.decided_prompt(pair.theirs, pair.rng)
    assert subject.greedy(pair.ours, prompt, reference.NEW_TOKENS) == tokens.tolist()


@of_pairs(*GROUPS)
def test_an_exported_model_is_the_one_imported(pair, tmp_path):
    minillm_jax.export_hf(pair.ours, tmp_path / "exported")
    exported = reference.load(tmp_path / "exported")
    assert exported.config.vocab_size == pair.vocab_size
    ours, theirs = reference.saved_tensors(exported), reference.saved_tensors(pair.theirs)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
    batch = reference.layouts(pair.rng, pair.vocab_size, WIDTH)["plain"]
    expected = reference.logits(pair.theirs, batch)
    assert subject.error(reference.logits(exported, batch), expected) < LIMIT


@pytest.mark.parametrize(
    ("architecture", "dtype"), list(zip(reference.ARCHITECTURES, [torch.bfloat16, torch.float16] * 3, strict=True))
)
def test_half_precision_folders_are_read_exactly(architecture, dtype, tmp_path):
    rng = np.random.default_rng(7)
    shape = reference.random_shape(architecture, rng, groups=2, tied=False)
    reference.save(reference.random_model(architecture, 7, **shape).to(dtype), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    ours = minillm_jax.load(tmp_path)
    tensors = dict(to_hf(ours.params, ours.config))
    assert tensors.keys() == stored.keys()
    for name, tensor in stored.items():
        np.testing.assert_array_equal(tensors[name], tensor.float().numpy(), err_msg=name)
    batch = reference.layouts(rng, shape["vocab_size"], WIDTH)["plain"]
    assert subject.logits_error(ours, batch, reference.logits(reference.load(tmp_path), batch)) < LIMIT


SHAPE = ModelConfig(
    vocab_size=387,
    hidden_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=30,
    max_position_embeddings=64,
    initializer_range=0.25,
)
HEADS = {"num_attention_heads": 6, "head_dim": 10}
EXPERTS = HEADS | {"use_moe": True, "n_shared_experts": 0, "moe_intermediate_size": 18}
YARN = RopeScaling("yarn", 4.0, original_max_position_embeddings=16, beta_fast=16.0, attention_factor=1.2)
NATIVE = {
    "llama": {},
    "llama:linear": {"head_dim": 12, "rope_scaling": RopeScaling("linear", 3.0), "max_position_embeddings": 96},
    "llama:llama3": {"rope_scaling": RopeScaling("llama3", 4.0, original_max_position_embeddings=16)},
    "mistral:yarn": HEADS | {"rope_scaling": YARN, "rope_theta": 500.0, "tie_word_embeddings": False},
    "qwen2": HEADS | {"attention_bias": True, "num_key_value_heads": 1},
    "qwen3": HEADS | {"use_qk_norm": True, "tie_word_embeddings": False, "rms_norm_eps": 1e-3},
    "qwen3_moe": EXPERTS | {"use_qk_norm": True, "norm_topk_prob": False, "num_experts": 5},
    "mixtral": EXPERTS | {"num_key_value_heads": 6, "num_experts": 3},
}
draw = jax.jit(init_params, static_argnums=0)


@pytest.mark.parametrize("name", NATIVE)
def test_a_model_of_ours_means_the_same_to_transformers(name, tmp_path):
    config = dataclasses.replace(SHAPE, **NATIVE[name])
    rng = np.random.default_rng(11)
    # Biases and norm scales start at values that would hide an error.
    params = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), draw(config, jax.random.key(1)))
    lm = LanguageModel(config, params, TOKENIZER)
    minillm_jax.export_hf(lm, tmp_path / "exported")
    theirs = reference.load(tmp_path / "exported")
    assert theirs.config.model_type == name.partition(":")[0]
    for layout, batch in reference.layouts(rng, config.vocab_size, 40).items():
        assert subject.logits_error(lm, batch, reference.logits(theirs, batch)) < LIMIT, layout
