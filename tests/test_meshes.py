"""Meshes: what eight simulated devices compute is what one does, on every stage; and what cannot be split is explained.

Simulated devices have to be asked for before jax starts, so all that needs several runs in subprocesses:
`mesh_programs.py` for steps, generation and memory, `mesh_stages.py` for whole stages.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from mesh_stages import STEPS

from minillm_jax.config import ConfigError, ModelConfig
from minillm_jax.sharding import MESH_AXES, check_mesh, check_rows, make_mesh

HERE = Path(__file__).parent
MESHES = ("data=8", "fsdp=8", "data=2,tensor=4", "data=2,expert=4", "data=2,fsdp=2,tensor=2")


def simulated(script, *words, devices):
    """Run one of the scripts beside this file on simulated devices."""
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(HERE.parent),
    }
    command = [sys.executable, HERE / script, *words]
    result = subprocess.run([str(word) for word in command], env=env, capture_output=True, text=True, timeout=1700)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]


# --- What cannot be split ---------------------------------------------------------------------------------------------


def mesh_of(**sizes):
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        ({"tensor": 3}, {}, r"tensor=3: num_attention_heads 8 and .* of the model cannot be split over 3 devices; "
                            r"tensor can be 1, 2, 4 or 8$"),
        ({"tensor": 4}, {"vocab_size": 6402}, r"vocab_size 6402 .* tensor can be 1 or 2, .* --vocab_size 6404$"),
        ({"tensor": 8}, {"intermediate_size": 1364}, r"intermediate_size 1364 .* tensor can be 1, 2 or 4$"),
        ({"tensor": 2}, {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64},
         r"num_key_value_heads 3 of the model is neither a multiple nor a divisor of 2; tensor can be 1$"),
        ({"fsdp": 3}, {}, r"fsdp=3: hidden_size 512 of the model cannot be split over 3 devices"),
        ({"expert": 8}, {"use_moe": True}, r"expert=8: num_experts 4 .* expert can be 1, 2 or 4$"),
        ({"tensor": 8}, {"use_moe": True, "moe_intermediate_size": 100}, r"moe_intermediate_size 100 .* 1, 2 or 4$"),
    ],
)  # fmt: skip
def test_a_mesh_that_cannot_split_a_model_is_explained_with_what_would_work(sizes, changes, message):
    with pytest.raises(ConfigError, match=message):
        check_mesh(mesh_of(**sizes), dataclasses.replace(ModelConfig(), **changes))


def test_a_mesh_that_can_split_a_model_passes_even_with_fewer_key_value_heads_than_devices():
    check_mesh(mesh_of(data=2, fsdp=4, tensor=8), ModelConfig())  # two key-value heads
    check_mesh(mesh_of(expert=8), ModelConfig())  # without experts the axis holds rows alone
    check_mesh(mesh_of(expert=4, tensor=2), ModelConfig(use_moe=True))


def test_rows_that_cannot_be_shared_are_explained_with_what_would_work():
    check_rows(mesh_of(data=2, fsdp=2, tensor=2), 12)
    message = (
        r"--batch_size 12 .* over 8 devices \(data=2 \* fsdp=4\); use a multiple of 8 such as 8 or 16, or a --mesh "
        r"whose data, fsdp, expert multiply to 1, 2, 3, 4, 6 or 12$"
    )
    with pytest.raises(ConfigError, match=message):
        check_rows(mesh_of(data=2, fsdp=4), 12)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("data=2,model=4", r"cannot read 'model=4'; write axis=size with axis in data, fsdp, tensor, expert"),
        ("data=x", "cannot read 'data=x'"),
        ("data=2,data=4", "names data twice"),
        ("data=-1,fsdp=-1", "only one may be -1"),
        ("data=0", "sizes are positive"),
        ("tensor=4", r"multiply to 4, but there are 8 devices; .* or let data=-1 take what is left$"),
        ("data=-1,tensor=3", r"multiply to 3, but there are 8 devices; choose sizes whose product is 8$"),
    ],
)
def test_a_mesh_that_the_devices_do_not_make_is_explained(spec, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(spec, devices=jax.devices() * 8)


# --- Steps, generation and memory -------------------------------------------------------------------------------------


def programs(tmp_path, models, *meshes):
    simulated("mesh_programs.py", tmp_path / "found.json", "+".join(models), *meshes, devices=8)
    return json.loads((tmp_path / "found.json").read_text())


def assert_same_programs(found):
    for name, by_mesh in found.items():
        alone = by_mesh["None"]
        assert np.std(alone["tokens"][1]) > 0 and len(alone["steps"]) == 20
        for mesh, ours in by_mesh.items():
            np.testing.assert_allclose(ours["steps"], alone["steps"], rtol=1e-5, err_msg=f"{name} on {mesh}")
            assert ours["tokens"] == alone["tokens"], f"{name} on {mesh}"


def test_a_mesh_of_all_kinds_trains_and_generates_as_one_device_and_holds_a_part(tmp_path):
    found = programs(tmp_path, ["dense"], "data=2,fsdp=2,tensor=2")
    assert_same_programs(found)
    shares = found["dense"]["data=2,fsdp=2,tensor=2"]["shares"]
    assert len(shares) >= 3 * 8 and max(shares.values()) == 0.25  # parameters and both moments


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("model", "mesh"), [("moe", "data=2,expert=4"), ("two_kv_heads", "data=2,tensor=4")])
def test_experts_and_shared_key_value_heads_train_and_generate_as_on_one_device(tmp_path, model, mesh):
    assert_same_programs(programs(tmp_path, [model], mesh))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fully_sharded_steps_hold_an_eighth_and_gather_layer_by_layer(tmp_path):
    found = programs(tmp_path, ["dense"], "fsdp=8")
    assert_same_programs(found)
    alone, sharded = found["dense"]["None"], found["dense"]["fsdp=8"]
    assert set(sharded["shares"].values()) == {0.125}  # no device ever held a whole matrix: they were made in place
    # Norm scales, counters and the batch remain; of such a small model they are a few percent.
    assert alone["state_bytes"] / 8 < sharded["state_bytes"] < 1.1 * alone["state_bytes"] / 8
    for name in ("argument_bytes", "output_bytes"):
        assert sharded[name] < 1.1 * alone[name] / 8 + 2048
    # A layer's matrices are gathered when it runs, and are two-dimensional then; stacks of layers have three axes.
    gathered = [shape for shape in sharded["gathers"] if shape.startswith("f32[")]
    assert {"f32[32,48]", "f32[48,32]", "f32[32,32]"} <= set(gathered)
    stacks = ["f32[2,32,", "f32[2,48,32]"]
    assert not [shape for shape in gathered if shape.startswith(tuple(stacks))]


# --- Whole stages -----------------------------------------------------------------------------------------------------

STAGES = ("pretrain", "sft", "sft_lora", "dpo", "distill", "distill_reason", "train_rm", "ppo", "grpo")
VARIANTS = ("dpo_online", "distill_stored", "distill_on_policy", "grpo_lora")


def runs_on(number):
    """Runs on mesh `number`: every stage, in turn dense and with experts; and on the last one the variants."""
    runs = [name if (i + number) % 2 else f"moe/{name}" for i, name in enumerate(STAGES)]
    return [*runs, *VARIANTS] if number == len(MESHES) - 1 else runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, a tokenizer and models, and what one device measures."""
    folder = tmp_path_factory.mktemp("meshes")
    simulated("mesh_stages.py", "prepare", folder, devices=1)
    runs = [*runs_on(0), *runs_on(len(MESHES) - 2), *VARIANTS]
    simulated("mesh_stages.py", "run", folder, "alone", "data=1", ",".join(runs), devices=1)
    return folder


