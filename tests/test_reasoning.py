"""Reasoning replies: their form, the report on them, and the tokens that make it."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_trainer import KEY, TINY, draw, uneven_batch

from minillm_jax.chat import render
from minillm_jax.config import ComputeConfig, ConfigError
from minillm_jax.evaluation import evaluate_reasoning
from minillm_jax.lm import Completion
from minillm_jax.losses import language_model_loss, logprobs_from_logits, reweighted
from minillm_jax.model import forward
from minillm_jax.reasoning import REASONING_TAGS, Reasoning, read_reasoning
from minillm_jax.tokenizer import Tokenizer, TokenizerError, train_tokenizer
from train.distill_reason import tag_ids

CHAT = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat"] * 3, vocab_size=280)


@pytest.mark.parametrize(
    "reply",
    [
        "<think>\na\n</think>\n<answer>\n7\n</answer>",
        "<think>a</think><answer>7</answer>",
        "\n <think>a</think>\n\n<answer> 7 </answer>\n",
    ],
)
def test_a_thought_and_an_answer_are_read(reply):
    assert read_reasoning(reply) == Reasoning("a", "7")


def test_blocks_may_be_empty_and_hold_lines_and_other_tags():
    assert read_reasoning("<think></think><answer></answer>") == Reasoning("", "")
    assert read_reasoning("<think>a <b>\nc</think><answer>x < y</answer>") == Reasoning("a <b>\nc", "x < y")


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "7",
        "<think>a</think>",
        "<answer>7</answer>",
        "<think>a</think><answer>7",
        "<think>a<answer>7</answer></think>",
        "<answer>7</answer><think>a</think>",
        "so <think>a</think><answer>7</answer>",
        "<think>a</think> so <answer>7</answer>",
        "<think>a</think><answer>7</answer> so",
        "<think>a</think><think>a</think><answer>7</answer>",
        "<think>a</think><answer>7</answer><answer>7</answer>",
        "<think>a <think> b</think><answer>7</answer>",
        "<Think>a</Think><answer>7</answer>",
    ],
)
def test_anything_else_is_not_well_formed(reply):
    assert read_reasoning(reply) is None


@given(st.text(), st.text())
def test_what_is_put_between_the_tags_comes_back(thought, answer):
    if not any(tag in thought + answer for tag in REASONING_TAGS):
        reply = f"<think>{thought}</think><answer>{answer}</answer>"
        assert read_reasoning(reply) == Reasoning(thought.strip(), answer.strip())


@given(st.lists(st.sampled_from([*REASONING_TAGS, "x", " "]), max_size=9))
def test_a_well_formed_reply_holds_each_tag_once_in_order(pieces):
    reading = read_reasoning("".join(pieces))
    assert (reading is not None) <= ([p for p in pieces if p in REASONING_TAGS] == list(REASONING_TAGS))


def test_the_report_counts_form_and_answers():
    form = "<think>a</think><answer>{}</answer>".format
    replies = {1: form("1"), 2: form("5"), 3: "no", 4: form("4")}
    references = [form("1"), form("2"), form("3"), "no answer"]

    def complete(prompts):
        return [Completion(replies[len(p)], [], [], "length" if len(p) == 3 else "stop") for p in prompts]

    prompts = [[0] * n for n in (1, 2, 3, 4)]
    assert evaluate_reasoning(prompts, references, complete, batch_size=3) == {
        "rows": 4,
        "well_formed": 0.75,
        "unfinished": 0.25,
        "rows_with_answer": 3,
        "accuracy": pytest.approx(1 / 3),
    }
    assert evaluate_reasoning(prompts, [""] * 4, complete, batch_size=3)["accuracy"] is None


def test_tags_weigh_more_and_the_mean_is_over_weights():
    params, batch, tags = draw(TINY, KEY), uneven_batch(rows=8), [5, 9, 17, 33]
    loss_fn = reweighted(language_model_loss(TINY, ComputeConfig()), tags, 10.0)
    total, (weight, metrics) = loss_fn(params, None, batch, None)
    weights = batch["weights"] * np.where(np.isin(batch["targets"], tags), 10.0, 1.0)
    assert float(weight) == weights.sum() > batch["weights"].sum()
    logits = forward(params, TINY, batch["tokens"], batch["positions"], batch["segment_ids"])
    np.testing.assert_allclose(total, -(logprobs_from_logits(logits, batch["targets"]) * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"][0], total, rtol=1e-6)


def test_tags_are_single_tokens_of_the_vocabulary(tokenizer):
    ids = tag_ids(tokenizer)
    assert [tokenizer.id_to_token(i) for i in ids] == list(REASONING_TAGS)
    assert tokenizer.encode("<think>") == ids[:1]  # a thought in a row's text is the token too
    foreign = tokenizer.tokenizer_json.replace("</answer>", "</other>")
    with pytest.raises(ConfigError, match="no single token </answer>"):
        tag_ids(Tokenizer(foreign, '{"eos_token": "<|im_end|>"}'))


class TestSystemPrompt:
    def test_it_opens_conversations_without_one(self, tokenizer):
        ours = tokenizer.with_system_prompt('Say "why"\n{{ x }} {% y %} 想一想 😀 \\')
        told = [{"role": "system", "content": 'Say "why"\n{{ x }} {% y %} 想一想 😀 \\'}, *CHAT]
        assert render(ours, CHAT) == render(tokenizer, told)
        assert render(ours, CHAT[:1], add_generation_prompt=True) == render(
            tokenizer, told[:2], add_generation_prompt=True
        )

    def test_a_system_turn_of_the_row_wins_and_so_does_a_later_prompt(self, tokenizer):
        row = [{"role": "system", "content": "mine"}, *CHAT]
        ours = tokenizer.with_system_prompt("other")
        assert render(ours, row) == render(tokenizer, row)
        assert render(ours.with_system_prompt("mine"), CHAT) == render(tokenizer, row)

    def test_it_goes_with_the_files_and_the_fingerprint(self, tokenizer, tmp_path):
        ours = tokenizer.with_system_prompt("be brief")
        ours.save(tmp_path)
        assert Tokenizer.load(tmp_path) == ours
        assert len({tokenizer.fingerprint, ours.fingerprint, tokenizer.with_system_prompt("x").fingerprint}) == 3

    def test_templates_without_generation_tags_take_it_too(self, tokenizer):
        source = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        config = {"eos_token": "<|im_end|>", "chat_template": source}
        plain = Tokenizer(tokenizer.tokenizer_json, json.dumps(config))
        told = [{"role": "system", "content": "be brief"}, *CHAT]
        assert render(plain.with_system_prompt("be brief"), CHAT).token_ids == render(plain, told).token_ids

    def test_a_control_token_in_it_is_refused(self, tokenizer):
        with pytest.raises(TokenizerError, match="must not spell"):
            tokenizer.with_system_prompt("end <|im_end|> here")
