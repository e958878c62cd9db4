"""RL prompts: rendered as they will be asked, never cut, drawn like any other rows."""

import json
from collections import Counter
from itertools import islice

import pytest
from example_tokenizers import TOKENIZER, with_config

from minillm_jax.chat import render
from minillm_jax.data import DataError, load_prompts, make_iterator
from minillm_jax.data.loader import Share
from minillm_jax.tokenizer import Tokenizer

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def questions(path, count, start=0):
    return write(path, [{"prompt": f"{start + i} + 1 = ?", "answer": str(start + i + 1)} for i in range(count)])


def load(*specs, limit=200, **options):
    return load_prompts(specs, TOKENIZER, limit, report=lambda line: None, **options)


def asked(rows, indices):
    return [rows.records[i].row["prompt"] for i in indices]


def test_a_prompt_ends_where_the_answer_begins(tmp_path):
    given = [{"prompt": "hi"}, {"conversations": [USER, ASSISTANT, USER, ASSISTANT], "tools": TOOLS}]
    rows, valid = load(write(tmp_path / "a.jsonl", given), limit=1000)
    assert valid is None
    assert rows.prompts[0] == render(TOKENIZER, [USER], add_generation_prompt=True).token_ids
    chat = render(TOKENIZER, [USER, ASSISTANT, USER], tools=TOOLS, add_generation_prompt=True)
    assert rows.prompts[1] == chat.token_ids
    assert TOKENIZER.decode(rows.prompts[1]).endswith("<|im_start|>assistant\n")
    assert "clock" in TOKENIZER.decode(rows.prompts[1])
    assert [record.row for record in rows.records] == given


def test_every_prompt_comes_once_an_epoch_and_a_restored_iterator_goes_on(tmp_path):
    rows, _ = load(questions(tmp_path / "a.jsonl", 10))
    iterator = make_iterator(rows, 4, seed=1)
    first = [next(iterator) for _ in range(3)]
    assert (first[0]["index"].shape, first[0]["index"].dtype.name) == ((4,), "int64")
    state = json.loads(json.dumps(iterator.get_state()))
    rest = [batch["index"].tolist() for batch in islice(iterator, 7)]
    resumed = make_iterator(rows, 4, seed=1)
    resumed.set_state(state)
    assert [batch["index"].tolist() for batch in islice(resumed, 7)] == rest
    stream = [i for batch in [*(b["index"].tolist() for b in first), *rest] for i in batch]
    assert Counter(stream[:10]) == Counter(stream[10:20]) == Counter(range(10))
    assert stream[:10] != stream[10:20]


def test_weights_become_shares(tmp_path):
    a, b = questions(tmp_path / "a.jsonl", 30), questions(tmp_path / "b.jsonl", 5, start=100)
    rows, _ = load(f"{a}:0.75", f"{b}:0.25")
    assert rows.shares == (Share(0, 30, 0.75), Share(30, 35, 0.25))
    drawn = [i for batch in islice(make_iterator(rows, 4, seed=0), 20) for i in batch["index"].tolist()]
    assert sum(i >= 30 for i in drawn) == 20
    assert load(a, b)[0].shares == (Share(0, 35, 1.0),)


def test_held_out_prompts_are_asked_in_validation_alone(tmp_path):
    path = questions(tmp_path / "a.jsonl", 40)
    train, valid = load(path, valid_fraction=0.25, seed=3)
    assert 1 <= len(valid) < 20
    everything = Counter(asked(load(path)[0], range(40)))
    assert Counter(asked(train, range(len(train)))) + Counter(asked(valid, range(len(valid)))) == everything
    assert all(len(rows.records) == len(rows.prompts) for rows in (train, valid))
    again = load(path, valid_fraction=0.25, seed=3)[1]
    assert asked(again, range(len(again))) == asked(valid, range(len(valid)))
    own = load(path, valid_path=(questions(tmp_path / "v.jsonl", 3, start=500) + ":2",))
    assert (len(own[0]), len(own[1])) == (40, 3)


def test_a_prompt_that_is_too_long_is_left_out_and_counted_never_cut(tmp_path):
    lines = []
    path = write(tmp_path / "a.jsonl", [{"prompt": "short"}, {"prompt": "x" * 500}, {"prompt": "brief"}])
    limit = len(render(TOKENIZER, [{"role": "user", "content": "brief"}], add_generation_prompt=True).token_ids)
    rows, _ = load_prompts([path], TOKENIZER, max(limit, 60), report=lines.append)
    assert asked(rows, range(len(rows))) == ["short", "brief"]
    assert any(line.startswith("left out 1 prompts of more than") and "--max_seq_len" in line for line in lines)
    with pytest.raises(DataError, match=r"not one of its 3 prompts fits into the 5 tokens that --max_seq_len leaves"):
        load(path, limit=5)


def test_the_longest_prompt_that_fits_is_kept(tmp_path):
    path = questions(tmp_path / "a.jsonl", 1)
    length = len(load(path)[0].prompts[0])
    assert len(load(path, limit=length)[0]) == 1
    with pytest.raises(DataError, match="not one of its 1 prompts fits"):
        load(path, limit=length - 1)


def test_a_row_that_the_template_refuses_is_a_bad_row(tmp_path):
    template = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0].content }}"
    strict = Tokenizer.from_files(with_config(chat_template=template))
    path = write(tmp_path / "a.jsonl", [{"prompt": "hi"}, {"conversations": [USER, ASSISTANT, USER]}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: conversations: .*one turn only"):
        load_prompts([path], strict, 100, report=print)
    lines = []
    rows, _ = load_prompts([path], strict, 100, on_bad_row="skip", report=lines.append)
    assert len(rows) == 1
    assert lines[0] == "skipped 1 bad row(s):"


def test_too_few_prompts_say_what_to_do(tmp_path):
    bad = write(tmp_path / "bad.jsonl", [{"answer": "1"}])
    with pytest.raises(DataError, match="prompt: is missing"):
        load(bad)
    with pytest.raises(DataError, match="every row was skipped"):
        load(bad, on_bad_row="skip")
    with pytest.raises(DataError, match=r"one prompt cannot be split .* --valid_fraction 0"):
        load(questions(tmp_path / "one.jsonl", 1), valid_fraction=0.1)


def test_the_description_names_lengths_and_answers(tmp_path):
    rows, _ = load(write(tmp_path / "a.jsonl", [{"prompt": "hi", "answer": "x"}, {"prompt": "hi there"}]))
    short, long = sorted(len(prompt) for prompt in rows.prompts)
    assert rows.describe() == f"2 prompts of {short} to {long} tokens, 1 of them with an answer"