def measured(out_dir):
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: [row["loss"], row["grad_norm"]] for row in rows if "loss" in row}


def rollouts(out_dir):
    files = sorted((out_dir / "rollouts").glob("*.jsonl"))
    return [json.loads(line)["token_ids"] for file in files for line in file.read_text().splitlines()]


def assert_same_run(ours, theirs, steps=STEPS):
    found, expected = measured(ours), measured(theirs)
    assert list(found) == list(expected) and max(found) == steps
    # The loss of reinforcement is a difference of terms of order one: below 1e-2 its own rounding is all that is left.
    np.testing.assert_allclose([*found.values()], [*expected.values()], rtol=1e-5, atol=1e-7, err_msg=str(ours))
    assert rollouts(ours) == rollouts(theirs)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", range(len(MESHES)), ids=MESHES)
def test_every_stage_measures_on_a_mesh_what_one_device_does(folder, number):
    simulated("mesh_stages.py", "run", folder, f"mesh{number}", MESHES[number], ",".join(runs_on(number)), devices=8)
    for run in runs_on(number):
        assert_same_run(folder / f"mesh{number}" / run, folder / "alone" / run)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_evaluation_finds_on_a_mesh_what_one_device_does(folder):
    simulated("mesh_stages.py", "evaluate", folder, "alone", "data=1", devices=1)
    simulated("mesh_stages.py", "evaluate", folder, "mesh", "data=2,fsdp=2,tensor=2", devices=8)
    for task in ("lm", "pairs", "exact"):
        ours, theirs = (json.loads((folder / name / f"{task}.json").read_text()) for name in ("mesh", "alone"))
        assert theirs["rows"] >= 10 and list(ours) == list(theirs)
        for metric in set(theirs) - {"seconds", "tokens_per_second"}:
            expected = theirs[metric]
            assert ours[metric] == (pytest.approx(expected, rel=1e-5) if isinstance(expected, float) else expected)


CONSTANT = ["--schedule", "constant", "--warmup_ratio", "0"]  # a run's end then decides nothing
BEGUN = ("pretrain", "sft_lora", "grpo")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_goes_on_with_other_devices_and_another_mesh(folder):
    """Begun on eight devices and resumed on one, two and four; begun on one and resumed on eight."""

    def go(name, mesh, steps, devices, runs=BEGUN):
        simulated("mesh_stages.py", "run", folder, name, mesh, ",".join(runs), *CONSTANT, "--steps", steps,
                  devices=devices)  # fmt: skip

    go("whole", "data=1", 16, 1)
    go("eight", "fsdp=8", 8, 8)
    go("one", "data=1", 8, 1, ["pretrain"])
    for name in ("two", "four"):
        shutil.copytree(folder / "eight" / "pretrain", folder / name / "pretrain")
    go("two", "tensor=2", 16, 2, ["pretrain"])
    go("four", "data=2,expert=2", 16, 4, ["pretrain"])
    go("eight", "data=1", 16, 1)
    go("one", "data=2,fsdp=2,tensor=2", 16, 8, ["pretrain"])
    for name, runs in {"eight": BEGUN, "one": ["pretrain"], "two": ["pretrain"], "four": ["pretrain"]}.items():
        for run in runs:
            assert_same_run(folder / name / run, folder / "whole" / run, steps=16)
