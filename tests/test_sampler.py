"""Generation against the plain forward pass: alone and in a batch, endings, stop strings, streams and limits."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minillm_jax.lm
from minillm_jax.config import ModelConfig
from minillm_jax.lm import LanguageModel, generate, stream
from minillm_jax.model import forward, init_params
from minillm_jax.sampler import (
    CHUNK,
    SHRINKING_CHUNK,
    bucket,
    check_prompts,
    decode_stream,
    equal_neighbours,
    row_keys,
)
from minillm_jax.sampling import SamplingParams
from minillm_jax.tokenizer import Tokenizer, train_tokenizer

TOKENIZER = train_tokenizer(["the cat sat on the mat", "a dog ran after the cat", "naïve 世界 🎉"], vocab_size=300)
CONTEXT = 32  # prompts share the bucket of this length, so that each batch size is compiled once
DENSE = ModelConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=32,
    max_position_embeddings=CONTEXT,
    initializer_range=0.2,
)
MOE = dataclasses.replace(DENSE, use_moe=True, num_experts=3)
PROMPTS = [[1, 70, 71, 72, 73], [1], [9, 200, 31, 31, 5, 60, 17, 18, 19, 250, 90]]
NEW = 20  # more than a chunk, and no multiple of one
GREEDY = SamplingParams(max_new_tokens=NEW, temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(max_new_tokens=NEW, top_p=0.9, ignore_eos=True)
PENALISED = dataclasses.replace(SAMPLED, temperature=0.7, top_k=50, repetition_penalty=1.3)


def random_model(config: ModelConfig) -> LanguageModel:
    return LanguageModel(config, jax.jit(init_params, static_argnums=0)(config, jax.random.key(0)), TOKENIZER)


@pytest.fixture(scope="module")
def dense():
    return random_model(DENSE)


@pytest.fixture(scope="module")
def moe():
    return random_model(MOE)


def next_logits(lm: LanguageModel, tokens: list[int]) -> np.ndarray:
    """Logits `[T, V]` after each token; later tokens change nothing, so rows are padded to one length."""
    padded = np.zeros((1, CONTEXT), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(forward(lm.params, lm.config, padded))[0, : len(tokens)]


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_greedy_tokens_are_the_argmax_of_full_forward_passes(model, request):
    lm = request.getfixturevalue(model)
    for prompt, completion in zip(PROMPTS, generate(lm, PROMPTS, GREEDY), strict=True):
        tokens = list(prompt)
        for _ in range(NEW):
            tokens.append(int(next_logits(lm, tokens)[-1].argmax()))
        assert completion.token_ids == tokens[len(prompt) :]
        assert completion.finish_reason == "length"
        assert completion.text == TOKENIZER.decode(completion.token_ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("model", "sampling"),
    [("dense", GREEDY), ("dense", SAMPLED), ("dense", PENALISED), ("moe", GREEDY), ("moe", SAMPLED)],
    ids=["dense-greedy", "dense-sampled", "dense-penalised", "moe-greedy", "moe-sampled"],
)
def test_prompts_in_one_batch_give_what_each_gives_alone(model, sampling, request):
    lm = request.getfixturevalue(model)
    together = generate(lm, PROMPTS, sampling, seed=3)
    for prompt, completion in zip(PROMPTS, together, strict=True):
        (alone,) = generate(lm, [prompt], sampling, seed=3)
        assert (alone.token_ids, alone.text) == (completion.token_ids, completion.text)
        np.testing.assert_allclose(alone.logprobs, completion.logprobs, atol=1e-5)


@pytest.mark.parametrize("sampling", [SAMPLED, PENALISED], ids=["sampled", "penalised"])
def test_logprobs_are_those_of_the_model_itself(dense, sampling):
    for prompt, completion in zip(PROMPTS, generate(dense, PROMPTS, sampling), strict=True):
        logits = next_logits(dense, [*prompt, *completion.token_ids])[len(prompt) - 1 : -1]
        expected = jax.nn.log_softmax(logits)[jnp.arange(NEW), jnp.asarray(completion.token_ids)]
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-5)


def test_a_seed_decides_and_every_copy_of_a_prompt_draws_for_itself(dense):
    first, second, third = (c.token_ids for c in generate(dense, [PROMPTS[0]] * 3, SAMPLED, seed=1))
    assert first != second and second != third and third != first
    assert [c.token_ids for c in generate(dense, [PROMPTS[0]] * 3, SAMPLED, seed=1)] == [first, second, third]
    assert generate(dense, [PROMPTS[0]] * 3, SAMPLED, seed=2)[0].token_ids != first


def test_different_prompts_and_copies_get_different_keys():
    keys = jax.random.key_data(row_keys([[1, 2], [1, 3], [1, 2], [2, 1]], seed=0))
    assert len({tuple(key) for key in np.asarray(keys).tolist()}) == 4


def test_greedy_repetition_penalty_equals_penalised_forward_passes(dense):
    sampling = dataclasses.replace(GREEDY, repetition_penalty=1.7)
    for prompt, completion in zip(PROMPTS, generate(dense, PROMPTS, sampling), strict=True):
        tokens = list(prompt)
        for _ in range(NEW):
            logits = next_logits(dense, tokens)[-1]
            seen = np.isin(np.arange(DENSE.vocab_size), tokens)
            tokens.append(int(np.where(seen, np.where(logits > 0, logits / 1.7, logits * 1.7), logits).argmax()))
        assert completion.token_ids == tokens[len(prompt) :]


def ending_with(lm: LanguageModel, token_id: int) -> LanguageModel:
    """The same model with another end token."""
    config = json.loads(TOKENIZER.config_json) | {"eos_token": TOKENIZER.id_to_token(token_id)}
    tokenizer = Tokenizer(TOKENIZER.tokenizer_json, json.dumps(config))
    assert tokenizer.eos_token_id == token_id
    return dataclasses.replace(lm, tokenizer=tokenizer)


def test_the_end_token_ends_its_row_alone(dense):
    free = [c.token_ids for c in generate(dense, PROMPTS, SAMPLED)]
    end = next(token for token in free[0][3:] if free[0].index(token) >= 3)
    lm, sampling = ending_with(dense, end), dataclasses.replace(SAMPLED, ignore_eos=False)
    for tokens, completion in zip(free, generate(lm, PROMPTS, sampling), strict=True):
        stops = end in tokens
        assert completion.token_ids == (tokens[: tokens.index(end) + 1] if stops else tokens)
        assert len(completion.logprobs) == len(completion.token_ids)
        assert completion.finish_reason == ("stop" if stops else "length")
        shown = completion.token_ids[:-1] if stops else completion.token_ids
        assert completion.text == TOKENIZER.decode(shown, skip_special_tokens=True)
    assert [c.token_ids for c in generate(lm, PROMPTS, SAMPLED)] == free  # ignore_eos


def test_each_prompt_gets_the_room_that_its_own_length_leaves(dense):
    long = [5] * (CONTEXT - 4)
    assert check_prompts([long, *PROMPTS[:2]], DENSE, NEW).tolist() == [4, NEW, NEW]
    cut, whole, _ = generate(dense, [long, *PROMPTS[:2]], GREEDY)
    assert (len(cut.token_ids), len(cut.logprobs), cut.finish_reason) == (4, 4, "length")
    (alone,) = generate(dense, [PROMPTS[0]], GREEDY)
    assert whole.token_ids == alone.token_ids


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 1 is empty"),
        ([DENSE.vocab_size], "outside the vocabulary"),
        ([-1], "outside the vocabulary"),
        ([5] * CONTEXT, "no room for an answer"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(dense, prompt, message):
    with pytest.raises(ValueError, match=message):
        generate(dense, [[1], prompt], GREEDY)


def test_no_prompts_give_no_completions(dense):
    assert generate(dense, []) == []


def test_text_begins_like_a_document_and_forges_no_control_token(dense):
    text = "the <|im_end|> cat"
    ids = [TOKENIZER.bos_token_id, *TOKENIZER.encode(text)]
    assert TOKENIZER.eos_token_id not in ids
    assert generate(dense, [text], GREEDY) == generate(dense, [ids], GREEDY)


@given(st.integers(1, 5000), st.sampled_from([1, 32]))
def test_buckets_hold_the_length_and_waste_at_most_half(length, smallest):
    assert length <= bucket(length, smallest) <= max(smallest, 1.5 * length)


def test_streamed_pieces_add_up_to_the_completion(dense):
    pieces, completion = drain(stream(dense, PROMPTS[0], SAMPLED, seed=5))
    assert len(pieces) == 2  # a chunk, and the rest
    assert [completion] == generate(dense, [PROMPTS[0]], SAMPLED, seed=5)
    assert "".join(pieces) == completion.text


# --- Endings, with a model that says what it is told -------------------------------------------------------------


def drain(generator):
    """All pieces of a stream, and the completion it returns."""
    pieces = []
    while True:
        try:
            pieces.append(next(generator))
        except StopIteration as end:
            return pieces, end.value


def scripted(monkeypatch, ids: list[int], chunk: int) -> LanguageModel:
    """A language model that draws `ids`, `chunk` at a time."""

    def decode_stream(params, config, prompts, sampling, eos_token_ids, *, seed, compute):
        for start in range(0, len(ids), chunk):
            tokens = np.asarray([ids[start : start + chunk]], np.int32)
            yield tokens, np.zeros(tokens.shape, np.float32)

    monkeypatch.setattr(minillm_jax.lm, "decode_stream", decode_stream)
    return LanguageModel(DENSE, {}, TOKENIZER)


@given(
    text=st.text(alphabet="aab世🎉 ", max_size=20),
    stops=st.lists(st.text(alphabet="aab世🎉 ", min_size=1, max_size=4), max_size=3),
    chunk=st.integers(1, 7),
)
def test_streams_cut_at_the_first_stop_string_and_never_break_a_character(text, stops, chunk):
    with pytest.MonkeyPatch.context() as patch:
        lm = scripted(patch, TOKENIZER.encode(text), chunk)
        pieces, completion = drain(stream(lm, [1], SamplingParams(stop=stops)))
    # Stop strings are looked for as characters arrive, so the one that is complete first wins.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    complete = min((end for end, _ in ends), default=None)
    assert completion.finish_reason == ("length" if complete is None else "stop")
    assert "".join(pieces) == completion.text
    assert "�" not in completion.text
    assert text.startswith(completion.text)
    assert not any(stop in completion.text for stop in stops)
    if complete is None:
        assert completion.text == text
    else:
        assert len(completion.text) in {at for _, at in ends}


def test_a_stop_string_may_span_tokens_and_chunks(monkeypatch):
    ids = [i for word in ("one ", "two ", "ST", "O", "P", " three") for i in TOKENIZER.encode(word)]
    lm = scripted(monkeypatch, ids, chunk=2)
    pieces, completion = drain(stream(lm, [1], SamplingParams(stop="STOP")))
    assert completion.text == "".join(pieces) == "one two "
    assert completion.finish_reason == "stop"
    assert completion.token_ids == ids[: len(completion.token_ids)]
    assert TOKENIZER.decode(completion.token_ids) == "one two STOP"


def test_what_might_begin_a_stop_string_is_held_back_until_it_does_not(monkeypatch):
    lm = scripted(monkeypatch, TOKENIZER.encode("a SSTx"), chunk=1)
    pieces, completion = drain(stream(lm, [1], SamplingParams(stop="STOP")))
    assert completion.text == "".join(pieces) == "a SSTx"
    assert all("S" not in piece or piece.endswith(("S", "x")) for piece in pieces)
    assert pieces[-1].endswith("STx")


def test_half_a_character_at_the_end_becomes_the_replacement_character(monkeypatch):
    lm = scripted(monkeypatch, [*TOKENIZER.encode("a"), *TOKENIZER.encode("é")[:1]], chunk=CHUNK)
    pieces, completion = drain(stream(lm, [1], SamplingParams()))
    assert completion.text == "".join(pieces) == "a�"


@pytest.mark.parametrize(("runs", "copies"), [([4, 4], 4), ([2, 4, 6], 2), ([3, 4], 1), ([1, 1], 1), ([6], 6)])
def test_prompts_that_come_several_times_are_read_once(runs, copies):
    prompts = [[i + 1, 7] for i, count in enumerate(runs) for _ in range(count)]
    assert equal_neighbours(prompts) == copies


def test_copies_side_by_side_are_completed_like_copies_far_apart(dense):
    order = [0, 2, 1, 0, 1, 2]
    apart = generate(dense, [PROMPTS[i] for i in order], SAMPLED, seed=4)
    together = generate(dense, [prompt for prompt in PROMPTS for _ in range(2)], SAMPLED, seed=4)
    assert [apart[i].token_ids for i in (0, 3, 2, 4, 1, 5)] == [completion.token_ids for completion in together]


def test_leaving_ended_rows_behind_changes_nothing(dense):
    prompts = [[1, token] for token in range(40, 57)]
    ends = list(range(0, dense.config.vocab_size, 7))  # most rows end soon
    sampling = SamplingParams(max_new_tokens=29)

    def drawn(shrink):
        chunks = list(decode_stream(dense.params, dense.config, prompts, sampling, ends, seed=5, shrink=shrink))
        return (np.concatenate(parts, axis=1) for parts in zip(*chunks, strict=True))

    (tokens, logprobs), (left, left_logprobs) = drawn(False), drawn(True)
    assert (tokens[:, SHRINKING_CHUNK] >= 0).sum() <= 24 // 4 and (tokens[:, SHRINKING_CHUNK:] >= 0).any()
    width = min(tokens.shape[1], left.shape[1])
    assert (tokens[:, width:] == -1).all() and (left[:, width:] == -1).all()
    assert (tokens[:, :width] == left[:, :width]).all()
    difference = np.abs(logprobs[:, :width] - left_logprobs[:, :width])
    assert difference[tokens[:, :width] >= 0].max() < 1e-4
