"""Rewards together: names and weights, sums, functions of users, and what is said when one cannot be computed."""

import dataclasses
import math
import re
import sys

import jax
import numpy as np
import pytest
from example_samples import END, sample, samples
from example_tokenizers import TOKENIZER
from hypothesis import given
from hypothesis import strategies as st

from minillm_jax.config import ConfigError, parse_cli
from minillm_jax.data.records import RLRecord
from rl.rewards import (
    Component,
    RewardConfig,
    RewardError,
    Rewards,
    call_function,
    load_function,
    make_rewards,
    parse_reward,
)


def rewards(*names, **options):
    return make_rewards(RewardConfig(reward=names, **options), TOKENIZER, max_prompt_len=100, max_new_tokens=100)


def of_values(values, name="given", weight=1.0):
    return Component(name, weight, lambda samples: np.asarray(values, np.float64))


# --- Names and weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("exact", ("exact", 1.0)),
        ("exact:1.0", ("exact", 1.0)),
        ("format:.2", ("format", 0.2)),
        ("repetition:2.", ("repetition", 2.0)),
        ("length:-1e-1", ("length", -0.1)),
        ("model:0", ("model", 0.0)),
        ("my.module:func", ("my.module:func", 1.0)),
        ("my.module:func:0.5", ("my.module:func", 0.5)),
        ("m:nan", ("m:nan", 1.0)),
        ("m:inf:2", ("m:inf", 2.0)),
        ("m:f1", ("m:f1", 1.0)),
    ],
)
def test_a_weight_is_what_looks_like_a_number_behind_the_last_colon(spec, expected):
    assert parse_reward(spec) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "exakt",
            "--reward exakt: unknown; give one of exact, numeric, format, regex, length, repetition, model, or a",
        ),
        ("exact:high", "--reward exact:high: exact is built in, so what follows the colon must be its weight"),
        ("exact:", "exact is built in"),
        ("exact:1e999", "the weight is too large"),
        ("my.module", "unknown"),
        ("rewards.py:func", "as package.module:function"),
        ("a:b:c", "as package.module:function"),
        (":func", "unknown"),
        ("", "unknown"),
        ("3:2", "unknown"),
    ],
)
def test_what_cannot_be_a_reward_is_refused_with_what_can(spec, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        RewardConfig(reward=(spec,))


@given(st.floats(0, 1e6), st.sampled_from(["exact", "a.b:c"]))
def test_any_weight_is_read_back(weight, name):
    assert parse_reward(f"{name}:{weight}") == (name, weight)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reward": ("exact", "exact:0.5")}, "--reward names exact twice; give it one weight"),
        ({"reward": ("model",)}, "--reward model needs --reward_model_path"),
        ({"reward": ("regex",)}, "--reward regex needs --reward_pattern"),
        (
            {"reward": ("exact",), "reward_model_path": "m"},
            "--reward_model_path is given, but --reward does not name model",
        ),
        ({"reward_pattern": "a"}, "--reward_pattern is given, but --reward does not name regex; add regex to it"),
        ({"reward_length_target": 5}, "--reward_length_target is given, but --reward does not name length"),
        ({"reward": ("regex",), "reward_pattern": "("}, "--reward_pattern '(' is no regular expression: missing )"),
        ({"reward_clip": 0.0}, "--reward_clip must be positive, not 0.0"),
        ({"reward_clip": math.nan}, "--reward_clip must be positive"),
        ({"missing_eos_penalty": -1.0}, "--missing_eos_penalty must not be negative, but is -1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        RewardConfig(**values)


def test_a_target_length_must_leave_room_to_the_limit():
    with pytest.raises(ConfigError, match=r"--reward_length_target must lie between 0 and --max_new_tokens \(100\)"):
        rewards("length", reward_length_target=100)


def test_a_reward_model_alone_is_the_reward_and_nothing_is_exact():
    assert RewardConfig().weights() == {"exact": 1.0}
    assert RewardConfig(reward_model_path="m").weights() == {"model": 1.0}
    assert RewardConfig(reward=("exact", "model:0.5"), reward_model_path="m").weights() == {"exact": 1.0, "model": 0.5}


def test_the_command_line_takes_rewards_with_weights():
    argv = [
        "--reward",
        "exact:1.0",
        "format:0.2",
        "my.module:func:0.5",
        "--reward_clip",
        "5",
        "--on_bad_reward",
        "skip",
    ]
    config = parse_cli(RewardConfig, "", argv=argv)
    assert config.weights() == {"exact": 1.0, "format": 0.2, "my.module:func": 0.5}
    assert (config.reward_clip, config.on_bad_reward) == (5.0, "skip")


# --- The sum -------------------------------------------------------------------------------------------------------


def test_the_total_is_the_weighted_sum_and_components_stay_unweighted():
    scored = rewards("exact:2", "format:0.5", "repetition")(
        samples("<think>t</think><answer>yes</answer>", "no no no no")
    )
    assert list(scored.components) == ["exact", "format", "repetition"]
    np.testing.assert_array_equal(scored.components["exact"], [1, 0])
    np.testing.assert_array_equal(scored.components["format"], [1, 0])
    np.testing.assert_allclose(scored.total, [2.5, -0.5])
    assert scored.total.dtype == scored.components["exact"].dtype == np.float32
    assert scored.ok.all()
    assert scored.metrics() == pytest.approx(
        {"reward": 1.0, "reward/exact": 0.5, "reward/format": 0.5, "reward/repetition": -0.25, "bad_rewards": 0}
    )


def test_clipping_bounds_the_sum_and_the_penalty_of_cut_off_completions_comes_after():
    both = Rewards((of_values([9, -9, 9, 0.5]), of_values([0, 0, -8, 0], "more")), clip=2.0, missing_eos_penalty=0.25)
    scored = both([sample(), sample(), sample(), sample(finished=False)])
    np.testing.assert_allclose(scored.total, [2, -2, 1, 0.25])
    np.testing.assert_array_equal(scored.components["missing_eos"], [0, 0, 0, -1])
    assert "missing_eos" not in Rewards((of_values([1]),))([sample(finished=False)]).components


def test_length_counts_tokens_the_end_included():
    short, long = sample("a"), sample("a" * 200)
    assert len(long.completion_ids) > 100
    scored = rewards("length")([short, long])
    np.testing.assert_array_equal(scored.components["length"], [0, -1])
    exactly = dataclasses.replace(short, completion_ids=[5] * 89 + [END])
    assert rewards("length")([exactly]).total == [-0.5]  # four fifths of the 100 tokens at most are free
    assert rewards("length", reward_length_target=0)([exactly]).total == np.float32(-0.9)


def test_nothing_to_score_gives_empty_arrays():
    scored = rewards("exact", "length", "repetition")([])
    assert scored.total.shape == scored.ok.shape == scored.components["exact"].shape == (0,)
    assert scored.metrics()["reward"] == 0


def record(answer, line=7):
    return RLRecord("rows.jsonl", line, [{"role": "user", "content": "q"}], answer, row={"answer": answer})


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("exact", None, "rows.jsonl:7: answer: is missing, and --reward exact compares with it; add it, or choose"),
        ("numeric", None, "rows.jsonl:7: answer: is missing, and --reward numeric compares with it"),
        ("numeric", "seven", "rows.jsonl:7: answer: 'seven' holds no number for --reward numeric to compare with"),
    ],
)
def test_rows_without_an_answer_to_compare_with_are_found_before_training(name, answer, message):
    with pytest.raises(RewardError, match=re.escape(message)):
        rewards("repetition", name).check([record("3", line=6), record(answer)])
    rewards("repetition").check([record(answer)])
    rewards(name).check([record("3")])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_a_reward_that_is_not_finite_stops_or_is_left_out(bad):
    batch = [sample(f"text {i}", line=i + 1) for i in range(3)]
    components = (of_values([1, 2, 3], "good"), of_values([1, bad, 1], "odd"))
    shown = "inf" if bad == 1e300 else bad
    with pytest.raises(
        RewardError, match=rf"^rows.jsonl:2: --reward odd is {shown} on the completion 'text 1'; mend it"
    ):
        Rewards(components)(batch)
    scored = Rewards(components, missing_eos_penalty=1.0, skip_bad=True)(batch)
    np.testing.assert_array_equal(scored.ok, [True, False, True])
    np.testing.assert_array_equal(scored.total, [2, 0, 4])
    np.testing.assert_array_equal(scored.components["good"], [1, 0, 3])
    assert scored.metrics() == {
        "reward": 3,
        "reward/good": 2,
        "reward/odd": 1,
        "reward/missing_eos": 0,
        "bad_rewards": 1,
    }


