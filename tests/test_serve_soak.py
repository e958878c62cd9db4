"""The server as a process that is used, left and killed: the benchmarks' own code on a tiny model, and its checks."""

import dataclasses

import numpy as np
import pytest

from benchmarks.load import Answer, export_random_model
from benchmarks.restart import restart
from benchmarks.soak import Report, SoakConfig, growth_of, soak
from minillm_jax.config import ModelConfig

TINY = ModelConfig(
    vocab_size=512, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
)  # fmt: skip
FLAT = Report(
    complete=9, vanished=3, problems={}, noticed=3, slots_used=0, queued=0, cache_tokens_used=0, compilations=0,
    resident_mib=500.0, growth_mib=1.0, slope_mib_per_minute=1.0, measured_seconds=60.0,
)  # fmt: skip
GOOD = [
    b'{"choices":[{"index":0,"text":"a","finish_reason":null}],"usage":null}',
    b'{"choices":[{"index":0,"text":"","finish_reason":"length"}],"usage":null}',
    b'{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2,"total_tokens":7}}',
    b"[DONE]",
]


def answer_of(events):
    answer = Answer()
    for seconds, data in enumerate(events):
        answer.take(data, float(seconds))
    return answer


@pytest.mark.slow  # a server of its own for half a minute
def test_clients_that_vanish_leave_nothing_behind(tmp_path):
    report = soak(SoakConfig(TINY, clients=16, seconds=20, slots=4, context=128), tmp_path)
    assert report.failures(max_growth=48) == []  # so short a run tells a gross leak only
    assert report.complete > 16 and report.vanished > 8


@pytest.mark.slow  # two starts of a server
def test_a_server_that_was_killed_compiles_nothing_anew(tmp_path):
    export_random_model(TINY, tmp_path / "model")
    flags = ["--slots=2", "--context=64"]
    every_program = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    first, second = restart(tmp_path / "model", tmp_path, flags, **every_program)
    assert first.programs_added > 5 and second.programs_added == 0


def test_only_a_complete_answer_has_no_problem():
    assert answer_of(GOOD).problem(5, 2) is None
    assert "DONE" in answer_of(GOOD[:3]).problem(5, 2)
    assert "finish_reason" in answer_of([GOOD[0], *GOOD[2:]]).problem(5, 2)
    assert "usage" in answer_of([*GOOD[:2], GOOD[3]]).problem(5, 2)
    assert "usage" in answer_of(GOOD).problem(5, 3)
    assert "too long" in answer_of([GOOD[0], b'{"error":{"message":"too long"}}']).problem(5, 2)


def test_arrivals_are_those_of_tokens_alone():
    assert answer_of([GOOD[0], GOOD[0], *GOOD[1:]]).arrivals == [0.0, 1.0]


def test_growth_counts_from_the_end_of_the_warm_up():
    seconds = np.arange(101.0)
    mib = np.where(seconds < 40, seconds * 10, 400 + (seconds - 40) / 60)  # fast at first, then one MiB a minute
    growth, slope, measured = growth_of(list(zip(seconds, mib, strict=True)), 0.4)
    np.testing.assert_allclose([growth, slope, measured], [55 / 60, 1.0, 60.0], rtol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"slots_used": 1}, {"queued": 1}, {"cache_tokens_used": 7}, {"compilations": 1}, {"growth_mib": 9.0},
        {"slope_mib_per_minute": 9.0}, {"problems": {"[DONE] did not come last": 2}}, {"complete": 0}, {"vanished": 0},
        {"noticed": 0},
    ],
    ids=str,
)  # fmt: skip
def test_every_fault_fails_a_soak(changes):
    assert FLAT.failures(max_growth=8) == []
    assert len(dataclasses.replace(FLAT, **changes).failures(max_growth=8)) == 1
