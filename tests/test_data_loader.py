import json
import math
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest

from minillm_jax.data import Batch, DataError, TokenRows, eval_batches, load_rows, make_iterator
from minillm_jax.data.loader import held_out_mask
from minillm_jax.tokenizer import Tokenizer, train_tokenizer

SEQ_LEN = 16
ARRAYS = {"tokens", "targets", "weights", "segment_ids", "positions"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat sat on the mat 0123456789"] * 3, vocab_size=290)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MINILLM_CACHE", str(tmp_path / "cache"))


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_texts(path: Path, count: int, word: str = "cat") -> str:
    return write_rows(path, [{"text": f"{word} {i} " + "sat on the mat " * (i % 5)} for i in range(count)])


def chat(question: str, answer: str) -> dict:
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def load(*paths: str, tokenizer: Tokenizer, kind: str = "pretrain", **options) -> tuple[TokenRows, TokenRows | None]:
    return load_rows(
        paths, kind, tokenizer, options.pop("seq_len", SEQ_LEN), **({"report": lambda line: None} | options)
    )


def texts_of(rows: TokenRows, tokenizer: Tokenizer) -> list[str]:
    """Decode every document of some rows."""
    store = rows.documents
    places = zip(store.chunk, store.start, store.length, strict=True)
    return [tokenizer.decode(store.tokens[c][s : s + n].tolist(), skip_special_tokens=True) for c, s, n in places]


def row_keys(batch: Batch) -> list[bytes]:
    return [tokens.tobytes() + ids.tobytes() for tokens, ids in zip(batch["tokens"], batch["segment_ids"], strict=True)]


def pairs(batches: list[Batch]) -> Counter:
    found: Counter = Counter()
    for batch in batches:
        real = batch["segment_ids"] > 0
        found.update(zip(batch["tokens"][real].tolist(), batch["targets"][real].tolist(), strict=True))
    return found


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys() == ARRAYS
        for name in ARRAYS:
            np.testing.assert_array_equal(one[name], other[name])


def test_rows_hold_every_pair_of_every_text_once(tmp_path, tokenizer):
    path = write_texts(tmp_path / "a.jsonl", 50)
    rows, valid = load(path, tokenizer=tokenizer)
    expected: Counter = Counter()
    for line in Path(path).read_text().splitlines():
        ids = [tokenizer.bos_token_id, *tokenizer.encode(json.loads(line)["text"]), tokenizer.eos_token_id]
        expected.update(pairwise(ids))
    assert valid is None
    assert pairs(list(eval_batches(rows, 7))) == expected
    assert rows.tokens == rows.trained_tokens == expected.total()


def test_a_batch_has_the_promised_shapes_and_types(tmp_path, tokenizer):
    rows, _ = load(write_texts(tmp_path / "a.jsonl", 30), tokenizer=tokenizer)
    batch = next(make_iterator(rows, 4, seed=0))
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        name: ((4, SEQ_LEN), "float32" if name == "weights" else "int32") for name in ARRAYS
    }
    assert all(array.shape == (SEQ_LEN,) for array in rows[0].values())


