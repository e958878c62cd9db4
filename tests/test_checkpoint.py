import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minillm_jax import checkpoint
from minillm_jax.checkpoint import Checkpointer, CheckpointError, load_params, load_tokenizer_files, read_model_config
from minillm_jax.config import PRESETS, OptimConfig
from minillm_jax.optim import make_optimizer

MODEL = dataclasses.replace(PRESETS["tiny"], rope_scaling=None, dropout=0.25)
TOKENIZER_FILES = {"tokenizer.json": '{"a": "ä\r\n"}', "tokenizer_config.json": "{}"}


def make_state(step: int, optimizer: str = "adamw", width: int = 8) -> dict:
    """A train state whose every number depends on `step`."""
    rng = np.random.default_rng(step)
    params = {
        "embed_tokens": {"embedding": rng.standard_normal((16, width), np.float32)},
        "layers": {"self_attn": {"q_proj": {"kernel": rng.standard_normal((2, width, width), np.float32)}}},
        "norm": {"scale": rng.standard_normal(width, np.float32)},
    }
    params = jax.tree.map(jnp.asarray, params)
    opt_state = make_optimizer(OptimConfig(optimizer=optimizer), 10, params).init(params)  # type: ignore[arg-type]

    def fill(x: jax.Array) -> jax.Array:
        return jnp.asarray(rng.standard_normal(x.shape) if x.dtype == jnp.float32 else step, x.dtype)

    return {
        "params": params,
        "opt_state": jax.tree.map(fill, opt_state),
        "step": jnp.asarray(step, jnp.int32),
        "key": jax.random.key(step),
    }


def abstract(state: dict) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def bits(leaf: jax.Array) -> bytes:
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf).tobytes()


def assert_identical(got: dict, expected: dict) -> None:
    """Same structure, dtypes, shapes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert bits(a) == bits(b), path


def checkpointer(run: Path, keep: int = 2) -> Checkpointer:
    return Checkpointer(run, keep=keep, model_config=MODEL, tokenizer_files=TOKENIZER_FILES)


def write_run(run: Path, steps: list[int], keep: int = 10) -> Path:
    with checkpointer(run, keep) as saver:
        for step in steps:
            saver.save(make_state(step), {"row": step})
    return run


def saved_steps(run: Path) -> list[str]:
    return sorted(entry.name for entry in (run / "checkpoints").iterdir())


def restore(run: Path, optimizer: str = "adamw") -> tuple:
    """Restore, and collect the reports."""
    reports: list[str] = []
    with checkpointer(run) as saver:
        return saver.restore(abstract(make_state(0, optimizer)), report=reports.append), reports


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1 and 2; copy it before changing it."""
    return write_run(tmp_path_factory.mktemp("run"), [1, 2])


@pytest.fixture
def run(two_checkpoints: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_checkpoints, tmp_path / "run"))


# ------------------------------------------------------------------------------------------------------- save, restore


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_restored_state_is_the_saved_one_bit_for_bit(tmp_path: Path, optimizer: str):
    state = make_state(7, optimizer)
    state["params"]["norm"]["scale"] = jnp.array([np.nan, -np.nan, np.inf, -0.0, 1e-45, 3e38, 1.1, 0.0], jnp.float32)
    data_state = {"epoch": 1, "rows": [3, 1], "nested": {"next": 12345678901234567890, "name": "ä"}}
    with checkpointer(tmp_path) as saver:
        saver.save(state, data_state)
    restored, reports = restore(tmp_path, optimizer)
    assert_identical(restored.state, state)
    assert (restored.step, restored.data_state, reports) == (7, data_state, [])
    a, b = (jax.random.normal(s["key"], (4,)) for s in (restored.state, state))
    np.testing.assert_array_equal(a, b)


def test_a_run_without_checkpoints_restores_nothing(tmp_path: Path):
    assert restore(tmp_path / "new") == (None, [])


