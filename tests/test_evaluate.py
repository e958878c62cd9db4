"""Scoring and evaluation: packing and windows change no score, and each task computes what it says."""

import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from example_tokenizers import TOKENIZER, spaced_tokenizer
from hypothesis import given
from hypothesis import strategies as st

import train.evaluate
from minillm_jax.config import ModelConfig
from minillm_jax.data.records import ChoiceRecord, ExactRecord, PairsRecord, PretrainRecord
from minillm_jax.evaluation import (
    calibration_error,
    encode_choices,
    evaluate_choice,
    evaluate_exact,
    evaluate_lm,
    evaluate_pairs,
    final_answer,
    preference_metrics,
)
from minillm_jax.lm import Completion, LanguageModel
from minillm_jax.model import forward, init_params
from minillm_jax.scoring import Scores, score_sequences, split_windows
from minillm_jax.tokenizer import encode_document
from train.evaluate import main, trained_window

CONFIG = ModelConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=24,
    initializer_range=0.5,
)
MOE = dataclasses.replace(CONFIG, use_moe=True, num_experts=3, moe_intermediate_size=16)
T = 24


def random_model(config):
    return LanguageModel(config, init_params(config, jax.random.key(0)), TOKENIZER)


def uniform_model():
    shapes = jax.eval_shape(lambda key: init_params(CONFIG, key), jax.random.key(0))
    return LanguageModel(CONFIG, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), TOKENIZER)


def score_alone(lm, ids, first=1):
    """Log-likelihood of ids[first:], from one plain forward pass in a row of T + 8 tokens."""
    tokens = np.zeros((1, T + 8), np.int32)
    tokens[0, : len(ids)] = ids
    logits = np.asarray(forward(lm.params, lm.config, tokens)[0], np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return sum(logprobs[i - 1, ids[i]] for i in range(first, len(ids)))


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


@pytest.mark.parametrize("config", [CONFIG, MOE], ids=["dense", "moe"])
def test_packed_sequences_score_as_alone(config):
    lm = random_model(config)
    rng = np.random.default_rng(0)
    sequences = [(rng.integers(0, config.vocab_size, n), 1 + i % 5) for i, n in enumerate([*range(1, T + 2), 3])]
    scores = score_sequences(lm, sequences, max_seq_len=T, batch_size=2)
    expected = [score_alone(lm, ids, first) for ids, first in sequences]
    np.testing.assert_allclose(scores.logprobs, expected, rtol=1e-5, atol=1e-5)
    assert scores.tokens.tolist() == [max(0, len(ids) - first) for ids, first in sequences]
    assert scores.longer_than_window == 0
    assert len(set(np.round(expected, 3))) > 20  # scores differ, so a mix-up would show


def test_shorter_rows_for_short_sequences_change_no_score():
    lm = random_model(CONFIG)
    sequences = [(np.random.default_rng(n).integers(0, CONFIG.vocab_size, n), 1) for n in range(2, T)]
    scores = score_sequences(lm, sequences, max_seq_len=300, batch_size=1)  # two rows of 128
    np.testing.assert_allclose(scores.logprobs, [score_alone(lm, ids) for ids, _ in sequences], rtol=1e-5)


def test_a_long_sequence_scores_as_the_sum_of_its_windows():
    lm = random_model(CONFIG)
    ids = np.random.default_rng(1).integers(0, CONFIG.vocab_size, 2 * T + 10)
    apart = score_sequences(lm, [(ids, 1)], max_seq_len=T, batch_size=2)
    pieces = [ids[: T + 1], ids[T : 2 * T + 1], ids[2 * T :]]
    assert apart.logprobs[0] == pytest.approx(sum(score_alone(lm, piece) for piece in pieces), rel=1e-5)
    assert (apart.tokens[0], apart.processed, apart.longer_than_window) == (2 * T + 9, 2 * T + 9, 1)

    overlapping = score_sequences(lm, [(ids, 1)], max_seq_len=T, batch_size=2, stride=12)
    windows = [(0, 25, 1), (12, 37, 25), (24, 49, 37), (36, 58, 49)]  # start, stop, first scored
    expected = sum(score_alone(lm, ids[start:stop], first - start) for start, stop, first in windows)
    assert overlapping.logprobs[0] == pytest.approx(expected, rel=1e-5)
    assert overlapping.logprobs[0] != pytest.approx(apart.logprobs[0], rel=1e-3)
    assert (overlapping.tokens[0], overlapping.processed) == (57, 24 + 24 + 24 + 21)


def test_a_long_context_loses_its_beginning():
    lm = random_model(CONFIG)
    ids = np.random.default_rng(2).integers(0, CONFIG.vocab_size, T + 20)
    first = len(ids) - 4
    scores = score_sequences(lm, [(ids, first)], max_seq_len=T, batch_size=2)
    kept = ids[-T - 1 :]
    assert scores.logprobs[0] == pytest.approx(score_alone(lm, kept, len(kept) - 4), rel=1e-5)
    assert scores.longer_than_window == 1


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), max_size=6), st.integers(1, 12), st.data())
def test_windows_score_each_token_once_and_fit(sequences, max_seq_len, data):
    stride = data.draw(st.integers(1, max_seq_len))
    windows = split_windows([n for n, _ in sequences], [first for _, first in sequences], max_seq_len, stride)
    scored = []
    for sequence, start, stop, first in zip(windows.sequence, windows.start, windows.stop, windows.first, strict=True):
        assert 0 <= start < first < stop <= start + max_seq_len + 1
        scored += [(sequence, i) for i in range(first, stop)]
    assert scored == [(i, j) for i, (n, first) in enumerate(sequences) for j in range(first, n)]


