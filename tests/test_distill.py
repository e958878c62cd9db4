"""What surrounds distillation: opening a teacher, storing it, on-policy batches, and the hook of the loop."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_distillation import TEACHER, TEACHER_KEY
from test_trainer import KEY, TINY, draw

from minillm_jax import on_policy
from minillm_jax import teacher as teacher_module
from minillm_jax.checkpoint import Checkpointer
from minillm_jax.config import ComputeConfig, ConfigError, DataConfig, OptimConfig, RunConfig
from minillm_jax.data import DataError, load_rows
from minillm_jax.distillation import top_k_logprobs
from minillm_jax.losses import language_model_loss
from minillm_jax.model import forward, init_params, param_axes
from minillm_jax.on_policy import sample_replies
from minillm_jax.sharding import make_mesh
from minillm_jax.teacher import open_teacher, store_teacher
from minillm_jax.tokenizer import train_tokenizer
from minillm_jax.trainer import Job, train
from train.distill import DistillStageConfig, TeacherConfig, kind_of_rows, with_teachers_tokenizer

TEXTS = ["the cat sat on the mat", "a dog sees a red house", "under the old tree a small cat finds the blue dog"]
WORDS = " ".join(TEXTS).split()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 3, vocab_size=290)


@pytest.fixture(scope="module")
def student(tokenizer):
    return dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)


@pytest.fixture(scope="module")
def teacher_folder(tokenizer, tmp_path_factory):
    """A run of a teacher with one checkpoint."""
    folder = tmp_path_factory.mktemp("teacher")
    save_model(folder, dataclasses.replace(TEACHER, vocab_size=tokenizer.vocab_size), tokenizer)
    return folder


def save_model(folder, config, tokenizer, step=1):
    state = {"params": draw(config, TEACHER_KEY), "step": np.int32(step)}
    with Checkpointer(folder, keep=1, model_config=config, tokenizer_files=tokenizer.files()) as checkpointer:
        checkpointer.save(state, {}, None)


@pytest.fixture
def rows(tokenizer, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 5))
    return load_rows([str(path)], "pretrain", tokenizer, 24, cache_dir=str(tmp_path / "c"), report=lambda line: None)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Opening a teacher


def test_a_teacher_of_another_shape_and_the_same_vocabulary_is_opened(teacher_folder, student, tokenizer):
    teacher = open_teacher(str(teacher_folder), student, tokenizer, 64)
    params = teacher.load(make_mesh(), ComputeConfig())
    assert teacher.config.hidden_size == TEACHER.hidden_size != student.hidden_size
    jax.tree.map(np.testing.assert_array_equal, params, draw(teacher.config, TEACHER_KEY))


def test_another_chat_template_is_the_same_vocabulary(teacher_folder, student, tokenizer):
    open_teacher(str(teacher_folder), student, tokenizer.with_system_prompt("be brief"), 64)


def test_vocabularies_of_other_sizes_are_refused(teacher_folder, student, tokenizer):
    wider = dataclasses.replace(student, vocab_size=student.vocab_size + 1)
    with pytest.raises(ConfigError, match=f"vocabulary of {student.vocab_size} and the student one of"):
        open_teacher(str(teacher_folder), wider, tokenizer, 64)


def test_vocabularies_of_the_same_size_are_compared_token_by_token(tokenizer, student, tmp_path):
    other = train_tokenizer(["zebras zigzag over quiet quays"] * 3 + TEXTS, vocab_size=tokenizer.vocab_size)
    save_model(tmp_path, dataclasses.replace(TEACHER, vocab_size=other.vocab_size), other)
    with pytest.raises(ConfigError, match=r"another vocabulary than the student: token \d+ is '"):
        open_teacher(str(tmp_path), dataclasses.replace(student, vocab_size=other.vocab_size), tokenizer, 64)


def test_a_context_shorter_than_a_row_is_refused(tokenizer, student, tmp_path):
    save_model(
        tmp_path, dataclasses.replace(TEACHER, vocab_size=student.vocab_size, max_position_embeddings=16), tokenizer
    )
    with pytest.raises(ConfigError, match="--max_seq_len 64 is more than the 16 positions"):
        open_teacher(str(tmp_path), student, tokenizer, 64)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"on_policy": 1.5}, "--on_policy must lie"),
        ({"teacher_top_k": -1}, "--teacher_top_k must not be negative"),
        ({"on_policy": 0.5, "teacher_top_k": 4}, "--on_policy needs the teacher at every step"),
    ],
)
def test_settings_that_cannot_work_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        TeacherConfig("out/teacher", **values)


def stage(data, **run):
    return DistillStageConfig(RunConfig("out", **run), DataConfig((str(data),)), TeacherConfig("out/teacher"), TINY)


@pytest.mark.parametrize(("field", "kind"), [("text", "pretrain"), ("conversations", "sft")])
def test_the_kind_of_rows_is_told_from_the_first_file(tmp_path, field, kind):
    (tmp_path / "rows.jsonl").write_text(json.dumps({field: "x"}) + "\n")
    assert kind_of_rows(stage(tmp_path)) == kind


def test_rows_of_another_kind_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"chosen": []}\n')
    with pytest.raises(DataError, match="holds preference rows"):
        kind_of_rows(stage(tmp_path))


def test_a_student_without_a_tokenizer_takes_the_teachers(tmp_path):
    assert with_teachers_tokenizer(stage(tmp_path)).run.tokenizer_path == "out/teacher"
    assert with_teachers_tokenizer(stage(tmp_path, tokenizer_path="t")).run.tokenizer_path == "t"
    assert with_teachers_tokenizer(stage(tmp_path, model_path="m")).run.tokenizer_path is None


# ---------------------------------------------------------------------------------------------------------------------
# A stored teacher


def store(teacher, rows, folder, k=5, temperature=2.0, lines=None, batch_size=3):
    mesh, calls = make_mesh(), []

    def load():
        calls.append(1)
        return teacher.load(mesh, ComputeConfig())

    report = (lambda line: None) if lines is None else lines.append
    taught = store_teacher(
        teacher, rows, folder, k=k, temperature=temperature, batch_size=batch_size,
        mesh=mesh, compute=ComputeConfig(), load=load, report=report,
    )  # fmt: skip
    return taught, len(calls)


@pytest.fixture
def teacher(teacher_folder, student, tokenizer):
    return open_teacher(str(teacher_folder), student, tokenizer, 24)


def test_a_store_holds_what_the_teacher_says(teacher, rows, tmp_path):
    taught, _ = store(teacher, rows, tmp_path / "store")
    assert len(taught) == len(rows)
    batch = taught.gather([2, 0])
    plain = rows.gather([2, 0])
    jax.tree.map(np.testing.assert_array_equal, {name: batch[name] for name in plain}, plain)
    logits = forward(
        draw(teacher.config, TEACHER_KEY), teacher.config, batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    ids, logprobs = top_k_logprobs(logits, 5, 2.0)
    real = plain["segment_ids"] > 0
    np.testing.assert_allclose(batch["teacher_logprobs"][real], np.asarray(logprobs)[real], rtol=2e-3, atol=1e-3)
    assert (batch["teacher_ids"] == ids)[real].mean() > 0.99  # ties may fall either way
    assert batch["teacher_ids"].dtype == np.int32


def test_a_store_is_made_once_and_again_when_anything_differs(teacher, rows, tmp_path):
    folder = tmp_path / "store"
    first, calls = store(teacher, rows, folder)
    assert calls == 1
    again, calls = store(teacher, rows, folder)
    assert calls == 0
    np.testing.assert_array_equal(first.ids, again.ids)
    assert store(teacher, rows, folder, temperature=1.0)[1] == 1
    assert store(teacher, rows, folder, k=4)[0].ids.shape[-1] == 4
    fewer = dataclasses.replace(rows, documents=rows.documents.take(np.arange(len(rows.documents))[::-1]))
    assert store(teacher, fewer, folder, k=4)[1] == 1


def test_an_interrupted_store_goes_on_where_it_was(teacher, rows, tmp_path, monkeypatch):
    whole, _ = store(teacher, rows, tmp_path / "whole")
    monkeypatch.setattr(teacher_module, "FLUSH_ROWS", 1)
    asked = teacher_module._top_k
    calls = []

    def dies(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return asked(*args)

    monkeypatch.setattr(teacher_module, "_top_k", dies)
    with pytest.raises(KeyboardInterrupt):
        store(teacher, rows, tmp_path / "broken", batch_size=2)
    lines = []
    resumed, _ = store(teacher, rows, tmp_path / "broken", batch_size=2, lines=lines)
    assert f"about {len(rows) - 4} rows" in lines[0]
    np.testing.assert_array_equal(resumed.ids, whole.ids)
    np.testing.assert_allclose(resumed.logprobs, whole.logprobs, rtol=2e-3)


@pytest.mark.parametrize("k", [0, 10_000])
def test_an_impossible_number_of_tokens_is_refused(teacher, rows, tmp_path, k):
    with pytest.raises(ConfigError, match="--teacher_top_k must lie between 1 and"):
        store(teacher, rows, tmp_path / "store", k=k)


# ---------------------------------------------------------------------------------------------------------------------
# On-policy batches


@pytest.fixture(scope="module")
def chats(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    with (folder / "chat.jsonl").open("w") as file:
        for i in range(12):
            turns = [{"role": "user", "content": " ".join(WORDS[: 3 + i])}]
            turns += [{"role": "assistant", "content": " ".join(WORDS[i : i + 6])}]
            file.write(json.dumps({"conversations": turns}) + "\n")
    path = [str(folder / "chat.jsonl")]
    return load_rows(path, "sft", tokenizer, 160, cache_dir=str(folder / "c"), report=lambda line: None)[0]


def replaced(batch, student, tokenizer, fraction=0.5, seed=1, step=3, key=KEY):
    params = draw(student, key)
    return sample_replies(batch, params, student, tokenizer.eos_token_ids, fraction=fraction, seed=seed, step=step)


def test_replies_of_chosen_rows_are_the_students_and_others_stay(student, tokenizer, chats):
    batch = chats.gather(range(4))
    before = {name: array.copy() for name, array in batch.items()}
    new = replaced(batch, student, tokenizer)
    jax.tree.map(np.testing.assert_array_equal, batch, before)
    rows = new["sampled"].any(axis=1)
    assert rows.sum() == 2
    for name, array in batch.items():
        np.testing.assert_array_equal(new[name][~rows], array[~rows])
        assert new[name].dtype == array.dtype
    assert (new["weights"][rows] == new["sampled"][rows]).all()
    for row in np.flatnonzero(rows):
        old_segments, new_segments = (set(b["segment_ids"][row].tolist()) - {0} for b in (batch, new))
        assert old_segments == new_segments
        for segment in new_segments:
            old, ours = batch["segment_ids"][row] == segment, new["segment_ids"][row] == segment
            prompt = int((batch["weights"][row][old] > 0).argmax()) + 1
            np.testing.assert_array_equal(new["tokens"][row][ours][:prompt], batch["tokens"][row][old][:prompt])
            np.testing.assert_array_equal(new["tokens"][row][ours][1:], new["targets"][row][ours][:-1])
            np.testing.assert_array_equal(new["positions"][row][ours], np.arange(ours.sum()))
            assert (new["weights"][row][ours] == (np.arange(ours.sum()) >= prompt - 1)).all()
            assert not set(new["tokens"][row][ours][prompt:].tolist()) & set(tokenizer.eos_token_ids)
    padding = new["segment_ids"] == 0
    assert not any(array[padding].any() for array in new.values())


def test_samples_are_likely_under_the_student_and_depend_on_seed_and_step_alone(student, tokenizer, chats):
    batch = chats.gather(range(4))
    one, same = (replaced(batch, student, tokenizer) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    for other in (replaced(batch, student, tokenizer, seed=2), replaced(batch, student, tokenizer, step=4)):
        assert (other["tokens"] != one["tokens"]).any()


def test_raw_text_keeps_its_first_half(student, tokenizer, rows):
    batch = rows.gather(range(2))
    new = replaced(batch, student, tokenizer, fraction=1.0)
    assert new["sampled"].any(axis=1).all()
    for row in range(2):
        length = int((batch["segment_ids"][row] == 1).sum())
        half = (length + 1) // 2
        np.testing.assert_array_equal(new["tokens"][row][:half], batch["tokens"][row][:half])
        assert new["weights"][row][: half - 1].sum() == 0
        assert new["weights"][row][half - 1] == 1


@pytest.mark.parametrize(("fraction", "rows"), [(0.0, {0}), (0.25, {1}), (1.0, {4}), (0.4, {1, 2})])
def test_the_share_of_rows_is_met_on_average(monkeypatch, student, tokenizer, chats, fraction, rows):
    monkeypatch.setattr(on_policy, "_sample", lambda params, config, prompts, *_: [[7, 8, 9]] * len(prompts))
    options = {"fraction": fraction, "seed": 1}
    new = [sample_replies(chats.gather(range(4)), {}, student, (), step=step, **options) for step in range(12)]
    assert {int(batch["sampled"].any(axis=1).sum()) for batch in new} == rows


# ---------------------------------------------------------------------------------------------------------------------
# The hook of the loop


def test_a_transformed_batch_is_what_the_step_sees(student, tokenizer, rows, tmp_path):
    seen = []

    def no_loss(state, batch, step):
        seen.append((step, int(state["step"])))
        return batch | {"weights": np.zeros_like(batch["weights"])}

    optim, shapes = OptimConfig(), jax.eval_shape(lambda key: init_params(student, key), KEY)
    job = Job(
        RunConfig(str(tmp_path / "run"), steps=3, log_interval=1), optim, student,
        language_model_loss(student, ComputeConfig()), lambda shardings: draw(student, KEY), shapes,
        param_axes(student), rows, None, 2, 24, tokenizer.files(), {}, transform_batch=no_loss,
    )  # fmt: skip
    assert train(job) == 0
    assert seen == [(1, 0), (2, 1), (3, 2)]
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["trained_tokens"] == 0 for row in logged)
