"""Reward models against `transformers`' sequence classifiers, both ways."""

import dataclasses
import json
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax
from example_tokenizers import TOKENIZER

import minillm_jax as mj
from minillm_jax.chat import render
from minillm_jax.config import ModelConfig
from minillm_jax.lm import LanguageModel
from minillm_jax.model import init_params
from minillm_jax.reward import reward_scores
from minillm_jax.run import write_run
from rl import train_rm

pytestmark = pytest.mark.conformance
transformers.logging.set_verbosity_error()
BASE = ModelConfig(
    vocab_size=TOKENIZER.vocab_size + 3,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=20,
    initializer_range=0.3,
)
KINDS = {
    "llama": BASE,
    "mistral": dataclasses.replace(BASE, num_attention_heads=5, num_key_value_heads=1, head_dim=6),
    "qwen2": dataclasses.replace(BASE, attention_bias=True, tie_word_embeddings=False),
    "qwen3": dataclasses.replace(BASE, use_qk_norm=True),
    "qwen3_moe": dataclasses.replace(BASE, use_moe=True, use_qk_norm=True, n_shared_experts=0),
    "mixtral": dataclasses.replace(BASE, use_moe=True, n_shared_experts=0),
}


@pytest.mark.parametrize("name", KINDS)
def test_scores_are_those_of_a_sequence_classifier(tmp_path, name):
    config = KINDS[name]
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    params.pop("lm_head", None)
    params["score"] = {"kernel": jax.random.normal(jax.random.key(1), (config.hidden_size, 1))}
    lm = LanguageModel(config.resolved(), params, TOKENIZER)
    mj.export_hf(lm, tmp_path / "ours")
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
    )
    assert not any(report.values()), report
    lengths = np.asarray([11, 6, 1])
    segment_ids = (np.arange(11) < lengths[:, None]).astype(np.int32)
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, segment_ids.shape) * segment_ids  # 0 is padding
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens), attention_mask=torch.tensor(segment_ids)).logits[:, 0].numpy()
    found = reward_scores(params, config, tokens, segment_ids)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
    theirs.save_pretrained(tmp_path / "theirs")
    back = mj.load(tmp_path / "theirs")
    jax.tree.map(np.testing.assert_array_equal, back.params, params)


@pytest.mark.parametrize("name", ["qwen2", "mixtral"])
def test_a_run_of_the_stage_scores_conversations_there_as_here(tmp_path, monkeypatch, name):
    config, data = KINDS[name].resolved(), tmp_path / "pairs.jsonl"
    write_run(tmp_path / "lm", config, jax.jit(init_params, static_argnums=0)(config, jax.random.key(0)), TOKENIZER, {})
    user = {"role": "user", "content": "it was"}
    sides = {"chosen": "the best of times", "rejected": "the worst"}
    pair = {side: [user, {"role": "assistant", "content": text}] for side, text in sides.items()}
    data.write_text(json.dumps(pair) + "\n")
    argv = ["--data_path", data, "--valid_path", data, "--cache_dir", tmp_path / "cache", "--max_seq_len", 96]
    argv += ["--model_path", tmp_path / "lm", "--out_dir", tmp_path / "rm", "--batch_size", 2, "--steps", 4]
    monkeypatch.setattr(sys, "argv", ["train_rm", *map(str, argv), "--learning_rate", "1e-2"])
    assert train_rm.main() == 0
    margin = json.loads((tmp_path / "rm" / "report.json").read_text())["margin"]
    mj.export_hf(mj.load(tmp_path / "rm"), tmp_path / "hf")
    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "hf", output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
    )
    assert not any(report.values()), report
    with torch.no_grad():
        scores = [theirs(torch.tensor([render(TOKENIZER, turns).token_ids])).logits.item() for turns in pair.values()]
    assert margin > 0
    assert scores[0] - scores[1] == pytest.approx(margin, rel=1e-4)