def test_impossible_scoring_requests_are_refused():
    with pytest.raises(ValueError, match="nothing predicts the first token"):
        score_sequences(uniform_model(), [([1, 2], 0)], max_seq_len=T, batch_size=2)
    with pytest.raises(ValueError, match="stride must lie between 1 and max_seq_len"):
        score_sequences(uniform_model(), [([1, 2], 1)], max_seq_len=T, batch_size=2, stride=T + 1)


# ---------------------------------------------------------------------------------------------------------------------
# lm


def test_a_uniform_model_needs_log_v_for_each_token():
    texts = ["times ", "", "久 so on, in 1859. " * 9]
    records = [PretrainRecord("f", i, text) for i, text in enumerate(texts)]
    lm = uniform_model()
    result = evaluate_lm(records, TOKENIZER, lambda spans: score_sequences(lm, spans, max_seq_len=T, batch_size=2))
    tokens = sum(len(encode_document(TOKENIZER, text)) - 1 for text in texts)
    size = 6 + 9 * 20
    assert (result["tokens"], result["bytes"], result["documents"]) == (tokens, size, 3)
    assert result["perplexity"] == pytest.approx(CONFIG.vocab_size, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(tokens * math.log2(CONFIG.vocab_size) / size, rel=1e-6)
    assert result["loss"] == pytest.approx(math.log(CONFIG.vocab_size), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# choice


def fixed_scores(*logprobs):
    return lambda spans: Scores(np.asarray(logprobs, np.float64), np.ones(len(spans), np.int64), 10, 0)


def choice(*choices, gold, query="q"):
    return ChoiceRecord("f", 1, query, choices, gold)


@pytest.mark.parametrize(
    ("choices", "gold", "logprobs", "normalized", "plain"),
    [
        (("ab", "abcdef"), 1, (-2.0, -3.0), 1.0, 0.0),  # -1 and -0.5 per byte
        (("ab", "abcdef"), 0, (-2.0, -3.0), 0.0, 1.0),
        (("久", "ab"), 0, (-3.0, -2.5), 1.0, 0.0),  # a byte counts, not a character: -1 and -1.25
        (("ab", "cd"), 0, (-2.0, -2.0), 0.0, 0.0),  # a tie is wrong
        (("", "ab"), 0, (-1.0, -3.0), 1.0, 1.0),
    ],
)
def test_choices_compare_by_byte_and_by_sum(choices, gold, logprobs, normalized, plain):
    result = evaluate_choice([choice(*choices, gold=gold)], TOKENIZER, fixed_scores(*logprobs))
    assert (result["accuracy"], result["accuracy_unnormalized"]) == (normalized, plain)


def test_choice_accuracy_is_over_rows_with_different_numbers_of_choices():
    records = [choice("a", "b", gold=1), choice("a", "b", "c", gold=0), choice("a", gold=0)]
    result = evaluate_choice(records, TOKENIZER, fixed_scores(-2, -1, -2, -1, -3, -9))
    assert result["accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, spaced_tokenizer()], ids=["byte-level", "invented space"])
def test_scored_tokens_are_those_of_the_choice(tokenizer):
    spans = encode_choices(tokenizer, [choice("times", "worst times", gold=0, query="It was the best of")])
    for (ids, first), text in zip(spans, ["times", "worst times"], strict=True):
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == f"It was the best of {text}"
        assert ids[1:first] == tokenizer.encode("It was the best of")


def characters(merge):
    """A tokenizer of characters, but for one string that is a single token, 999."""

    def encode(text):
        return [i for piece in text.split(merge) for i in [999, *map(ord, piece)]][1:]

    return SimpleNamespace(bos_token_id=1, encode_batch=lambda texts: [encode(text) for text in texts])


def test_a_query_that_merges_with_one_choice_is_rescored_for_all():
    spans = encode_choices(characters("q x"), [choice("x", "y", gold=0, query="pq"), choice("y", gold=0, query="pq")])
    assert spans == [
        ([1, ord("p"), 999], 2),
        ([1, ord("p"), ord("q"), ord(" "), ord("y")], 2),  # from "q" on, as for the choice above
        ([1, ord("p"), ord("q"), ord(" "), ord("y")], 3),
    ]


def test_at_least_one_token_is_scored():
    spaceless = SimpleNamespace(bos_token_id=1, encode_batch=lambda texts: [list(map(ord, t.strip())) for t in texts])
    assert encode_choices(spaceless, [choice("", gold=0, query="ab")]) == [([1, ord("a"), ord("b")], 2)]
    (ids, first), _ = encode_choices(TOKENIZER, [choice("a", "b", gold=0, query="")])
    assert (TOKENIZER.decode(ids), first) == (TOKENIZER.decode([TOKENIZER.bos_token_id]) + " a", 1)


# ---------------------------------------------------------------------------------------------------------------------
# pairs


def test_pairs_compare_sums_and_report_each_task():
    tasks = ["b", "b", "a", None]
    records = [PairsRecord("f", 1, "good one", "bad", task) for task in tasks]
    seen = []

    def score(spans):
        seen.extend(spans)
        return fixed_scores(-1, -2, -2, -1, -3, -3.5, -4, -4)(spans)

    result = evaluate_pairs(records, TOKENIZER, score)
    assert result["accuracy"] == 0.5  # the last pair is a tie
    assert result["accuracy_by_task"] == {"a": 1.0, "b": 0.5}
    assert seen[0] == ([TOKENIZER.bos_token_id, *TOKENIZER.encode("good one")], 1)
    assert seen[1] == ([TOKENIZER.bos_token_id, *TOKENIZER.encode("bad")], 1)
    assert "accuracy_by_task" not in evaluate_pairs(records[-1:], TOKENIZER, fixed_scores(-1, -2))


# ---------------------------------------------------------------------------------------------------------------------
# exact


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (" 4\n", "4"),
        ("<think>\n2+2\n</think>\n<answer>\n4\n</answer>", "4"),
        ("<answer>3</answer> no, <answer>4</answer>.", "4"),
        ("<think>hm</think>\n\n4", "4"),
        ("<answer>4", "<answer>4"),
    ],
)
def test_final_answer_is_what_the_reply_offers(reply, answer):
    assert final_answer(reply) == answer


def test_exact_answers_each_prompt_in_batches_of_similar_length():
    records = [ExactRecord("f", i, f"p{i}", answer, family) for i, (answer, family) in enumerate(
        [("1", "odd"), (" 2 ", "even"), ("wrong", "odd"), ("4", None)]
    )]  # fmt: skip
    prompts = [[1] * 5, [2] * 2, [3] * 9, [4] * 7]
    batches, shown = [], []

    def complete(batch):
        batches.append([len(prompt) for prompt in batch])
        return [Completion(f" {prompt[0]}\n", [prompt[0], 0], [0.0, 0.0], "stop") for prompt in batch]

    result = evaluate_exact(records, prompts, complete, batch_size=3, show=shown.append)
    assert batches == [[9, 7, 5], [2]]
    assert result == {"accuracy": 0.75, "accuracy_by_family": {"even": 1.0, "odd": 0.5}, "tokens_processed": 8}
    assert shown == [r"wrong: 'p2' → ' 3\n', expected 'wrong'"]


def test_only_a_few_wrong_answers_are_shown():
    records = [ExactRecord("f", i, "p", "a") for i in range(50)]
    shown = []
    replies = [Completion("b", [7], [0.0], "stop")]
    evaluate_exact(records, [[1]] * 50, lambda batch: replies * len(batch), batch_size=50, show=shown.append)
    assert len(shown) == 5


def test_metrics_of_pairs_count_ties_as_wrong_and_equal_lengths_as_half():
    scores = np.asarray([[2.0, 1.0], [0.0, 3.0], [1.0, 1.0], [5.0, 1.0]], np.float32)
    lengths = np.asarray([[3, 2], [2, 2], [1, 4], [9, 1]])
    found = preference_metrics(scores, lengths, calibration=True)
    p = 1 / (1 + np.exp([-1.0, 3.0, 0.0, -4.0]))
    assert found["accuracy"] == 0.5 and found["margin"] == 0.5 and found["rows"] == 4
    assert found["longer_accuracy"] == (1 + 0.5 + 0 + 1) / 4
    assert found["brier"] == pytest.approx(np.mean((1 - p) ** 2))
    assert preference_metrics(scores, lengths, calibration=False).keys() == found.keys() - {
        "brier",
        "calibration_error",
    }


def test_calibration_error_is_the_gap_between_sure_and_right():
    margin = math.log(0.72 / 0.28)  # 72 % sure
    assert calibration_error(np.asarray([margin] * 72 + [-margin] * 28)) == pytest.approx(0, abs=1e-12)
    assert calibration_error(np.asarray([margin] * 50 + [-margin] * 50)) == pytest.approx(0.22)
    assert calibration_error(np.asarray([0.0, 0.0])) == 0
    assert calibration_error(np.asarray([1e4, -1e4, 1e4, 1e4])) == pytest.approx(0.25)
    # two bins that err in opposite ways do not cancel: 62 % sure and always right, 88 % sure and always wrong
    a, b = math.log(0.62 / 0.38), math.log(0.88 / 0.12)
    assert calibration_error(np.asarray([a, -b])) == pytest.approx((0.38 + 0.88) / 2)


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run `train.evaluate` on some rows, the model at any path being `lm`."""

    def run(task, rows, *flags, lm=None, status=0):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        monkeypatch.setattr(train.evaluate, "load", lambda _, mesh: lm or random_model(CONFIG))
        argv = ["--model_path", str(tmp_path / "run"), "--data_path", str(path), "--task", task]
        argv += ["--batch_size", "2", "--max_seq_len", str(T), "--max_new_tokens", "4", *flags]
        if status:
            with pytest.raises(SystemExit) as caught:
                main(argv)
            assert caught.value.code == status
        else:
            assert main(argv) == 0
        out, err = capsys.readouterr()
        return (json.loads(out.splitlines()[-1]) if out else None), err

    return run


ROWS = {
    "lm": [{"text": "It was the best of times"}, {"text": "x"}],
    "choice": [{"query": "It was", "choices": ["the best", "so on"], "gold": 0}],
    "pairs": [{"good": "It was", "bad": "was It", "task": "order"}],
    "exact": [{"prompt": "1+1", "answer": "2", "family": "add"}],
}


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("lm", {"bits_per_byte", "perplexity", "loss", "tokens", "bytes", "documents"}),
        ("choice", {"accuracy", "accuracy_unnormalized"}),
        ("pairs", {"accuracy", "accuracy_by_task"}),
        ("exact", {"accuracy", "accuracy_by_family"}),
    ],
)
def test_the_last_line_is_one_json_object(command, tmp_path, task, names):
    file = tmp_path / "new" / "result.json"
    result, _ = command(task, ROWS[task], "--out_file", str(file))
    assert names < result.keys()
    shared = {"task": task, "model_path": str(tmp_path / "run"), "data_path": [str(tmp_path / "rows.jsonl")]}
    assert shared.items() <= result.items()
    assert (result["rows"], result["skipped_rows"]) == (len(ROWS[task]), 0)
    assert result["seconds"] > 0 and result["tokens_per_second"] > 0
    assert json.loads(file.read_text()) == result


def test_limit_uses_the_first_rows(command):
    assert command("lm", ROWS["lm"], "--limit", "1")[0]["bytes"] == len(ROWS["lm"][0]["text"])


def test_a_bad_row_stops_or_is_counted(command):
    rows = [*ROWS["lm"], {"text": 5}]
    _, err = command("lm", rows, status=2)
    assert "rows.jsonl:3: text: must be a string, not the number 5" in err.replace("\n", "")
    result, err = command("lm", rows, "--on_bad_row", "skip")
    assert (result["rows"], result["skipped_rows"]) == (2, 1)
    assert "1 x text: must be a string" in err


@pytest.mark.parametrize(
    ("task", "rows", "flags", "message"),
    [
        ("lm", [{"text": 5}], ["--on_bad_row", "skip"], "every row was skipped"),
        ("lm", [{"text": ""}], [], "every text is empty"),
        ("lm", ROWS["lm"], ["--max_seq_len", "64", "--stride", "65"], "--stride 65 is more than a window of 64"),
        ("lm", ROWS["lm"], ["--max_seq_len", "99999999"], "is more than the 32768 positions"),
        ("lm", ROWS["lm"], ["--limit", "0"], "--limit must be at least 1, not 0"),
    ],
)
def test_impossible_requests_say_what_is_wrong(command, task, rows, flags, message):
    assert message in command(task, rows, *flags, status=2)[1].replace("\n", " ")


def test_parameters_that_are_not_finite_are_an_error(command):
    lm = random_model(CONFIG)
    broken = dataclasses.replace(lm, params=jax.tree.map(lambda x: x * np.nan, lm.params))
    assert "not finite" in command("lm", ROWS["lm"], lm=broken, status=2)[1]


def test_a_prompt_without_room_for_an_answer_is_a_bad_row(command):
    lm = random_model(CONFIG)
    short = dataclasses.replace(lm, config=dataclasses.replace(CONFIG, max_position_embeddings=64))
    rows = [{"prompt": "x " * 90, "answer": "x"}, *ROWS["exact"]]
    assert "rows.jsonl:1: prompt: leaves the model no room" in command("exact", rows, lm=short, status=2)[1]
    result, _ = command("exact", rows, "--on_bad_row", "skip", lm=short)
    assert (result["rows"], result["skipped_rows"]) == (1, 1)


def test_the_window_is_the_one_of_training(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "7").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"data": {"max_seq_len": 96}}))
    for folder in (run, run / "checkpoints", run / "checkpoints" / "7"):
        assert trained_window(str(folder)) == 96
    (run / "config.json").write_text(json.dumps({"hidden_size": 8}))
    assert trained_window(str(run)) is None
    assert trained_window(str(tmp_path / "none")) is None