def test_saved_state_is_not_touched_by_steps_that_it_is_donated_to(tmp_path: Path):
    state = make_state(3)
    state["params"]["layers"]["big"] = jnp.full((8, 1024, 1024), 3.0)  # large enough to be written while steps run
    is_key = lambda x: x.dtype == state["key"].dtype
    expected = jax.tree.map(lambda x: jax.random.clone(x) if is_key(x) else np.array(x, copy=True), state)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x if x.dtype == s["key"].dtype else x * 0 - 9, s), donate_argnums=0)
    shapes = abstract(state)
    with checkpointer(tmp_path) as saver:
        saver.save(state, {})
        for _ in range(3):
            state = step(state)
        jax.block_until_ready(state)
        restored = saver.restore(shapes)
    assert float(state["params"]["norm"]["scale"][0]) == -9.0
    assert restored is not None
    assert_identical(restored.state, expected)


def test_restored_state_can_be_donated(run: Path):
    restored, _ = restore(run)
    double = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p), donate_argnums=0)
    expected = jax.tree.map(lambda x: 2 * x, make_state(2)["params"])
    assert_identical(double(restored.state["params"]), expected)


def test_a_later_save_of_the_same_step_replaces_the_first(tmp_path: Path):
    with checkpointer(tmp_path) as saver:
        saver.save(make_state(5), {"which": "first"})
        saver.save(make_state(6) | {"step": jnp.int32(5)}, {"which": "second"})
    restored, _ = restore(tmp_path)
    assert restored.data_state == {"which": "second"}
    assert bits(restored.state["params"]["norm"]["scale"]) == bits(make_state(6)["params"]["norm"]["scale"])
    assert saved_steps(tmp_path) == ["5"]


def test_save_returns_before_the_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gate = threading.Event()
    with checkpointer(tmp_path) as saver:
        finish = saver._finish
        monkeypatch.setattr(saver, "_finish", lambda *args: (gate.wait(60), finish(*args)))
        saver.save(make_state(1), {})
        assert saver.latest_step is None
        gate.set()
        saver.wait()
        assert saver.latest_step == 1


# ----------------------------------------------------------------------------------------------------------- retention


def test_the_newest_and_the_best_checkpoints_stay(tmp_path: Path):
    losses = {1: 3.0, 2: 1.5, 3: 2.0, 4: None, 5: float("nan"), 6: 1.5}
    with checkpointer(tmp_path, keep=2) as saver:
        assert saver.best_step is None
        for step, loss in losses.items():
            saver.save(make_state(step), {}, None if loss is None else {"valid_loss": loss})
            saver.wait()
        assert saved_steps(tmp_path) == ["2", "5", "6"]
        assert (saver.best_step, saver.latest_step) == (2, 6)
        saver.save(make_state(7), {}, {"valid_loss": 1.0})
    assert saved_steps(tmp_path) == ["6", "7"]


def test_without_metrics_only_the_newest_stay(tmp_path: Path):
    write_run(tmp_path, [10, 9, 100], keep=1)
    assert saved_steps(tmp_path) == ["100"]


def test_keeping_nothing_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="keep must be at least 1"):
        checkpointer(tmp_path, keep=0)


# -------------------------------------------------------------------------------------------------------------- damage


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "garbage":
        path.write_bytes(b"\xff" * len(data))
    elif how == "one bit":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "garbage", "one bit"])
def test_damage_to_any_file_falls_back_to_the_checkpoint_before(run: Path, how: str, tmp_path: Path):
    newest = run / "checkpoints" / "2"
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    assert len(files) >= 15
    sound = Path(shutil.copytree(newest, tmp_path / "sound"))
    older = make_state(1)
    with checkpointer(run) as saver:
        for name in files:
            damage(newest / name, how)
            reports: list[str] = []
            restored = saver.restore(abstract(older), report=reports.append)
            assert restored is not None and restored.data_state == {"row": 1}, name
            assert_identical(restored.state, older)
            assert len(reports) == 1 and reports[0].startswith(f"checkpoint {newest} is damaged and passed over"), name
            assert saved_steps(run) == ["1", "2.damaged"]
            shutil.copytree(sound, newest)


