"""The benchmarks' arithmetic against numbers worked out by hand, what their lines hold, and that they can fail."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import common, decode, kernels, rollout, stages, summary, train
from benchmarks.roofline import PEAK_BANDWIDTH, Roofline, Work, against, decode_work, prefill_work, roofline, train_work
from minillm_jax.config import ConfigError, ModelConfig
from minillm_jax.flops import PEAK_BF16_FLOPS, find_device
from minillm_jax.model import init_params

ROOT = Path(__file__).parent.parent
SMALL = ModelConfig(
    vocab_size=10, hidden_size=4, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=8
)
"""Per layer: q and o 16 each, k and v 8 each, MLP 3 x 32, so 144 that multiply, and 8 in norms; table 40; norm 4."""
MATRICES, PARAMETERS = 144, 2 * (144 + 8) + 40 + 4
MOE = ModelConfig(
    vocab_size=10, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    intermediate_size=8, use_moe=True, num_experts=4, num_experts_per_tok=1, n_shared_experts=0,
)  # fmt: skip
MACHINE = {"hardware", "devices", "memory_gib", "cpu", "cores", "driver", "python", "jax", "jaxlib", "flax"}


def device(kind, platform="gpu"):
    return SimpleNamespace(device_kind=kind, platform=platform)


def test_training_work_equals_the_count_by_hand():
    work = train_work(SMALL, batch=3, length=5, itemsize=2)
    per_token = 6 * (2 * MATRICES + 40) + 12 * 2 * 2 * 2 * 5  # 6 P + 12 L N H T
    assert work.flops == 3 * 5 * per_token
    assert work.bytes == 40 * PARAMETERS + 3 * (15 * 2 * 4 * 2)


def test_prefill_work_equals_the_count_by_hand():
    work = prefill_work(SMALL, batch=3, length=5, itemsize=2, param_itemsize=4)
    assert work.flops == 15 * (2 * 2 * MATRICES + 4 * 2 * 2 * 2 * 5) + 2 * 3 * 40
    cache, stream = 15 * 2 * 2 * 1 * 2 * 2, 2 * 15 * 2 * 4 * 2
    assert work.bytes == 4 * PARAMETERS + cache + stream


def test_decoding_work_equals_the_count_by_hand():
    work = decode_work(SMALL, batch=3, context=7, itemsize=2, param_itemsize=4)
    assert work.flops == 3 * (2 * (2 * MATRICES + 40) + 4 * 2 * 2 * 2 * 7)
    assert work.bytes == 4 * PARAMETERS + 3 * 7 * 2 * 2 * 1 * 2 * 2


def test_the_parameters_counted_are_those_of_the_model():
    params = jax.eval_shape(lambda key: init_params(SMALL, key), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS


def test_decoding_reads_the_experts_that_its_tokens_visit():
    one, two, many = (decode_work(MOE, batch, 0, 2, 1).bytes for batch in (1, 2, 10_000))
    expert = 3 * 4 * 8
    assert two - one == pytest.approx(0.75 * expert)  # the second token goes elsewhere three times out of four
    assert many - one == pytest.approx(3 * expert)


def test_an_untied_table_is_read_a_row_a_token():
    untied = ModelConfig(**{**vars(SMALL), "tie_word_embeddings": False})
    tied, apart = (decode_work(config, 3, 7, 2, 1).bytes for config in (SMALL, untied))
    assert apart - tied == 3 * 4


def test_a_share_is_the_longer_of_both_times_over_the_measured_one():
    peaks = Roofline(flops=100.0, bandwidth=10.0)
    compute, memory = against(Work(200.0, 10.0), 4.0, peaks), against(Work(200.0, 30.0), 4.0, peaks)
    assert (compute["roofline_share"], compute["bound"]) == (0.5, "compute")
    assert (memory["roofline_share"], memory["bound"]) == (0.75, "memory")
    assert against(Work(200.0, 10.0), 4.0, None)["roofline_share"] is None


@pytest.mark.parametrize(
    ("kind", "flops", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 3350e9),
        ("NVIDIA H100 PCIe", 756e12, 2000e9),
        ("NVIDIA H200", 989e12, 4800e9),
        ("NVIDIA A100-SXM4-80GB", 312e12, 2039e9),
        ("NVIDIA A100-SXM4-40GB", 312e12, 1555e9),
        ("NVIDIA A100 80GB PCIe", 312e12, 1935e9),
        ("TPU v4", 275e12, 1228e9),
        ("TPU v5 lite", 197e12, 819e9),
        ("TPU v5p", 459e12, 2765e9),
    ],
)
def test_devices_have_the_peaks_of_their_data_sheets(kind, flops, bandwidth):
    assert roofline(device(kind)) == Roofline(flops, bandwidth)


def test_unknown_devices_have_no_peaks_and_every_device_of_one_table_is_in_the_other():
    assert roofline(device("Some Accelerator 9")) is None
    assert all(find_device(device(name), PEAK_BANDWIDTH) for name, _ in PEAK_BF16_FLOPS)


def test_a_cpu_is_measured():
    peaks = roofline(jax.devices("cpu")[0])
    assert 1e8 < peaks.flops < 1e14 and 1e8 < peaks.bandwidth < 1e13


def test_spread_is_median_and_quartiles():
    assert common.spread("s", [4.0, 1.0, 3.0, 2.0, 5.0]) == {"s_median": 3.0, "s_iqr": 2.0}
    assert common.spread("s", [0.00012345678]) == {"s_median": 0.0001235, "s_iqr": 0.0}


def test_only_calls_after_the_warmup_are_timed():
    calls = []
    assert len(common.timed(lambda: calls.append(1), 3, warmup=2)) == 3 and len(calls) == 5


TINY = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=16,
)


def test_the_line_of_training_says_all_that_its_numbers_mean(tmp_path, capsys):
    config = train.BenchmarkConfig(model=TINY, batch_size=2, max_seq_len=8, steps=2, warmup=1)
    common.emit(train.measure(config), str(tmp_path / "new" / "results.jsonl"))
    text = (tmp_path / "new" / "results.jsonl").read_text()
    assert capsys.readouterr().out == text
    line = json.loads(text)
    own = {"name", "dtype", "preset", "batch_size", "seq_len", "parameters", "step_seconds_median", "step_seconds_iqr",
           "tokens_per_second", "flops", "bytes", "roofline_share", "bound", "mfu", "peak_memory_gib"}  # fmt: skip
    assert line.keys() >= own | MACHINE
    assert line["tokens_per_second"] == pytest.approx(16 / line["step_seconds_median"], rel=1e-3)
    assert line["mfu"] == pytest.approx(line["flops"] / line["step_seconds_median"] / line["peak_flops"], abs=1e-4)
    assert line["loss"] == pytest.approx(np.log(64), abs=0.5)


def test_the_lines_of_decoding_and_rollouts_agree_with_their_counts():
    config = decode.DecodeBenchmark(model=TINY, batch_sizes=(2,), prompt_len=4, chunks=1, prefills=1)
    (line,) = decode.lines(config)
    assert line.keys() >= MACHINE | {"step_seconds_median", "prefill_seconds_median", "prefill", "decode"}
    assert line["mean_context"] == 4 + 16 + 8.5  # the mean of what the 16 timed steps see: 21 to 36 tokens
    assert line["decode"]["bytes"] == decode_work(TINY, 2, 28.5, 4, 4).bytes
    assert line["tokens_per_second"] == pytest.approx(2 / line["step_seconds_median"], rel=1e-3)
    drawn = rollout.RolloutBenchmark(model=TINY, completions=2, prompt_len=4, max_new_tokens=8, rounds=1, one_by_one=0)
    steps = [decode_work(TINY, 2, context, 4, 4) for context in range(5, 13)]
    reading = prefill_work(TINY, 2, 4, 4, 4)
    work = rollout.rollout_work(drawn)
    assert work.flops == reading.flops + sum(step.flops for step in steps)
    assert work.bytes == reading.bytes + sum(step.bytes for step in steps)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ConfigError, match="must be at least 1"):
        train.BenchmarkConfig(model=TINY, steps=0)
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        decode.DecodeBenchmark(model=TINY, prompt_len=40_000)
    with pytest.raises(ConfigError, match="choose from float32 bfloat16"):
        kernels.KernelBenchmark(dtypes=("float16",))
    with pytest.raises(ConfigError, match="unknown; choose from pretrain"):
        stages.StagesBenchmark(out_dir="x", stages=("rlhf",))


def small_kernels(**changes):
    sizes = {"length": 16, "heads": 2, "kv_heads": 1, "head_dim": 4, "rows": 14, "experts": 3, "hidden": 4, "width": 6}
    return kernels.KernelBenchmark(**sizes | {"repeats": 0, "dtypes": ("float32",)} | changes)


def test_a_visible_table_is_that_of_the_case():
    cases = {case.name: case for case in kernels.cases(small_kernels(batch=1))}
    assert set(cases) == {"full", "packed", "padded", "branches", "cached", "decode"}
    np.testing.assert_array_equal(cases["full"].visible()[0], np.tri(16, dtype=bool))
    branches = cases["branches"].visible()[0]  # 8 tokens of a beginning, and two continuations of 4
    assert branches[12:, 8:12].sum() == 0 and branches[12:, :8].all()
    np.testing.assert_array_equal(branches[8:12, 8:12], np.tri(4, dtype=bool))
    assert len({tuple(row) for row in cases["packed"].visible()[0]}) > 1
    assert cases["decode"].visible().sum() == 1 + cases["decode"].masks["q_positions"][0, 0]


@pytest.mark.parametrize("wrong", ["mask", "raises", "refuses"])
def test_a_wrong_kernel_is_found(wrong):
    config = small_kernels()
    case = next(case for case in kernels.cases(config) if case.name == "packed")

    def careless(q, k, v):
        if wrong == "raises":
            raise RuntimeError("no such kernel")
        if wrong == "refuses":
            raise ValueError("not on this device")
        full = next(case for case in kernels.cases(config) if case.name == "full")
        return kernels.attention_by_definition(full, q, k, v)

    right = kernels.attention_problem(config, case)
    problem = kernels.Problem(**{**vars(right), "implementations": {**right.implementations, "careless": careless}})
    lines = {line["impl"]: line for line in kernels.judge(config, problem, "float32")}
    assert lines["auto"]["ok"] and lines["xla"]["ok"] and lines["auto"]["error"] < 1e-6
    assert lines["careless"].get("ok") is (None if wrong == "refuses" else False)
    assert {"mask": "error", "raises": "failed", "refuses": "refused"}[wrong] in lines["careless"]


def test_an_error_that_is_not_finite_is_beyond_every_tolerance():
    assert kernels.relative_error(np.asarray([1.0, np.nan]), np.ones(2)) == float("inf")
    assert kernels.relative_error(jnp.asarray([1.0, 1.1]), np.ones(2)) == pytest.approx(0.1 / np.sqrt(2), rel=1e-5)


def test_curves_are_compared_relative_to_their_size():
    found = stages.difference([3.0, 4.0], [3.0, 4.5])
    assert found == pytest.approx({"mean": 0.25 / np.sqrt(12.5), "max": 0.5 / np.sqrt(12.5)})
    assert stages.difference([1.0], [float("nan")])["max"] == float("inf")
    with pytest.raises(ConfigError, match="1 and 2 points"):
        stages.difference([1.0], [1.0, 2.0])


def test_a_stage_that_fails_is_a_line_and_curves_that_part_are_not_ok(monkeypatch, tmp_path):
    curves = {"float32": [2.0, 1.0], "bfloat16": [2.0, 1.2]}

    def run(stage, folder, size, dtype):
        if stage.name == "sft":
            raise ConfigError("no data")
        return curves["float32" if stage.name == "dpo" else dtype], 1.0

    monkeypatch.setattr(stages, "run_stage", run)
    config = stages.StagesBenchmark(out_dir=str(tmp_path), stages=("pretrain", "sft", "dpo"))
    lines = list(stages.all_lines(config))
    assert [line["ok"] for line in lines] == [False, False, True] and "no data" in lines[1]["failed"]
    text = summary.summary(lines)
    assert "| pretrain | loss | 2 | 6.325% | 12.650% | 1.0 | 1.0 | **no** |" in text and "| sft | – |" in text
    stages.draw(lines, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


@pytest.mark.parametrize(("status", "error"), [(2, ConfigError), (130, KeyboardInterrupt)])
def test_a_stage_that_a_signal_ended_ends_all(monkeypatch, status, error):
    words = list(sys.argv)
    monkeypatch.setitem(sys.modules, "a_stage", SimpleNamespace(main=lambda: sys.exit(status)))
    with pytest.raises(error):
        stages.run_main("a_stage", ["--flag"])
    assert sys.argv == words


def test_the_script_says_what_failed_and_that_it_ran_out_of_time(tmp_path):
    words = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--dry", "--out", str(tmp_path / "out")]
    fake = tmp_path / "python"
    fake.write_text(
        '#!/bin/sh\ncase "$*" in\n*benchmarks.stages*) echo bang; exit 3 ;;\n*benchmarks.train*) sleep 30 ;;\n'
        f'*benchmarks.summary*) exec {sys.executable} "$@" ;;\nesac\n'
    )
    fake.chmod(0o755)
    env = {"PATH": "/usr/bin:/bin", "PYTHON": str(fake), "BUDGET": "6"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "| bang" in done.stdout
    report = done.stdout[done.stdout.index("parts:") :]
    states = {line.split()[0]: line for line in report.splitlines() if line.strip()}
    assert states["kernels"].endswith("ok") and states["stages"].endswith("FAILED with status 3")
    assert "cut off after" in states["train"] and "not run" in states["decode"]
    unknown = subprocess.run([*words, "--wet"], env=env, capture_output=True, text=True, timeout=60)
    assert unknown.returncode == 2 and "--wet is unknown" in unknown.stderr
