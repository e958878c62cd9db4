import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from minillm_jax.chat import render
from minillm_jax.data import DataError, encode, tokenize_file
from minillm_jax.data.documents import Documents, concatenate_documents
from minillm_jax.tokenizer import Tokenizer, train_tokenizer

TEXTS = ["the cat sat on the mat", "中文也可以，没有问题。", "", "<|im_start|>user is plain text here", "a"]
CHAT = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS * 3, vocab_size=300)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def texts_file(folder: Path, texts: list[str] = TEXTS) -> Path:
    return write_rows(folder / "texts.jsonl", [{"text": text} for text in texts])


def ids(documents: Documents) -> list[list[int]]:
    return [
        documents.tokens[c][s : s + n].tolist()
        for c, s, n in zip(documents.chunk, documents.start, documents.length, strict=True)
    ]


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "tokens").glob("*"))


def test_a_document_is_begin_text_end_and_an_empty_text_is_no_document(tmp_path, tokenizer):
    found = tokenize_file(texts_file(tmp_path), "pretrain", tokenizer, cache_dir=str(tmp_path / "c"))
    whole = [
        [tokenizer.bos_token_id, *tokenizer.encode(text), tokenizer.eos_token_id] if text else [] for text in TEXTS
    ]
    assert ids(found.documents) == whole
    assert found.documents.masks is None
    assert found.documents.trained_tokens().tolist() == [max(0, len(document) - 1) for document in whole]


def test_a_conversation_is_what_rendering_gives(tmp_path, tokenizer):
    rows = [CHAT, [*CHAT, *CHAT], [{"role": "system", "content": "be brief"}, *CHAT]]
    file = write_rows(tmp_path / "a.jsonl", [{"conversations": row} for row in rows])
    documents = tokenize_file(file, "sft", tokenizer, cache_dir=str(tmp_path / "c")).documents
    rendered = [render(tokenizer, row) for row in rows]
    assert ids(documents) == [r.token_ids for r in rendered]
    assert documents.masks is not None
    assert np.concatenate(documents.masks).tolist() == [m for r in rendered for m in r.mask]
    assert documents.trained_tokens().tolist() == [sum(r.mask) for r in rendered]