def test_the_report_names_the_damaged_file(run: Path):
    damage(run / "checkpoints" / "2" / "data_state.json", "missing")
    assert restore(run)[1] == [f"checkpoint {run}/checkpoints/2 is damaged and passed over: data_state.json is missing"]


def test_a_half_written_folder_is_passed_over(run: Path):
    (run / "checkpoints" / "3" / "state").mkdir(parents=True)
    restored, reports = restore(run)
    assert restored.step == 2 and len(reports) == 1 and "manifest.json is missing" in reports[0]


def test_a_save_at_the_step_of_a_damaged_checkpoint_works(run: Path):
    damage(run / "checkpoints" / "2" / "metadata.json", "truncated")
    restore(run)
    write_run(run, [2])
    restored, reports = restore(run)
    assert (restored.step, reports) == (2, [])
    assert_identical(restored.state, make_state(2))
    assert saved_steps(run) == ["1", "2", "2.damaged"]


def test_a_run_with_only_damaged_checkpoints_stops_instead_of_starting_afresh(run: Path):
    for step in "12":
        damage(run / "checkpoints" / step / "manifest.json", "empty")
    for _ in range(2):  # the second start must not find an empty folder
        with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
            restore(run)
    with pytest.raises(CheckpointError, match="every checkpoint"):
        load_params(run, report=lambda text: None)


def test_leftovers_of_killed_saves_and_deletions_are_cleared(run: Path):
    folder = run / "checkpoints"
    (folder / "3.partial" / "state").mkdir(parents=True)
    (folder / "0.deleting").mkdir()
    shutil.copytree(folder / "1", folder / "1.replaced")  # killed after the new one took its place
    (folder / "2").rename(folder / "2.replaced")  # killed before
    checkpointer(run).close()
    assert saved_steps(run) == ["1", "2"]


# -------------------------------------------------------------------------------------------------- errors while saving


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tensorstore's late callbacks
def test_a_full_disk_is_a_clear_error_and_older_checkpoints_stay(run: Path):
    big = make_state(3)
    big["params"]["layers"]["big"] = jnp.ones((1024, 1024))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with checkpointer(run) as saver:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # writes fail as on a full disk
            saver.save(big, {})
            with pytest.raises(
                CheckpointError, match=r"the checkpoint of step 3 could not be written to .*checkpoints"
            ):
                saver.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        # Writes that were under way when the save failed may land after it was cleared away; no reader looks there.
        finished = lambda: [step for step in saved_steps(run) if step != "3.partial"]
        assert finished() == ["1", "2"]
        restored = saver.restore(abstract(make_state(0)))
        assert restored is not None and restored.step == 2
        saver.save(make_state(4), {})  # and the next save works
    assert finished() == ["2", "4"]


def test_a_failed_save_is_raised_by_the_next_one(tmp_path: Path):
    saver = checkpointer(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="step 1 could not be written"):
        saver.save(make_state(1), {})
    (tmp_path / "checkpoints").mkdir()
    saver.save(make_state(2), {})
    saver.close()
    assert saved_steps(tmp_path) == ["2"]


def test_a_failed_save_does_not_hide_what_ended_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object) -> None:
        raise CheckpointError("no space")

    with pytest.raises(ZeroDivisionError) as caught, checkpointer(tmp_path) as saver:
        monkeypatch.setattr(saver, "_finish", fail)
        saver.save(make_state(1), {})
        raise ZeroDivisionError
    assert caught.value.__notes__ == ["no space"]


def test_an_unwritable_run_folder_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write checkpoints to"):
        checkpointer(tmp_path / "file")


# ------------------------------------------------------------------------------------------------- another architecture


