import dataclasses
import json
import math
import re
import resource
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm_jax import flops, metrics
from minillm_jax.config import PRESETS, ModelConfig
from minillm_jax.metrics import (
    MetricsError,
    MetricsLogger,
    count_params,
    flops_per_token,
    peak_flops,
    plot_curves,
    read_metrics,
)


def log_steps(run_dir: Path, steps, start_step: int = 0, **options) -> None:
    with MetricsLogger(run_dir, total_steps=10, start_step=start_step, show_progress=False, **options) as logger:
        for step in steps:
            logger.log(step, {"loss": 1.0 / step, "learning_rate": 0.1 * step})


def tensorboard_scalars(run_dir: Path) -> list[tuple[int, str, float]]:
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((run_dir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # a record is: length (8 bytes), its checksum (4), the event, its checksum (4)
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            data = data[12 + size + 4 :]
    return found


def test_each_row_is_one_json_object_with_python_numpy_and_jax_numbers(tmp_path):
    with MetricsLogger(tmp_path, total_steps=2, show_progress=False) as logger:
        logger.log(1, {"loss": np.float32(0.1), "tokens": np.int64(7), "grad_norm": np.array(2.5)})
        assert len(read_metrics(tmp_path)) == 1, "a row is on disk as soon as it is logged"
        logger.log(2, {"loss": 3})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": float(np.float32(0.1)), "tokens": 7, "grad_norm": 2.5},
        {"step": 2, "loss": 3},
    ]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with MetricsLogger(tmp_path, total_steps=1, show_progress=False) as logger:
        logger.log(1, {"loss": math.nan, "grad_norm": math.inf, "learning_rate": 0.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "learning_rate": 0.5,
    }


@given(killed_after=st.integers(1, 8), data=st.data())
def test_a_resumed_run_leaves_the_file_of_a_run_never_interrupted(tmp_path_factory, killed_after, data):
    checkpoint = data.draw(st.integers(0, killed_after))
    torn = data.draw(st.integers(0, 30))
    whole, resumed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("resumed")
    log_steps(whole, range(1, 11))
    log_steps(resumed, range(1, killed_after + 1))
    with (resumed / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 9, "loss": 0.123456789, "learning'[:torn])
    log_steps(resumed, range(checkpoint + 1, 11), start_step=checkpoint)
    assert (resumed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_run_started_over_at_zero_writes_its_row_of_step_zero_once(tmp_path):
    for _ in range(2):
        with MetricsLogger(tmp_path, total_steps=5, show_progress=False) as logger:
            logger.log(0, {"valid_loss": 8.75})
    assert read_metrics(tmp_path) == [{"step": 0, "valid_loss": 8.75}]


def test_a_full_disk_raises_and_leaves_only_whole_rows(tmp_path):
    with MetricsLogger(tmp_path, total_steps=10, show_progress=False) as logger:
        logger.log(1, {"loss": 0.5})
        before = (tmp_path / "metrics.jsonl").read_bytes()
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, old[1]))  # room for ten bytes more
        try:
            with pytest.raises(MetricsError, match=r"metrics\.jsonl: the row of step 2 could not be written.*resume"):
                logger.log(2, {"loss": 0.25})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
        logger.log(3, {"loss": 0.125})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]


def test_a_file_in_place_of_the_run_folder_is_a_clear_error(tmp_path):
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(MetricsError, match="metrics cannot be written here"):
        MetricsLogger(tmp_path / "run", total_steps=1)


def test_tensorboard_gets_every_finite_number_also_across_a_quick_resume(tmp_path):
    log_steps(tmp_path, [1, 2])
    with MetricsLogger(tmp_path, total_steps=10, start_step=2, show_progress=False) as logger:
        logger.log(3, {"loss": 0.25, "grad_norm": math.nan})
    scalars = tensorboard_scalars(tmp_path)
    assert (3, "loss", 0.25) in scalars
    assert sorted((step, tag) for step, tag, _ in scalars) == [
        (1, "learning_rate"),
        (1, "loss"),
        (2, "learning_rate"),
        (2, "loss"),
        (3, "loss"),
    ]


def test_progress_without_a_terminal_is_a_few_plain_lines(tmp_path, capsys):
    with MetricsLogger(tmp_path, total_steps=300, stage="pretrain") as logger:
        for step in range(1, 301):
            logger.log(step, {"loss": 2.5, "tokens_per_second": 12_345.0, "mfu": 0.414})
        logger.print("a sample: [bold]not markup[/bold]")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3, "the first row, the last row and the printed line"
    assert "pretrain  step 1/300  loss 2.5000 · 12.3k tokens/s · MFU 41.4%" in lines[0]
    assert "step 300/300" in lines[1] and "0:00 left" in lines[1]
    assert lines[2] == "a sample: [bold]not markup[/bold]"


def test_progress_on_a_terminal_is_a_bar_with_prints_above_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with MetricsLogger(tmp_path, total_steps=4, start_step=1, stage="sft") as logger:
        logger.log(2, {"loss": 2.5})
        logger.print("hello")
        logger.log(4, {"loss": 1.5})
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert "hello" in text
    assert re.search(r"sft .*2/4 loss 2\.5000", text)
    assert re.search(r"sft .*4/4 loss 1\.5000 · 0:00 left", text)


def test_quiet_logging_prints_nothing(tmp_path, capsys):
    log_steps(tmp_path, [1, 2, 10])
    assert capsys.readouterr().out == ""


def test_wandb_missing_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MetricsError, match=r"pip install 'minillm-jax\[wandb\]'"):
        MetricsLogger(tmp_path, total_steps=1, wandb_project="p")