# --- Functions of users --------------------------------------------------------------------------------------------

MODULE = """
CONSTANT = 3
def keyed(prompts, completions, rows):
    return [row["bonus"] + len(c) for c, row in zip(completions, rows)]
def sees(prompts, completions, rows):
    assert all(p.endswith("<|im_start|>assistant\\n") for p in prompts)
    return [float(c == row["extra"]["want"]) for c, row in zip(completions, rows)]
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("import json\n1 / 0\n")
    (tmp_path / "needy_rewards.py").write_text("import no_such_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield
    for name in ("my_rewards", "broken_rewards", "needy_rewards"):
        sys.modules.pop(name, None)


def test_a_function_in_the_current_directory_sees_texts_and_whole_rows(user_module):
    batch = [sample("a b", extra={"want": "a b"}), sample("c", extra={"want": "d"})]
    scored = rewards("my_rewards:sees:0.5")(batch)
    np.testing.assert_array_equal(scored.total, [0.5, 0])
    np.testing.assert_array_equal(scored.components["my_rewards:sees"], [1, 0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_rewards:f", r"--reward no_rewards:f: there is no module no_rewards in .* or among installed packages"),
        ("my_rewards.sub:f", r"there is no module my_rewards\.sub|my_rewards\.sub cannot be imported"),
        ("needy_rewards:f", r"needy_rewards cannot be imported: No module named 'no_such_package'"),
        ("broken_rewards:f", r"cannot be imported: ZeroDivisionError: division by zero \(broken_rewards\.py, line 2\)"),
        ("my_rewards:g", r"--reward my_rewards:g: .*my_rewards\.py has no g"),
        ("my_rewards:CONSTANT", r"--reward my_rewards:CONSTANT: CONSTANT is a int, not a function"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_named(user_module, name, message):
    with pytest.raises(RewardError, match=message):
        load_function(name)


def test_a_function_that_raises_is_traced_to_its_row(user_module):
    batch = [sample("fine", bonus=1), sample("no bonus here", line=8), sample("fine", bonus=2)]
    with pytest.raises(
        RewardError,
        match=r"^rows.jsonl:8: --reward my_rewards:keyed raised KeyError: 'bonus' \(my_rewards\.py, line \d\) on the "
        r"completion 'no bonus here'; mend it and start again to resume, or leave .* with --on_bad_reward skip$",
    ):
        rewards("my_rewards:keyed")(batch)
    scored = rewards("my_rewards:keyed", on_bad_reward="skip")(batch)
    np.testing.assert_array_equal(scored.ok, [True, False, True])
    np.testing.assert_array_equal(scored.total, [5, 0, 6])


def test_without_one_good_completion_everything_is_left_out(user_module):
    scored = rewards("my_rewards:keyed", on_bad_reward="skip")([sample(), sample()])
    assert not scored.ok.any()
    assert scored.metrics() == {"reward": 0, "reward/my_rewards:keyed": 0, "bad_rewards": 2}


@pytest.mark.parametrize("skip", [False, True])
def test_a_function_that_fails_on_batches_alone_stops_either_way(skip):
    def single_minded(prompts, completions, rows):
        (_only,) = completions
        return [1.0]

    message = (
        r"--reward f raised ValueError: too many .* on a batch of 2 completions \(rows rows.jsonl:1 to rows.jsonl:2\)"
    )
    if skip:  # no completion is to blame, so none can be left out
        message = r"--reward f raised ValueError"
    with pytest.raises(RewardError, match=message):
        call_function("f", single_minded, samples("a", "b"), skip)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (None, "a NoneType"),
        (1.0, "a float"),
        ("ab", "a str"),
        ({0: 1.0, 1: 2.0}, "a dict"),
        ([1.0], "a list of length 1"),
        (np.ones((2, 1)), "a ndarray of shape (2, 1)"),
        ([[1.0], [1.0, 2.0]], "a list"),
        ([1.0, None], "a list of length 2 that holds None"),
        (["1", "2"], "a list of length 2 that holds '1'"),
        ([1j, 2], "a list of length 2 that holds 1j"),
    ],
)
def test_what_is_not_one_number_for_each_completion_is_refused(returned, found, skip):
    message = f"--reward f must return a list of numbers, one for each of 2 completions, but returned {found}"
    with pytest.raises(RewardError, match=f"^{re.escape(message)}$"):
        call_function("f", lambda prompts, completions, rows: returned, samples("a", "b"), skip)


@pytest.mark.parametrize(
    "returned", [[1, 0], (1.0, 0.0), np.asarray([1, 0], np.float16), [True, False], jax.numpy.asarray([1.0, 0.0])]
)
def test_lists_tuples_and_arrays_of_numbers_are_rewards(returned):
    found = call_function("f", lambda prompts, completions, rows: returned, samples("a", "b"), False)
    np.testing.assert_array_equal(found, [1, 0])