@pytest.mark.parametrize(
    "other, message",
    [
        (
            make_state(2, width=4),
            r"params\.embed_tokens\.embedding is float32\[16, 8\] there and float32\[16, 4\] here",
        ),
        (make_state(2, optimizer="muon"), r"opt_state\.1\.inner_states\.adam.* is nothing there"),
        (
            make_state(2) | {"params": {"norm": {}}},
            r"params\.embed_tokens\.embedding is float32\[16, 8\] there and nothing",
        ),
    ],
    ids=["width", "optimizer", "missing"],
)
def test_another_architecture_is_an_error_that_names_the_first_difference(run: Path, other: dict, message: str):
    with checkpointer(run) as saver, pytest.raises(CheckpointError, match=message):
        saver.restore(abstract(other))
    assert saved_steps(run) == ["1", "2"]  # it is not damage


# -------------------------------------------------------------------------------------------------- reading without run


def test_a_run_its_checkpoints_folder_and_one_checkpoint_can_be_loaded(two_checkpoints: Path):
    folder = two_checkpoints / "checkpoints"
    for path, step in ((two_checkpoints, 2), (folder, 2), (folder / "1", 1), (str(folder / "2"), 2)):
        config, params = load_params(path)
        assert config == MODEL == read_model_config(path)
        assert_identical(params, make_state(step)["params"])
        assert load_tokenizer_files(path) == TOKENIZER_FILES


def test_loading_passes_over_a_damaged_newest_checkpoint_and_moves_nothing(run: Path):
    damage(run / "checkpoints" / "2" / "metadata.json", "one bit")
    reports: list[str] = []
    assert_identical(load_params(run, report=reports.append)[1], make_state(1)["params"])
    assert len(reports) == 1 and "metadata.json" in reports[0]
    assert saved_steps(run) == ["1", "2"]
    with pytest.raises(CheckpointError, match=r"checkpoint .*2 is damaged: metadata\.json does not have the checksum"):
        load_params(run / "checkpoints" / "2")


def test_parameters_are_cast_while_loading(two_checkpoints: Path):
    params = load_params(two_checkpoints, dtype=jnp.bfloat16)[1]
    assert_identical(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_state(2)["params"]))