def test_wandb_gets_the_rows_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    started, logged, finished = [], [], []

    def init(**options):
        started.append(options)
        return types.SimpleNamespace(
            log=lambda values, step: logged.append((step, values)), finish=lambda exit_code: finished.append(exit_code)
        )

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with MetricsLogger(tmp_path, 2, wandb_project="p", config={"seed": 1}, show_progress=False) as logger:
        logger.log(1, {"loss": 0.5, "grad_norm": math.nan})
    with (
        pytest.raises(KeyboardInterrupt),
        MetricsLogger(tmp_path, 2, start_step=1, wandb_project="p", show_progress=False),
    ):
        raise KeyboardInterrupt
    assert logged == [(1, {"loss": 0.5})]
    assert [run["project"] for run in started] == ["p", "p"] and started[0]["config"] == {"seed": 1}
    assert started[0]["id"] == started[1]["id"]
    assert finished == [0, 1]


def test_parameter_counts_are_the_published_ones():
    assert count_params(PRESETS["minillm"]) == 25_829_888  # 25.8 M
    assert round(count_params(PRESETS["minimind3"]) / 1e6) == 64
    assert count_params(PRESETS["minimind3"]) == count_params(PRESETS["minimind3"], active=True)


def test_parameter_count_of_a_model_small_enough_to_count_by_hand():
    config = ModelConfig(
        vocab_size=10,
        hidden_size=4,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
        intermediate_size=5,
        use_qk_norm=True,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    # embedding and head 40 + 40, final norm 4; per layer: q, o, k, v, mlp 3·20, biases 12 + 6 + 6, qk norms, norms
    assert count_params(config) == 84 + 3 * (48 + 48 + 24 + 24 + 60 + 24 + 12 + 8)
    moe = dataclasses.replace(config, use_moe=True, num_experts=7, num_experts_per_tok=2, n_shared_experts=1)
    # the mlp's 60 become the router's 28 and one shared expert beside the routed ones
    assert count_params(moe) - count_params(config) == 3 * (28 + 7 * 60)
    assert count_params(moe) - count_params(moe, active=True) == 3 * (7 - 2) * 60


def test_training_flops_follow_the_palm_formula():
    config = PRESETS["minillm"]
    norms = 8 * 2 * 512 + 512
    # tied: the table counts once, as the head
    assert flops_per_token(config, 512) == 6 * (count_params(config) - norms) + 12 * 8 * 512 * 512
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    assert flops_per_token(untied, 512) == flops_per_token(config, 512)


def test_idle_experts_cost_no_flops():
    config = dataclasses.replace(PRESETS["minillm"], use_moe=True)
    more = dataclasses.replace(config, num_experts=64)
    router = 6 * 8 * 512 * 60
    assert flops_per_token(more, 512) == flops_per_token(config, 512) + router


@pytest.mark.parametrize(
    ("device_kind", "expected"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla V100-SXM2-16GB", None),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("an accelerator of tomorrow", None),
    ],
)
def test_peak_of_known_and_unknown_accelerators(device_kind, expected):
    device = types.SimpleNamespace(platform="gpu", device_kind=device_kind)
    assert peak_flops(device) == expected


def test_peak_of_a_cpu_is_measured_once(monkeypatch):
    import jax

    flops._measured_cpu_flops.cache_clear()
    cpu = jax.local_devices(backend="cpu")[0]
    first = peak_flops(cpu)
    assert first is not None and 1e8 < first < 1e15
    assert peak_flops(cpu) == first
    assert flops._measured_cpu_flops.cache_info().misses == 1


def test_panels_join_validation_with_training_and_keep_every_other_number():
    rows = [
        {"step": 1, "loss": 2.0, "reward": 0.5, "kl": None, "note": "text"},
        {"step": 2, "loss": None, "valid_loss": 2.25},
    ]
    panels = metrics._panels(rows)
    assert list(panels) == ["loss", "reward"]
    assert panels["loss"]["valid_loss"] == ([2], [2.25])
    steps, values = panels["loss"]["loss"]
    assert steps == [1, 2] and values[0] == 2.0 and math.isnan(values[1])


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1, "loss": 2.0}],
        [{"step": 1, "loss": None, "learning_rate": 0.0}, {"step": 2, "loss": 1.0}],
        [{"step": step, "loss": 1 / step, "valid_loss": 1.0, "kl": 0.1, "reward": 2.0} for step in range(1, 200)],
    ],
)
def test_curves_are_drawn_for_short_gappy_and_foreign_runs(tmp_path, rows):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture = plot_curves(tmp_path)
    assert picture == tmp_path / "curves.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_run_without_numbers_has_no_picture(tmp_path):
    assert plot_curves(tmp_path) is None
    assert not (tmp_path / "curves.png").exists()
