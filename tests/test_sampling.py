"""From logits to a token: filters against plain ones that sort, penalties by hand, and the frequencies of draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm_jax.sampling import (
    SamplingParams,
    categorical,
    filter_logits,
    penalize_repetition,
    sample,
    sampling_arrays,
)

VOCAB = 12
ROWS = 3  # one shape for all examples, so that each function is compiled once
DRAWS = 4096
filter_rows = jax.jit(filter_logits)
sample_rows = jax.jit(sample)

# Quarters repeat within a row, so ties are common; their softmax is far from every rounding error.
LOGITS = st.lists(st.integers(-20, 20).map(lambda n: n / 4), min_size=VOCAB, max_size=VOCAB)
SETTINGS = st.builds(
    SamplingParams,
    top_k=st.integers(0, VOCAB + 2),
    top_p=st.sampled_from([1.0, 0.97, 0.83, 0.61, 0.29, 0.003]),
    min_p=st.sampled_from([0.0, 0.013, 0.17, 0.43, 1.0]),
)


def kept_by_sorting(logits: np.ndarray, settings: SamplingParams) -> np.ndarray:
    """The tokens that top-k, then top-p, then min-p keep, ties with the last one included, in float64."""
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    ordered = np.sort(probs)[::-1]
    if 0 < settings.top_k < len(probs):
        probs = np.where(probs >= ordered[settings.top_k - 1], probs, 0)
    if settings.top_p < 1:
        ordered = np.sort(probs)[::-1]
        last = np.searchsorted(np.cumsum(ordered), settings.top_p * probs.sum() - 1e-9)
        probs = np.where(probs >= ordered[last], probs, 0)
    return (probs >= settings.min_p * probs.max() - 1e-9) & (probs > 0)


def sum_is_on_the_edge(logits: np.ndarray, settings: SamplingParams) -> bool:
    """Whether rounding decides where the nucleus ends."""
    probs = np.exp(logits - logits.max())
    kept = np.where(kept_by_sorting(logits, SamplingParams(top_k=settings.top_k)), probs, 0)
    sums = np.cumsum(np.sort(kept)[::-1]) / kept.sum()
    return bool(np.abs(sums - settings.top_p).min() < 1e-5) and settings.top_p < 1


def filtered(logits: list[float], **settings) -> list[int]:
    """Indices of the tokens kept of one row."""
    row = np.full((ROWS, VOCAB), -1e9, np.float32)  # the rest is too unlikely to count
    row[:, : len(logits)] = logits
    result = filter_rows(row, sampling_arrays([SamplingParams(**settings)] * ROWS))
    return np.flatnonzero(np.isfinite(result[0])).tolist()


@given(st.lists(st.tuples(LOGITS, SETTINGS), min_size=ROWS, max_size=ROWS))
def test_filters_equal_filters_that_sort(rows):
    logits = np.asarray([row for row, _ in rows], np.float32)
    result = np.asarray(filter_rows(logits, sampling_arrays([settings for _, settings in rows])))
    for given_row, settings, row in zip(logits, [s for _, s in rows], result, strict=True):
        if not sum_is_on_the_edge(given_row.astype(np.float64), settings):
            kept = kept_by_sorting(given_row.astype(np.float64), settings)
            np.testing.assert_array_equal(row, np.where(kept, given_row, -np.inf))


def test_filters_keep_the_literal_tokens():
    logits = np.log([0.5, 0.05, 0.25, 0.15, 0.05]).tolist()
    assert filtered(logits, top_k=2) == [0, 2]
    assert filtered(logits, top_p=0.8) == [0, 2, 3]  # 0.5 + 0.25 do not reach 0.8
    assert filtered(logits, top_p=0.5 - 1e-3) == [0]
    assert filtered(logits, min_p=0.25) == [0, 2, 3]  # at least 0.125
    assert filtered(logits, top_k=2, top_p=0.7) == [0, 2]  # of what top-k left, 0.5 / 0.75 falls short of 0.7
    assert filtered(logits, top_k=2, top_p=0.65) == [0]


def test_tokens_that_tie_with_the_last_one_kept_are_kept():
    assert filtered([1.0, 2.0, 1.0, 0.0], top_k=2) == [0, 1, 2]
    assert filtered([0.0] * 4, top_p=0.3) == [0, 1, 2, 3]
    assert filtered([0.0] * 4, min_p=1.0) == [0, 1, 2, 3]


def test_neutral_settings_change_nothing():
    logits = jax.random.normal(jax.random.key(0), (ROWS, VOCAB)) * 5
    np.testing.assert_array_equal(filter_rows(logits, sampling_arrays([SamplingParams()] * ROWS)), logits)


def test_top_k_beyond_the_vocabulary_keeps_all():
    assert filtered([3.0, 1.0, 2.0], top_k=1000) == [0, 1, 2]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = jnp.asarray([[3.0, -3.0, 1.0, -1.0], [3.0, -3.0, 1.0, -1.0]])
    seen = jnp.asarray([[True, True, False, False]] * 2)
    result = penalize_repetition(logits, seen, jnp.asarray([1.5, 1.0]))
    np.testing.assert_allclose(result, [[2.0, -4.5, 1.0, -1.0], [3.0, -3.0, 1.0, -1.0]])


def test_temperature_zero_takes_the_most_likely_token_beside_rows_that_draw():
    logits = jnp.tile(jnp.asarray([0.0, 0.1, 0.05] + [-9.0] * (VOCAB - 3)), (DRAWS, 1))
    params = [SamplingParams(temperature=0.0)] * 100 + [SamplingParams()] * (DRAWS - 100)
    drawn = np.asarray(sample_rows(logits, jax.random.split(jax.random.key(0), DRAWS), sampling_arrays(params)))
    assert set(drawn[:100]) == {1}
    assert {0, 1, 2} <= set(drawn[100:])


@pytest.mark.parametrize(
    "settings",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0, top_k=4),
        SamplingParams(top_p=0.7),
        SamplingParams(temperature=1.5, min_p=0.3),
    ],
)
def test_draws_follow_the_filtered_softmax(settings):
    logits = np.random.default_rng(0).normal(size=VOCAB)
    kept = kept_by_sorting(logits / settings.temperature, settings)
    expected = np.where(kept, np.exp(logits / settings.temperature), 0)
    expected /= expected.sum()
    keys = jax.random.split(jax.random.key(1), DRAWS)
    drawn = sample_rows(
        jnp.tile(jnp.asarray(logits, jnp.float32), (DRAWS, 1)), keys, sampling_arrays([settings] * DRAWS)
    )
    frequencies = np.bincount(drawn, minlength=VOCAB) / DRAWS
    assert not frequencies[~kept].any()
    assert np.all(np.abs(frequencies - expected) <= 5 * np.sqrt(expected * (1 - expected) / DRAWS))


def test_draws_from_a_wide_vocabulary_follow_the_softmax_block_by_block_and_within():
    rng = np.random.default_rng(3)
    logits = np.where(rng.random(1003) < 0.5, -np.inf, rng.normal(size=1003) * 2).astype(np.float32)
    keys = jax.random.split(jax.random.key(4), DRAWS)
    drawn = np.asarray(jax.jit(categorical)(jnp.broadcast_to(logits, (DRAWS, 1003)), keys))
    probs = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert np.isfinite(logits[drawn]).all()
    for cells in (np.arange(1003) // 31, np.arange(1003) % 31):  # where the blocks lie, and places inside them
        expected = np.bincount(cells, probs) * DRAWS
        found = np.bincount(cells[drawn], minlength=len(expected))
        assert (np.abs(found - expected) <= 4.5 * np.sqrt(expected) + 1).all()


@pytest.mark.parametrize("place", [0, 30, 31, 499, 1002])
def test_the_only_token_left_is_drawn_wherever_it_stands(place):
    logits = np.full((64, 1003), -np.inf, np.float32)
    logits[:, place] = -7.0
    assert (categorical(jnp.asarray(logits), jax.random.split(jax.random.key(5), 64)) == place).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("stop", ("end", "")),
    ],
)
def test_values_that_mean_nothing_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field} must "):
        SamplingParams(**{field: value})


def test_a_single_stop_string_is_not_taken_for_letters():
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