def test_each_epoch_holds_each_row_once_in_another_order(tmp_path, tokenizer):
    rows, _ = load(write_texts(tmp_path / "a.jsonl", 60), tokenizer=tokenizer)
    stream = (key for batch in make_iterator(rows, 4, seed=1) for key in row_keys(batch))
    epochs = [list(islice(stream, len(rows))) for _ in range(3)]
    everything = Counter(row_keys(rows.gather(range(len(rows)))))
    assert len(rows) % 4  # so that batches run on from one epoch into the next
    assert all(Counter(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_seed_decides_the_order(tmp_path, tokenizer):
    rows, _ = load(write_texts(tmp_path / "a.jsonl", 60), tokenizer=tokenizer)
    first, again, other = (list(islice(make_iterator(rows, 4, seed), 5)) for seed in (1, 1, 2))
    assert_same(first, again)
    assert row_keys(first[0]) != row_keys(other[0])


@pytest.mark.parametrize("steps", [0, 3, 29])
def test_a_restored_iterator_continues_with_the_very_next_batch(tmp_path, tokenizer, steps):
    rows, _ = load(write_texts(tmp_path / "a.jsonl", 60), tokenizer=tokenizer)
    iterator = make_iterator(rows, 4, seed=1)
    for _ in range(steps):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = list(islice(iterator, 40))
    resumed = make_iterator(rows, 4, seed=1)
    resumed.set_state(state)
    assert_same(list(islice(resumed, 40)), expected)


def test_a_mixture_resumes_exactly_too(tmp_path, tokenizer):
    paths = [
        write_texts(tmp_path / f"{word}.jsonl", 40, word) + weight for word, weight in (("cat", ":3"), ("mat", ":1"))
    ]
    rows, _ = load(*paths, tokenizer=tokenizer)
    iterator = make_iterator(rows, 4, seed=1)
    list(islice(iterator, 17))
    state, expected = iterator.get_state(), list(islice(iterator, 20))
    resumed = make_iterator(rows, 4, seed=1)
    resumed.set_state(state)
    assert_same(list(islice(resumed, 20)), expected)


def test_processes_together_see_what_one_alone_sees(tmp_path, tokenizer):
    rows, _ = load(write_texts(tmp_path / "a.jsonl", 60), tokenizer=tokenizer)
    alone = list(islice(make_iterator(rows, 6, seed=1), 30))
    shares = [list(islice(make_iterator(rows, 6, 1, p, 3), 30)) for p in range(3)]
    for step, batch in enumerate(alone):
        assert all(share[step]["tokens"].shape == (2, SEQ_LEN) for share in shares)
        together = [key for share in shares for key in row_keys(share[step])]
        assert Counter(together) == Counter(row_keys(batch))


def test_processes_that_cannot_share_a_step_evenly_are_refused(tmp_path, tokenizer):
    rows, _ = load(write_texts(tmp_path / "a.jsonl", 10), tokenizer=tokenizer)
    with pytest.raises(DataError, match="5 rows a step cannot be shared evenly by 2 processes"):
        make_iterator(rows, 5, 0, 0, 2)


def test_weighted_paths_are_drawn_by_weight_and_never_share_a_row(tmp_path, tokenizer):
    a, b = write_texts(tmp_path / "a.jsonl", 100, "cat"), write_texts(tmp_path / "b.jsonl", 10, "dog")
    rows, _ = load(f"{a}:0.7", f"{b}:0.3", tokenizer=tokenizer)
    first, second = rows.shares
    assert (first.weight, second.weight, second.stop) == (0.7, 0.3, len(rows))
    keys = {key: i for i, key in enumerate(row_keys(rows.gather(range(len(rows)))))}
    drawn = [keys[key] for batch in islice(make_iterator(rows, 10, seed=0), 200) for key in row_keys(batch)]
    share = np.mean(np.array(drawn) >= second.first)
    assert share == pytest.approx(0.3, abs=0.01)
    alone = [load(path, tokenizer=tokenizer)[0] for path in (a, b)]
    assert sorted(keys) == sorted(key for rows in alone for key in row_keys(rows.gather(range(len(rows)))))
    seen = [i for i in drawn if i >= second.first]
    count = len(rows) - second.first
    epochs = [seen[k : k + count] for k in range(0, len(seen) - count, count)]
    assert len(epochs) > 5
    assert all(sorted(epoch) == list(range(second.first, len(rows))) for epoch in epochs)


def test_paths_without_weights_are_packed_together(tmp_path, tokenizer):
    a, b = write_texts(tmp_path / "a.jsonl", 20, "cat"), write_texts(tmp_path / "b.jsonl", 20, "dog")
    joint, _ = load(a, b, tokenizer=tokenizer)
    assert len(joint.shares) == 1
    separate = [load(path, tokenizer=tokenizer)[0] for path in (a, b)]
    assert joint.tokens == sum(rows.tokens for rows in separate)
    assert len(joint) <= sum(len(rows) for rows in separate)


def test_evaluation_sees_each_row_once_in_order_and_pads_the_last_batch(tmp_path, tokenizer):
    rows, _ = load(write_texts(tmp_path / "a.jsonl", 30), tokenizer=tokenizer)
    batches = list(eval_batches(rows, 8))
    assert len(batches) == math.ceil(len(rows) / 8)
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in ARRAYS}
    assert len(whole["tokens"]) == 8 * len(batches) > len(rows)
    assert_same([{name: array[: len(rows)] for name, array in whole.items()}], [rows.gather(range(len(rows)))])
    assert all(not array[len(rows) :].any() for array in whole.values())


def test_validation_documents_are_disjoint_complete_and_fixed_by_the_seed(tmp_path, tokenizer):
    path = write_texts(tmp_path / "a.jsonl", 200)
    (train, valid), (_, again), (_, other) = (
        load(path, tokenizer=tokenizer, valid_fraction=0.1, seed=seed) for seed in (0, 0, 1)
    )
    train_texts, valid_texts = texts_of(train, tokenizer), texts_of(valid, tokenizer)
    assert 5 <= len(valid_texts) <= 40
    assert not set(train_texts) & set(valid_texts)
    assert sorted(train_texts + valid_texts) == sorted(
        json.loads(x)["text"] for x in Path(path).read_text().splitlines()
    )
    assert texts_of(again, tokenizer) == valid_texts
    assert texts_of(other, tokenizer) != valid_texts


@pytest.mark.parametrize("fraction", [1e-9, 0.3, 1.0])
@pytest.mark.parametrize("count", [2, 3, 50])
def test_the_split_leaves_at_least_one_document_on_each_side(count, fraction):
    for seed in range(20):
        assert 1 <= held_out_mask(count, fraction, seed).sum() <= count - 1


def test_the_share_that_is_set_aside_is_the_share_asked_for():
    assert held_out_mask(100_000, 0.05, 0).mean() == pytest.approx(0.05, abs=0.003)


def test_appending_documents_moves_no_other_between_training_and_validation():
    np.testing.assert_array_equal(held_out_mask(1000, 0.1, 0), held_out_mask(1500, 0.1, 0)[:1000])


def test_one_document_cannot_be_split(tmp_path, tokenizer):
    path = write_texts(tmp_path / "a.jsonl", 1)
    with pytest.raises(DataError, match="one document cannot be split into training and validation"):
        load(path, tokenizer=tokenizer, valid_fraction=0.5)


def test_validation_files_are_used_instead_of_a_fraction(tmp_path, tokenizer):
    a, b = write_texts(tmp_path / "a.jsonl", 20, "cat"), write_texts(tmp_path / "b.jsonl", 5, "dog")
    train, valid = load(a, tokenizer=tokenizer, valid_path=[b], valid_fraction=0.5)
    assert (len(train.documents), len(valid.documents)) == (20, 5)
    assert all(text.startswith("dog") for text in texts_of(valid, tokenizer))


def test_long_conversations_are_cut_and_those_left_without_trained_tokens_are_counted(tmp_path, tokenizer):
    rows = [chat("the cat", "sat"), chat("the cat", "sat on the mat " * 30), chat("the cat sat " * 60, "yes")]
    lines: list[str] = []
    path = write_rows(tmp_path / "a.jsonl", rows)
    train, _ = load(path, tokenizer=tokenizer, kind="sft", seq_len=100, report=lines.append)
    assert len(train.documents) == 2
    assert train.documents.length.max() == 101
    assert "cut 2 conversations to 101 tokens; a larger --max_seq_len would keep them whole" in lines
    assert "left out 1 documents without a token to train on" in lines
    assert train.trained_tokens == sum(batch["weights"].sum() for batch in eval_batches(train, 2))


def test_another_row_length_reuses_the_tokens_and_cuts_anew(tmp_path, tokenizer):
    path, lines = write_rows(tmp_path / "a.jsonl", [chat("the cat", "sat on the mat " * 30)]), []
    short, _ = load(path, tokenizer=tokenizer, kind="sft", seq_len=100)
    long, _ = load(path, tokenizer=tokenizer, kind="sft", seq_len=1000, report=lines.append)
    assert (short.documents.length[0], short.tokens) == (101, 100)
    assert long.tokens > 150
    assert lines[0].startswith("reusing 1 tokenised documents of 1 file(s)")
    assert not any(line.startswith("cut") for line in lines)


def test_files_without_anything_to_train_on_are_an_error(tmp_path, tokenizer):
    empty = write_rows(tmp_path / "a.jsonl", [{"text": ""}])
    with pytest.raises(DataError) as caught:
        load(empty, tokenizer=tokenizer)
    assert str(caught.value) == f"{empty}: not one of its 1 usable rows holds a token to train on"


def test_the_screen_is_told_what_was_made_reused_skipped_and_how_full_rows_are(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "the cat"}, {"text": 1}, {"text": ""}, {"text": "the mat"}])
    first: list[str] = []
    second: list[str] = []
    rows, _ = load(path, tokenizer=tokenizer, on_bad_row="skip", report=first.append)
    load(path, tokenizer=tokenizer, on_bad_row="skip", report=second.append)
    folder = tmp_path / "cache" / "tokens"
    assert first[0].startswith("tokenised 3 documents of 1 file(s) in ")
    assert first[0].endswith(f"; cached in {folder}")
    assert second[0] == f"reusing 3 tokenised documents of 1 file(s) from {folder}"
    assert (
        first[1:]
        == second[1:]
        == [
            "skipped 1 bad row(s):",
            "  1 x text: must be a string",
            f"  the first: {path}:2: text: must be a string, not the number 1; write it in quotes",
            "left out 1 documents without a token to train on",
            f"training: {rows.describe()}",
        ]
    )
    tokens, fill = rows.tokens, rows.tokens / SEQ_LEN
    described = f"2 documents in 1 rows of 16: {tokens} tokens, {tokens} of them trained; rows are {fill:.1%} full"
    assert rows.describe() == described