def test_parameters_load_without_reading_the_optimizer(two_checkpoints: Path, monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []
    restore_arrays = checkpoint._restore_arrays
    monkeypatch.setattr(
        checkpoint, "_restore_arrays", lambda f, asked: (read.extend(asked), restore_arrays(f, asked))[1]
    )
    load_params(two_checkpoints)
    assert sorted(read) == [
        "params.embed_tokens.embedding",
        "params.layers.self_attn.q_proj.kernel",
        "params.norm.scale",
    ]


def test_shardings_that_do_not_fit_are_an_error_that_names_the_parameter(two_checkpoints: Path):
    placement = jax.tree.map(lambda x: x.sharding, make_state(1)["params"])
    assert_identical(load_params(two_checkpoints, shardings=placement)[1], make_state(2)["params"])
    del placement["norm"]
    with pytest.raises(CheckpointError, match=r"params\.norm\.scale is only in one of the two"):
        load_params(two_checkpoints, shardings=placement)


@pytest.mark.parametrize("reader", [read_model_config, load_params, load_tokenizer_files])
def test_a_folder_without_checkpoints_is_a_clear_error(tmp_path: Path, reader: object):
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*expected a run folder"):
        reader(tmp_path / "nowhere")  # type: ignore[operator]


def test_a_checkpoint_without_model_or_tokenizer_says_so(tmp_path: Path):
    with Checkpointer(tmp_path, keep=1, model_config=None, tokenizer_files=None) as saver:
        saver.save(make_state(1), {})
    with pytest.raises(CheckpointError, match="without a model's shape"):
        read_model_config(tmp_path)
    with pytest.raises(CheckpointError, match="without a tokenizer; name one with --tokenizer_path"):
        load_tokenizer_files(tmp_path)


def test_a_checkpoint_describes_itself(two_checkpoints: Path):
    metadata = json.loads((two_checkpoints / "checkpoints" / "1" / "metadata.json").read_text())
    assert (metadata["step"], metadata["metrics"]) == (1, {})
    assert metadata["arrays"]["params.layers.self_attn.q_proj.kernel"] == ["float32", [2, 8, 8]]
    assert metadata["arrays"]["step"] == ["int32", []]


# ----------------------------------------------------------------------------------------------------------- subprocess

ON_ANOTHER_MESH = """
import sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from jax.sharding import NamedSharding, PartitionSpec as P
from minillm_jax import checkpoint
from minillm_jax.checkpoint import Checkpointer, load_params

x = {"w": jnp.arange(512, dtype=jnp.float32).reshape(2, 16, 16), "n": jnp.arange(3, dtype=jnp.float32)}
specs = {"params": {"w": P(None, "a", "b"), "n": P()}, "step": P(), "key": P()}
state = {"params": x, "step": jnp.int32(4), "key": jax.random.key(9)}

def shardings(a, b, flip):
    mesh = jax.make_mesh((a, b), ("a", "b"), devices=jax.devices()[: a * b])
    flipped = {P(None, "a", "b"): P(None, "b", "a")} if flip else {}
    return jax.tree.map(lambda s: NamedSharding(mesh, flipped.get(s, s)), specs, is_leaf=lambda s: isinstance(s, P))

with Checkpointer(sys.argv[1], keep=1, model_config=None, tokenizer_files=None) as saver:
    saver.save(jax.device_put(state, shardings(4, 2, False)), {})
    for layout in (shardings(4, 2, False), shardings(2, 4, True), shardings(1, 1, False), shardings(8, 1, False)):
        shapes = jax.tree.map(lambda l, s: jax.ShapeDtypeStruct(l.shape, l.dtype, sharding=s), state, layout)
        got = saver.restore(shapes).state
        for leaf, sharding in zip(jax.tree.leaves(got), jax.tree.leaves(layout), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (leaf.sharding, sharding)
        np.testing.assert_array_equal(got["params"]["w"], x["w"])
        np.testing.assert_array_equal(got["params"]["n"], x["n"])
        assert (got["key"] == state["key"]) and int(got["step"]) == 4
"""


@pytest.mark.slow
def test_a_sharded_state_restores_onto_other_meshes(tmp_path: Path):
    subprocess.run([sys.executable, "-c", ON_ANOTHER_MESH, str(tmp_path)], check=True, timeout=200)


SAVE_FOREVER = """
import itertools, sys
import jax, jax.numpy as jnp
from minillm_jax import checkpoint
from minillm_jax.checkpoint import Checkpointer

def state(step):
    return {"params": {"w": jnp.full((256, 1024), step, jnp.float32)}, "step": jnp.int32(step)}

with Checkpointer(sys.argv[1], keep=2, model_config=None, tokenizer_files={"tokenizer.json": "{}"}) as saver:
    restored = saver.restore(jax.eval_shape(lambda: state(0)), report=lambda text: sys.exit("DAMAGED " + text))
    start = restored.step if restored else 0
    if restored:
        assert (restored.state["params"]["w"] == start).all() and restored.data_state == {"row": start}
    for step in itertools.count(start + 1):
        print(step, flush=True)  # the step before the last one is on disk
        saver.save(state(step), {"row": step})
"""


@pytest.mark.slow
def test_sigkill_at_any_moment_leaves_only_whole_checkpoints(tmp_path: Path):
    done = 0
    for delay in (0.0, 0.04, 0.08, 0.12):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        first = int(process.stdout.readline())  # nothing to read when it found damage
        assert first > done
        for _ in range(3):
            done = int(process.stdout.readline()) - 2
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with Checkpointer(tmp_path, keep=2, model_config=None, tokenizer_files=None) as saver:
        assert saver.latest_step is not None and saver.latest_step >= done > 6
    assert all(name.isdigit() for name in saved_steps(tmp_path))
