"""A reward model as a reward: it reads what it was trained to read, whatever shares its batch."""

import dataclasses

import jax
import numpy as np
import pytest
from example_samples import END, sample, samples
from example_tokenizers import TOKENIZER, with_config

from minillm_jax.chat import render
from minillm_jax.config import ConfigError, ModelConfig
from minillm_jax.hf import export_hf
from minillm_jax.lm import LanguageModel
from minillm_jax.model import init_params
from minillm_jax.reward import reward_scores
from minillm_jax.sharding import make_mesh
from minillm_jax.tokenizer import Tokenizer, train_tokenizer
from rl import reward_model as reward_model_module
from rl.reward_model import closing_tokens, open_reward_model
from rl.rewards import RewardConfig, make_rewards

TINY = ModelConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=24,
    max_position_embeddings=256,
)


def reward_model(config=TINY, tokenizer=TOKENIZER):
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    params = {name: leaf for name, leaf in params.items() if name != "lm_head"}
    params["score"] = {"kernel": jax.random.normal(jax.random.key(1), (config.hidden_size, 1))}
    return LanguageModel(config.resolved(), params, tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("rm") / "model"
    export_hf(reward_model(), path)
    return str(path)


CHATS = ("yes", "It was the best of times, it was the worst of times", "曹操", "")


@pytest.mark.parametrize("mesh", [None, "data=-1"])
def test_the_model_reads_each_conversation_as_its_template_renders_it(folder, mesh):
    lm = reward_model()
    model = open_reward_model(folder, TOKENIZER, max_seq_len=200, mesh=mesh and make_mesh(mesh))
    batch = samples(*CHATS)
    found = model.score([model.whole(s.prompt_ids, s.completion_ids) for s in batch])
    for score, scored in zip(found, batch, strict=True):
        turns = [*scored.record.conversations, {"role": "assistant", "content": scored.completion}]
        ids = np.asarray([render(TOKENIZER, turns).token_ids])
        np.testing.assert_allclose(score, reward_scores(lm.params, lm.config, ids)[0], rtol=1e-4, atol=1e-5)
    assert len(set(found.tolist())) == len(CHATS)


def test_a_completion_that_was_cut_off_is_scored_as_it_stands(folder):
    lm, model = reward_model(), open_reward_model(folder, TOKENIZER, max_seq_len=200)
    cut = sample("It was the", finished=False)
    ids = [*cut.prompt_ids, *cut.completion_ids]
    assert model.whole(cut.prompt_ids, cut.completion_ids) == ids
    expected = reward_scores(lm.params, lm.config, np.asarray([ids]))
    np.testing.assert_allclose(model.score([ids]), expected, rtol=1e-4, atol=1e-5)


def test_many_conversations_share_few_shapes_and_keep_their_order(folder, monkeypatch):
    shapes = set()

    def recorded(params, config, tokens, *rest):
        shapes.add(tokens.shape)
        return reward_scores(params, config, tokens, *rest)

    monkeypatch.setattr(reward_model_module, "reward_scores", recorded)
    model = open_reward_model(folder, TOKENIZER, max_seq_len=200)
    chats = [[1, *([7] * (i % 90)), i % 50] for i in range(150)]
    scores = model.score(chats)
    assert len(shapes) == 3  # 64, 64 and 22 rows
    for i in (0, 1, 89, 149):
        np.testing.assert_allclose(scores[i], model.score([chats[i]])[0], rtol=1e-4, atol=1e-5)


def test_the_model_is_a_component_with_a_weight(folder):
    config = RewardConfig(reward=("exact", "model:0.5"), reward_model_path=folder)
    both = make_rewards(config, TOKENIZER, max_prompt_len=100, max_new_tokens=100)
    scored = both(samples("yes", "no"))
    np.testing.assert_allclose(scored.total, [1, 0] + 0.5 * scored.components["model"], rtol=1e-5)
    alone = RewardConfig(reward_model_path=folder)
    total = make_rewards(alone, TOKENIZER, max_prompt_len=100, max_new_tokens=100)(samples("yes", "no")).total
    np.testing.assert_allclose(total, scored.components["model"], rtol=1e-4, atol=1e-5)
    both.check([sample().record])


def test_closing_tokens_are_those_that_the_template_writes_behind_an_answer():
    assert TOKENIZER.decode(closing_tokens(TOKENIZER)) == "<|im_end|>\n"
    for template, closing in (
        ("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", "<|im_end|>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", ""),
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
            "{% else %}{{ m.content }}{% endif %}<|im_end|>\n\n{% endfor %}",
            "<|im_end|>\n\n",
        ),
    ):
        ours = Tokenizer.from_files(with_config(chat_template=template))
        assert ours.decode(closing_tokens(ours)) == closing


def test_another_end_token_is_closed_like_the_templates_own(folder):
    model = dataclasses.replace(open_reward_model(folder, TOKENIZER, max_seq_len=200), ends=frozenset({0, END}))
    assert model.whole([5], [6, 0]) == model.whole([5], [6, END]) == [5, 6, *closing_tokens(TOKENIZER)]
    assert dataclasses.replace(model, closing=()).whole([5], [6, END]) == [5, 6, END]


def test_a_model_that_does_not_fit_the_policy_is_refused(tmp_path, folder):
    other = train_tokenizer(["quite another text, with other words in it, " * 3] * 20, 330)
    with pytest.raises(
        ConfigError, match=r"has another vocabulary than the policy: token \d+ is .* there and .*; train"
    ):
        open_reward_model(folder, other, max_seq_len=100)
    needed = 250 + len(closing_tokens(TOKENIZER)) - 1
    assert open_reward_model(folder, TOKENIZER, max_seq_len=256 - needed + 250)
    with pytest.raises(ConfigError, match=r"reads 256 tokens, but prompts, .* can have 257; lower --max_seq_len"):
        open_reward_model(folder, TOKENIZER, max_seq_len=257 - needed + 250)
    params = jax.jit(init_params, static_argnums=0)(TINY, jax.random.key(0))
    export_hf(LanguageModel(TINY.resolved(), params, TOKENIZER), tmp_path / "lm")
    with pytest.raises(ConfigError, match=r"is a language model, without a head .* with python -m rl\.train_rm"):
        open_reward_model(str(tmp_path / "lm"), TOKENIZER, max_seq_len=100)


def test_a_model_without_a_tokenizer_needs_a_vocabulary_large_enough(tmp_path):
    export_hf(reward_model(), tmp_path / "rm")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "rm" / name).unlink()
    assert open_reward_model(str(tmp_path / "rm"), TOKENIZER, max_seq_len=100)
    larger = train_tokenizer([" ".join(dir(str)), " ".join(dir(dict))] * 20, TINY.vocab_size + 20)
    with pytest.raises(ConfigError, match=rf"has a vocabulary of {TINY.vocab_size} and the policy one of"):
        open_reward_model(str(tmp_path / "rm"), larger, max_seq_len=100)