def test_tools_beside_the_conversation_are_rendered(tmp_path, tokenizer):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    file = write_rows(tmp_path / "a.jsonl", [{"conversations": CHAT, "tools": tools}])
    documents = tokenize_file(file, "sft", tokenizer, cache_dir=str(tmp_path / "c")).documents
    assert ids(documents) == [render(tokenizer, CHAT, tools=tools).token_ids]


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_chunks_blocks_and_processes_do_not_change_the_tokens(tmp_path, tokenizer, monkeypatch, kind):
    texts = [f"{text} {i}" for i in range(40) for text in TEXTS]
    rows = [{"text": t, "conversations": [{"role": "user", "content": t}, *CHAT]} for t in texts]
    file = write_rows(tmp_path / "a.jsonl", rows)
    whole = tokenize_file(file, kind, tokenizer, cache_dir=str(tmp_path / "a")).documents
    monkeypatch.setattr(encode, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(encode, "BLOCK_TOKENS", 700)
    small = tokenize_file(file, kind, tokenizer, cache_dir=str(tmp_path / "b"), num_proc=2).documents
    assert len(whole.tokens) == 1
    assert len(small.tokens) > 3
    assert ids(small) == ids(whole)
    np.testing.assert_array_equal(small.trained_tokens(), whole.trained_tokens())
    backwards = np.arange(len(small))[::-1]
    np.testing.assert_array_equal(small.take(backwards).trained_tokens(), whole.trained_tokens()[::-1])
    assert ids(concatenate_documents([small, whole])) == ids(whole) * 2


def test_tokens_are_reused_when_nothing_changed(tmp_path, tokenizer, monkeypatch):
    file, cache = texts_file(tmp_path), str(tmp_path / "c")
    first = tokenize_file(file, "pretrain", tokenizer, cache_dir=cache)
    monkeypatch.setattr(encode, "_tokenize", None)  # a second tokenisation would fail
    second = tokenize_file(file, "pretrain", tokenizer, cache_dir=cache)
    assert (first.reused, second.reused) == (False, True)
    assert ids(second.documents) == ids(first.documents)


def test_another_file_time_tokenizer_or_kind_is_tokenised_anew(tmp_path, tokenizer):
    cache = str(tmp_path / "c")
    file = write_rows(tmp_path / "a.jsonl", [{"text": "cat", "conversations": CHAT}])

    def reused(kind: str = "pretrain", with_tokenizer: Tokenizer = tokenizer) -> bool:
        return tokenize_file(file, kind, with_tokenizer, cache_dir=cache).reused

    assert [reused(), reused()] == [False, True]
    assert [reused("sft"), reused("sft")] == [False, True]
    other = train_tokenizer(["something else entirely"] * 3, vocab_size=290)
    assert [reused(with_tokenizer=other), reused(with_tokenizer=other)] == [False, True]
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert [reused(), reused()] == [False, True]
    write_rows(file, [{"text": "dogs"}])
    assert not reused()


def test_another_chat_template_renders_anew(tmp_path, tokenizer):
    file, cache = write_rows(tmp_path / "a.jsonl", [{"conversations": CHAT}]), str(tmp_path / "c")
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    other = Tokenizer.from_files(tokenizer.files() | {"chat_template.jinja": template})
    first = tokenize_file(file, "sft", tokenizer, cache_dir=cache)
    second = tokenize_file(file, "sft", other, cache_dir=cache)
    assert not second.reused
    assert ids(second.documents) != ids(first.documents)


def test_the_cache_folder_is_the_argument_then_the_environment_then_home(monkeypatch):
    monkeypatch.setenv("MINILLM_CACHE", "/elsewhere")
    assert encode.cache_folder("/here") == Path("/here/tokens")
    assert encode.cache_folder(None) == Path("/elsewhere/tokens")
    monkeypatch.delenv("MINILLM_CACHE")
    assert encode.cache_folder(None) == Path.home() / ".cache/minillm_jax/tokens"


def test_a_bad_row_stops_and_leaves_no_cache(tmp_path, tokenizer):
    file = write_rows(tmp_path / "a.jsonl", [{"text": "a"}, {"text": None}])
    with pytest.raises(DataError) as caught:
        tokenize_file(file, "pretrain", tokenizer, cache_dir=str(tmp_path / "c"))
    assert str(caught.value) == f"{file}:2: text: must be a string, not null"
    assert entries(tmp_path / "c") == []


def test_a_cache_made_by_skipping_still_stops_a_run_that_does_not_skip(tmp_path, tokenizer):
    file = write_rows(tmp_path / "a.jsonl", [{"text": "a"}, {"text": None}, {"text": "b"}])
    options = {"cache_dir": str(tmp_path / "c")}
    for reused in (False, True):
        found = tokenize_file(file, "pretrain", tokenizer, on_bad_row="skip", **options)
        assert (found.reused, len(found.documents), found.skipped.total) == (reused, 2, 1)
        assert found.skipped.lines() == [
            "skipped 1 bad row(s):",
            "  1 x text: must be a string",
            f"  the first: {file}:2: text: must be a string, not null",
        ]
    with pytest.raises(DataError, match=":2: text: must be a string, not null"):
        tokenize_file(file, "pretrain", tokenizer, **options)


def test_a_conversation_that_the_template_refuses_is_a_bad_row(tmp_path, tokenizer):
    template = "{{ raise_exception('roles must alternate') if messages|length > 2 }}{{ messages[0].content }}"
    strict = Tokenizer.from_files(tokenizer.files() | {"chat_template.jinja": template})
    file = write_rows(tmp_path / "a.jsonl", [{"conversations": CHAT}, {"conversations": CHAT * 2}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: conversations: .*roles must alternate"):
        tokenize_file(file, "sft", strict, cache_dir=str(tmp_path / "c"))
    found = tokenize_file(file, "sft", strict, on_bad_row="skip", cache_dir=str(tmp_path / "c"))
    assert (len(found.documents), found.skipped.total) == (1, 1)


def test_a_killed_tokenisation_leaves_nothing_that_is_used(tmp_path, tokenizer):
    file, cache = texts_file(tmp_path, TEXTS * 50), tmp_path / "c"
    tokenizer.save(tmp_path / "tok")
    script = f"""
import os, signal
from minillm_jax.data import encode
from minillm_jax.tokenizer import Tokenizer
encode.CHUNK_BYTES = encode.BLOCK_TOKENS = 500
merge, calls = encode._merge, []
def killing(chunks):
    calls.append(1)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return merge(chunks)
encode._merge = killing
from pathlib import Path
tokenizer = Tokenizer.load({str(tmp_path / "tok")!r})
encode.tokenize_file(Path({str(file)!r}), "pretrain", tokenizer, cache_dir={str(cache)!r})
"""
    killed = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (left,) = entries(cache)
    assert left.startswith("unfinished-")
    assert (cache / "tokens" / left / "documents.arrow").stat().st_size > 0
    found = tokenize_file(file, "pretrain", tokenizer, cache_dir=str(cache))
    assert not found.reused
    assert len(found.documents) == len(TEXTS) * 50


def test_what_killed_processes_left_is_swept_after_a_day(tmp_path, tokenizer):
    root = tmp_path / "c" / "tokens"
    for name, age in (("unfinished-old", 2 * 86400), ("unfinished-new", 60)):
        (root / name).mkdir(parents=True)
        os.utime(root / name, (time.time() - age,) * 2)
    tokenize_file(texts_file(tmp_path), "pretrain", tokenizer, cache_dir=str(tmp_path / "c"))
    assert "unfinished-old" not in entries(tmp_path / "c")
    assert "unfinished-new" in entries(tmp_path / "c")


def test_of_two_processes_that_race_one_entry_remains_and_both_read_it(tmp_path, tokenizer, monkeypatch):
    file, cache, publish = texts_file(tmp_path), str(tmp_path / "c"), encode._publish
    other = []

    def publish_second(folder: Path, entry: Path) -> None:
        monkeypatch.setattr(encode, "_publish", publish)
        other.append(tokenize_file(file, "pretrain", tokenizer, cache_dir=cache))
        publish(folder, entry)

    monkeypatch.setattr(encode, "_publish", publish_second)
    mine = tokenize_file(file, "pretrain", tokenizer, cache_dir=cache)
    assert ids(mine.documents) == ids(other[0].documents)
    assert len(entries(tmp_path / "c")) == 1


def test_many_at_once_agree(tmp_path, tokenizer):
    file, found = texts_file(tmp_path, TEXTS * 20), []

    def work() -> None:
        found.append(ids(tokenize_file(file, "pretrain", tokenizer, cache_dir=str(tmp_path / "c")).documents))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(one == found[0] for one in found)
    assert len(entries(tmp_path / "c")) == 1


def test_an_entry_cut_short_by_a_crash_is_made_again(tmp_path, tokenizer):
    file, cache = texts_file(tmp_path), tmp_path / "c"
    first = ids(tokenize_file(file, "pretrain", tokenizer, cache_dir=str(cache)).documents)
    (entry,) = entries(cache)
    arrow = cache / "tokens" / entry / "documents.arrow"
    arrow.write_bytes(arrow.read_bytes()[:-100])
    again = tokenize_file(file, "pretrain", tokenizer, cache_dir=str(cache))
    assert not again.reused
    assert ids(again.documents) == first


def test_a_disk_without_room_says_where_and_what_to_do(tmp_path, tokenizer):
    file, limits = texts_file(tmp_path, TEXTS * 500), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # the nearest thing to a full disk without root
    try:
        with pytest.raises(DataError) as caught:
            tokenize_file(file, "pretrain", tokenizer, cache_dir=str(tmp_path / "c"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(caught.value) == (
        f"{tmp_path / 'c' / 'tokens'}: the token cache cannot be written: {os.strerror(errno.EFBIG)}; "
        "make room there, or choose another folder with --cache_dir or $MINILLM_CACHE"
    )
    assert entries(tmp_path / "c") == []


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, tokenizer, monkeypatch):
    file, write_arrow = texts_file(tmp_path), encode._write_arrow

    def grow(*args, **kwargs):
        write_arrow(*args, **kwargs)
        texts_file(tmp_path, [*TEXTS, "more"])

    monkeypatch.setattr(encode, "_write_arrow", grow)
    with pytest.raises(DataError, match="changed while it was being read"):
        tokenize_file(file, "pretrain", tokenizer, cache_dir=str(tmp_path / "c"))
    assert entries(tmp_path / "c") == []


def test_progress_is_reported_while_a_file_is_long(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(encode, "_REPORT_SECONDS", -1.0)
    lines: list[str] = []
    file = texts_file(tmp_path)
    tokenize_file(file, "pretrain", tokenizer, cache_dir=str(tmp_path / "c"), report=lines.append)
    assert len(lines) == 1
    assert lines[0].startswith(f"tokenising {file}: 100%, ")
