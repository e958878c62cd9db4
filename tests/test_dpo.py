"""Pairs from rows to batches, what can be wrong with them, and the reference that a run keeps."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from example_tokenizers import TOKENIZER, with_config

from minillm_jax.chat import render
from minillm_jax.config import DataConfig, ModelConfig, RunConfig
from minillm_jax.data import DataError, eval_batches, load_pairs, make_iterator
from minillm_jax.model import init_params
from minillm_jax.run import Run
from minillm_jax.tokenizer import Tokenizer
from train import dpo

UNTAGGED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY = ModelConfig(
    vocab_size=TOKENIZER.vocab_size, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    intermediate_size=8,
)  # fmt: skip


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def pair(prompt="it was", chosen="the best of times", rejected="the worst", before=()):
    turns = [*before, user(prompt)]
    return {"chosen": [*turns, assistant(chosen)], "rejected": [*turns, assistant(rejected)]}


@pytest.fixture
def load(tmp_path):
    """Write rows to a file and load them; returns what `load_pairs` does and the reported lines."""

    def load(rows, max_seq_len=128, tokenizer=TOKENIZER, **options):
        path, lines = tmp_path / "pairs.jsonl", []
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"cache_dir": str(tmp_path / "cache"), "report": lines.append} | options
        return *load_pairs([str(path)], tokenizer, max_seq_len, **options), lines

    return load


def trained_text(tokenizer, batch, row, side):
    return tokenizer.decode(
        batch["targets"][row, side][batch["weights"][row, side] > 0].tolist(), skip_special_tokens=True
    )


def test_a_batch_holds_chosen_before_rejected_in_the_order_asked_for(load):
    rows, valid, _ = load([pair(chosen=f"the best {i}", rejected=f"the worst {i}") for i in range(4)])
    batch = rows.gather([2, 0, 3])
    assert valid is None
    assert batch["tokens"].shape == (3, 2, rows.seq_len)
    assert "ref_logps" not in batch
    for row, i in enumerate([2, 0, 3]):
        assert trained_text(TOKENIZER, batch, row, 0).startswith(f"the best {i}")
        assert trained_text(TOKENIZER, batch, row, 1).startswith(f"the worst {i}")
        ids = render(TOKENIZER, pair(chosen=f"the best {i}")["chosen"]).token_ids
        assert batch["tokens"][row, 0, : len(ids) - 1].tolist() == ids[:-1]
        assert batch["segment_ids"][row, 0].sum() == len(ids) - 1
        assert not batch["tokens"][row, 0, len(ids) :].any()


@pytest.mark.parametrize(
    "tokenizer", [TOKENIZER, Tokenizer.from_files(with_config(chat_template=UNTAGGED))], ids=["tagged", "untagged"]
)
def test_only_the_last_turn_carries_loss(load, tokenizer):
    before = [user("the age"), assistant("\n\nof wisdom")]
    rows, _, _ = load([pair(before=before)], tokenizer=tokenizer)
    batch = rows.gather([0])
    assert trained_text(tokenizer, batch, 0, 0).strip() == "the best of times"
    assert trained_text(tokenizer, batch, 0, 1).strip() == "the worst"


def test_prompts_are_the_same_when_they_render_the_same(load):
    row = pair()
    row["rejected"] = [{"role": "system", "content": "You are a helpful assistant"}, *row["rejected"]]
    assert len(load([row])[0]) == 1


def test_known_reference_log_probabilities_go_with_their_pairs(load):
    rows, _, _ = load([pair(chosen=f"the best {i}") for i in range(3)])
    known = dataclasses.replace(rows, ref_logps=np.arange(6, dtype=np.float32).reshape(3, 2))
    assert known.gather([2, 1])["ref_logps"].tolist() == [[4, 5], [2, 3]]
    assert known.fingerprint() == rows.fingerprint()
    *_, last = eval_batches(known, 2)
    assert last["ref_logps"].tolist() == [[4, 5], [0, 0]]
    assert next(make_iterator(known, 3, seed=0))["tokens"].shape == (3, 2, rows.seq_len)


MARGINS = [pair(), pair("x") | {"margin": 1.5}, pair("y") | {"margin": -2}, pair("z") | {"margin": None}]


def test_margins_come_with_their_pairs_and_out_of_the_cache(load):
    for _ in range(2):  # tokenised, and reused
        rows, _, _ = load(MARGINS)
        assert rows.margins.tolist() == [0.0, 1.5, -2.0, 0.0]
        assert rows.gather([2, 0])["margin"].tolist() == [-2.0, 0.0]
        assert rows.gather([2, 0])["margin"].dtype == np.float32


def test_margins_stay_with_pairs_that_are_set_aside_or_left_out(load):
    many = [pair(f"it was {i}") | {"margin": i} for i in range(20)]
    many[7] = pair("the age of wisdom " * 40) | {"margin": 7}
    rows, valid, _ = load(many, valid_fraction=0.3)
    assert sorted([*rows.margins, *valid.margins]) == [i for i in range(20) if i != 7]
    for part in (rows, valid):
        for i, margin in enumerate(part.margins):
            assert f"it was {margin:.0f}" in TOKENIZER.decode(part.gather([i])["tokens"][0, 0].tolist())


def test_rows_without_margins_hash_as_if_there_were_none(load):
    rows, zeros, others = (load([pair() | more])[0] for more in ({}, {"margin": 0}, {"margin": 1}))
    bare = dataclasses.replace(rows, documents=dataclasses.replace(rows.documents, margins=None))
    assert bare.fingerprint() == rows.fingerprint() == zeros.fingerprint() != others.fingerprint()
    assert bare.gather([0])["margin"].tolist() == [0.0]


BAD_ROWS = [
    (pair(chosen="the same", rejected="the same"), "rejected: is the same as chosen"),
    ({"chosen": pair("one")["chosen"], "rejected": pair("two")["rejected"]}, "rejected: has another prompt"),
    (pair(chosen="  "), "chosen[1].content: is empty"),
    (pair(rejected=""), "rejected[1].content: is empty"),
    ({"chosen": pair()["chosen"][1:], "rejected": pair()["rejected"][1:]}, "chosen: has no turn before the answer"),
    ({"chosen": pair()["chosen"]}, "rejected: is missing"),
    (pair() | {"rejected": pair()["rejected"][:1]}, "rejected[0].role: the last turn must be the assistant's"),
    (pair() | {"margin": "1"}, "margin: must be a number, not a string"),
    (pair() | {"margin": True}, "margin: must be a number, not true"),
    (pair() | {"margin": float("nan")}, "margin: must be a finite number, not the number nan"),
    (pair() | {"margin": float("-inf")}, "margin: must be a finite number, not the number -inf"),
    (pair() | {"margin": 1e39}, "margin: must be a finite number, not the number 1e+39"),
    (pair() | {"margin": 10**400}, "margin: must be a finite number, not the number 1000"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=[message for _, message in BAD_ROWS])
def test_a_bad_row_says_where_and_what(load, tmp_path, row, message):
    with pytest.raises(DataError) as error:
        load([pair(), row])
    assert str(error.value).startswith(f"{tmp_path / 'pairs.jsonl'}:2: {message}")
    rows, _, lines = load([pair(), row], on_bad_row="skip")
    assert len(rows) == 1
    assert any("skipped 1 bad row" in line for line in lines)


def test_answers_are_cut_at_their_end_and_counted(load):
    prompt = len(render(TOKENIZER, [user("it was")], add_generation_prompt=True).token_ids)
    short, long = pair(chosen="it", rejected="we"), pair(chosen="the worst of times " * 9, rejected="we")
    assert not any(line.startswith("cut") for line in load([short, long])[2])
    rows, _, lines = load([short, long], max_seq_len=prompt + 5)
    assert any(line.startswith("cut answers of 1 pairs") for line in lines)
    batch = rows.gather([1])
    assert batch["tokens"].shape[-1] == prompt + 5
    assert batch["weights"][0, 0].sum() == 6  # the last input's target is one more token


def test_pairs_that_the_length_makes_useless_are_left_out_and_counted(load):
    prompt = len(render(TOKENIZER, [user("it was")], add_generation_prompt=True).token_ids)
    wordy = pair(prompt="the age of wisdom " * 20)
    alike = pair(chosen="we don't know which one, times", rejected="we don't know which one, best")
    rows, _, lines = load([pair(), wordy, alike], max_seq_len=prompt + 3)
    assert len(rows) == 1
    assert any("left out 1 pairs whose prompt leaves no room" in line for line in lines)
    assert any("left out 1 pairs whose answers are the same" in line for line in lines)
    with pytest.raises(DataError, match="not one of its 1 pairs fits"):
        load([wordy], max_seq_len=prompt)


def test_held_out_pairs_stay_together_and_are_trained_on_by_nobody(load):
    rows = [pair(prompt=f"it was {i}", chosen=f"the best {i}") for i in range(40)]
    train, valid, lines = load(rows, valid_fraction=0.25)
    seen = [tuple(map(tuple, r.gather([i])["tokens"][0])) for r in (train, valid) for i in range(len(r))]
    assert len(train) + len(valid) == len(set(seen)) == 40
    assert train.seq_len == valid.seq_len
    assert sum("pairs in rows" in line for line in lines) == 2


@pytest.fixture
def run_with(tmp_path, load, monkeypatch):
    """A run folder over tiny pairs; the model at its `--model_path` is whatever `models[0]` is."""
    models = [jax.jit(init_params, static_argnums=0)(TINY, jax.random.key(0))]
    monkeypatch.setattr(dpo, "load_reference", lambda config, run, mesh: models[0])
    config = dpo.DpoConfig(
        run=RunConfig(out_dir=str(tmp_path / "run"), model_path="elsewhere"),
        data=DataConfig(data_path=(), batch_size=2), model=TINY,
    )  # fmt: skip
    (tmp_path / "run").mkdir()
    train, valid, _ = load([pair(chosen=f"the best {i}") for i in range(6)], valid_fraction=0.3)
    return models, config, Run(tmp_path / "run", TINY, TOKENIZER), {"train": train, "valid": valid}


def other_model():
    return jax.jit(init_params, static_argnums=0)(TINY, jax.random.key(1))


def test_a_reference_is_computed_once_and_read_again(run_with, capsys):
    _, config, run, parts = run_with
    first = dpo.with_reference(config, run, parts)
    assert {name: rows.ref_logps.shape for name, rows in first.items()} == {
        name: (len(rows), 2) for name, rows in parts.items()
    }
    assert all((rows.ref_logps < 0).all() for rows in first.values())
    again = dpo.with_reference(config, run, parts)
    assert capsys.readouterr().out.count("computing") == 1
    np.testing.assert_array_equal(first["train"].ref_logps, again["train"].ref_logps)


def test_before_the_first_checkpoint_a_changed_model_gives_a_new_reference(run_with):
    models, config, run, parts = run_with
    first = dpo.with_reference(config, run, parts)
    models[0] = other_model()
    assert not np.array_equal(first["train"].ref_logps, dpo.with_reference(config, run, parts)["train"].ref_logps)


def test_a_resumed_run_keeps_its_reference_whatever_lies_at_the_model_path(run_with):
    models, config, run, parts = run_with
    first = dpo.with_reference(config, run, parts)
    (run.folder / "checkpoints" / "5").mkdir(parents=True)
    models[0] = other_model()
    resumed = dpo.with_reference(config, run, parts)
    np.testing.assert_array_equal(first["train"].ref_logps, resumed["train"].ref_logps)
    with pytest.raises(dpo.ConfigError, match="have changed since it began"):
        dpo.with_reference(config, run, {"train": parts["train"], "valid": parts["train"]})
