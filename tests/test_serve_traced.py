"""Programs that are kept traced: found again, not mistaken for others, and replaced when damaged."""

import functools

import jax
import numpy as np
import pytest

from serve import traced


def scale(state, x, *, factor):
    return state + factor * x, x


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(traced, "folder", lambda: tmp_path / "traced")
    return tmp_path / "traced"


def run(factor=2, size=3, dtype=np.float32):
    """Count the traces that one use of the program takes."""
    traces = []

    @functools.wraps(scale)
    def function(*arguments, **settings):
        traces.append(1)
        return scale(*arguments, **settings)

    arguments = jax.numpy.ones(size, dtype), np.arange(size, dtype=dtype)
    program = traced.lower(functools.partial(function, factor=factor), 0, *arguments).compile()
    total, same = program(*arguments)
    np.testing.assert_array_equal(total, 1 + factor * np.arange(size))
    np.testing.assert_array_equal(same, np.arange(size))
    return len(traces)


def test_a_program_is_traced_once(kept):
    assert run() > 0
    assert run() == 0
    assert len(list(kept.iterdir())) == 1


@pytest.mark.parametrize("other", [{"factor": 3}, {"size": 4}, {"dtype": np.int32}])
def test_another_setting_or_shape_is_another_program(kept, other):
    run()
    assert run(**other) > 0
    assert run(**other) == 0


def test_a_change_of_the_sources_or_of_jax_settings_is_another_program(kept, monkeypatch):
    run()
    with jax.default_matmul_precision("highest"):
        assert run() > 0
    monkeypatch.setattr(traced, "_sources", lambda: "edited")
    assert run() > 0


def test_damaged_files_are_written_again(kept):
    run()
    (path,) = kept.iterdir()
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"x" * 100):
        path.write_bytes(damaged)
        assert run() > 0
        assert run() == 0


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(kept):
    kept.write_text("a file is in the way")
    assert run() > 0
    assert run() > 0


def test_the_oldest_files_are_removed(kept, monkeypatch):
    monkeypatch.setattr(traced, "MOST_FILES", 2)
    for factor in (1, 2, 3):
        run(factor)
    assert len(list(kept.iterdir())) == 2
    assert run(1) > 0


def test_nothing_is_kept_where_compiled_programs_are_not(monkeypatch):
    monkeypatch.setattr(traced, "folder", lambda: None)
    assert run() > 0
    assert run() > 0
