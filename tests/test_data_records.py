import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm_jax.data import DataError, SkipReport, read_records
from minillm_jax.data.records import PretrainRecord
from minillm_jax.data.sources import parse_path_spec, resolve_sources

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}


def write_lines(path: Path, *lines: object) -> str:
    """Write rows given as JSON values, as text, or as raw bytes."""
    encoded = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    path.write_bytes(b"".join(line + b"\n" for line in encoded))
    return str(path)


GOOD = {
    "pretrain": {"text": "x"},
    "sft": {"conversations": [USER, ASSISTANT]},
    "preference": {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]},
    "rl": {"prompt": "1+1", "answer": "2"},
    "choice": {"query": "q", "choices": ["a", "b"], "gold": 1},
    "pairs": {"good": "g", "bad": "b"},
    "exact": {"prompt": "p", "answer": "a"},
}


@pytest.mark.parametrize("kind", GOOD)
def test_each_kind_reads_its_row_and_knows_where_it_stands(tmp_path, kind):
    path = write_lines(tmp_path / "a.jsonl", "", GOOD[kind] | {"unknown": 1})
    (record,) = read_records([path], kind)
    assert (record.file, record.line) == (path, 2)
    fields = {name: value for name, value in vars(record).items() if name in GOOD[kind]}
    assert fields == {key: tuple(v) if key == "choices" else v for key, v in GOOD[kind].items() if key != "prompt"} | (
        {"prompt": "p"} if kind == "exact" else {}
    )


def row(kind: str, **changes: object) -> dict:
    return GOOD[kind] | changes


@pytest.mark.parametrize(("kind", "name"), [("pairs", "task"), ("exact", "family")])
def test_a_row_may_name_its_group(tmp_path, kind, name):
    path = write_lines(tmp_path / "a.jsonl", row(kind, **{name: "g"}), row(kind, **{name: None}), GOOD[kind])
    assert [getattr(record, name) for record in read_records([path], kind)] == ["g", None, None]


def turns(*items: object) -> dict:
    return {"conversations": list(items)}


BAD_ROWS = [
    ("pretrain", "{", "row: is not JSON: Expecting property name enclosed in double quotes at character 2"),
    ("pretrain", "[1]", "row: must be a JSON object, not a list"),
    ("pretrain", "null", "row: must be a JSON object, not null"),
    ("pretrain", b'{"text": "caf\xe9"}', "row: is not UTF-8 (byte 14 of the line); save the file as UTF-8"),
    ("pretrain", b"\xff\xfe{\x00", "row: is not UTF-8 (byte 1 of the line); save the file as UTF-8"),
    ("pretrain", {"txt": "x"}, "text: is missing"),
    ("pretrain", {"text": None}, "text: must be a string, not null"),
    ("pretrain", {"text": 3}, "text: must be a string, not the number 3; write it in quotes"),
    ("pretrain", {"text": True}, "text: must be a string, not true"),
    ("pretrain", {"text": ["x"]}, "text: must be a string, not a list"),
    ("pretrain", r'{"text": "a\ud800"}', r"text: holds half of a surrogate pair \ud800 at character 1"),
    ("sft", {"text": "x"}, "conversations: is missing"),
    ("sft", {"conversations": "x"}, "conversations: must be a list, not a string"),
    ("sft", {"conversations": []}, "conversations: is empty"),
    ("sft", turns(USER), "conversations: has no assistant turn to learn from"),
    ("sft", turns(USER, "x"), "conversations[1]: must be an object with role and content, not a string"),
    (
        "sft",
        turns(USER, ASSISTANT, {"role": "robot", "content": "x"}),
        'conversations[2].role: unknown role "robot"; use system, user, assistant or tool',
    ),
    (
        "sft",
        turns({"content": "x"}, ASSISTANT),
        "conversations[0].role: must be a string; use system, user, assistant or tool",
    ),
    (
        "sft",
        turns({"role": "user", "content": 7}, ASSISTANT),
        "conversations[0].content: must be a string or null, not a number",
    ),
    ("sft", turns(USER, {"role": "assistant", "content": None}), "conversations[1].content: is missing"),
    ("sft", turns(USER, {"role": "assistant"}), "conversations[1].content: is missing"),
    (
        "sft",
        turns(USER, {"role": "assistant", "content": "", "tool_calls": [{"arguments": {}}]}),
        "conversations[1].tool_calls[0].name: must be a string, not null",
    ),
    (
        "sft",
        turns({"role": "system", "content": "", "tools": 5}, ASSISTANT),
        "conversations[0].tools: must be a list, not a number",
    ),
    ("sft", turns(USER, ASSISTANT) | {"tools": {"a": 1}}, "tools: must be a list, not an object"),
    (
        "sft",
        '{"conversations": [{"role": "user", "content": "\\uDFFF"}]}',
        r"conversations[0].content: holds half of a surrogate pair \udfff at character 0",
    ),
    ("preference", {"chosen": [USER, ASSISTANT]}, "rejected: is missing"),
    ("preference", row("preference", chosen=[]), "chosen: is empty"),
    ("preference", row("preference", rejected=[USER]), "rejected[0].role: the last turn must be the assistant's"),
    (
        "preference",
        row("preference", chosen=[ASSISTANT, {}]),
        "chosen[1].role: must be a string; use system, user, assistant or tool",
    ),
    ("rl", {"answer": "2"}, "prompt: is missing (and so is conversations)"),
    ("rl", {"prompt": None}, "prompt: must be a string, not null"),
    ("rl", {"prompt": "x", "answer": 2}, "answer: must be a string, not the number 2; write it in quotes"),
    ("rl", turns(ASSISTANT), "conversations: has no user turn to answer"),
    ("choice", row("choice", choices=[]), "choices: is empty"),
    ("choice", row("choice", choices=["a", 1]), "choices[1]: must be a string, not the number 1"),
    ("choice", {"query": "q", "choices": ["a"]}, "gold: is missing"),
    ("choice", row("choice", gold=2), "gold: must be the index of a choice (0 to 1), not 2"),
    ("choice", row("choice", gold=-1), "gold: must be the index of a choice (0 to 1), not -1"),
    ("choice", row("choice", gold=True), "gold: must be a whole number, not true"),
    ("choice", row("choice", gold="0"), "gold: must be a whole number, not a string"),
    ("pairs", {"good": "g"}, "bad: is missing"),
    ("exact", {"prompt": "p", "answer": 4}, "answer: must be a string, not the number 4; write it in quotes"),
    ("pairs", row("pairs", task=1), "task: must be a string, not the number 1; write it in quotes"),
    ("exact", row("exact", family=["add"]), "family: must be a string, not a list"),
]


@pytest.mark.parametrize(("kind", "bad", "message"), BAD_ROWS)
def test_a_bad_row_gives_file_line_field_and_what_is_wrong(tmp_path, kind, bad, message):
    path = write_lines(tmp_path / "a.jsonl", GOOD[kind], bad)
    with pytest.raises(DataError) as caught:
        list(read_records([path], kind))
    assert str(caught.value) == f"{path}:2: {message}"


@pytest.mark.parametrize(("kind", "bad", "message"), BAD_ROWS)
def test_skipping_counts_a_bad_row_and_keeps_the_others(tmp_path, kind, bad, message):
    path, report = write_lines(tmp_path / "a.jsonl", GOOD[kind], bad, GOOD[kind]), SkipReport()
    assert [record.line for record in read_records([path], kind, "skip", report)] == [1, 3]
    assert report.total == 1
    assert report.examples == [f"{path}:2: {message}"]


def test_skipped_rows_are_grouped_by_what_is_wrong_not_by_where(tmp_path):
    rows = [turns(*[USER] * n, {"role": "assistant"}) for n in range(1, 4)]
    path, report = write_lines(tmp_path / "a.jsonl", *rows, {"conversations": []}), SkipReport()
    assert list(read_records([path], "sft", "skip", report)) == []
    assert report.counts == {"conversations[].content: is missing": 3, "conversations: is empty": 1}
    assert report.lines()[0] == "skipped 4 bad row(s):"
    assert report.lines()[1] == "  3 x conversations[].content: is missing"


def test_nesting_too_deep_for_the_parser_is_a_bad_row(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", '{"text":' * 100_000)
    with pytest.raises(DataError, match=":1: row: is not JSON"):
        list(read_records([path], "pretrain"))


def test_byte_order_mark_blank_lines_carriage_returns_and_a_missing_last_newline_are_tolerated(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "\xe4\xb8\xad"}\r\n\r\n  \n{"text": "b", "text": "c"}')
    assert list(read_records([str(path)], "pretrain")) == [
        PretrainRecord(str(path), 1, "中"),
        PretrainRecord(str(path), 4, "c"),
    ]


def test_rows_are_read_one_at_a_time(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", GOOD["pretrain"], "{ broken")
    records = read_records([path], "pretrain")
    assert next(records).text == "x"
    with pytest.raises(DataError):
        next(records)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_any_unicode_text_is_read_back_exactly(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate([*texts, "end"])]
    path.write_bytes("\n".join(lines).encode())
    assert [record.text for record in read_records([str(path)], "pretrain")] == [*texts, "end"]


def test_rl_prompts_become_a_user_turn_and_a_last_assistant_turn_is_dropped(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "1+1"}, turns(USER, ASSISTANT, USER, ASSISTANT))
    first, second = read_records([path], "rl")
    assert first.conversations == [{"role": "user", "content": "1+1"}]
    assert first.answer is None
    assert second.conversations == [USER, ASSISTANT, USER]


def test_rl_rows_keep_every_field_for_reward_functions(tmp_path):
    given = {"prompt": "1+1", "answer": "2", "tests": ["assert f(1) == 2"], "level": 3}
    (record,) = read_records([write_lines(tmp_path / "a.jsonl", given)], "rl")
    assert record.row == given


def test_turns_that_only_call_tools_need_no_content(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {}}]}
    tools = {"role": "system", "content": "", "tools": '[{"name": "f"}]'}
    path = write_lines(tmp_path / "a.jsonl", turns(tools, USER, call, {"role": "tool", "content": "1"}, ASSISTANT))
    (record,) = read_records([path], "sft")
    assert record.conversations[2] == call


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_rows_says_what_it_needs(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_records([str(path)], "pretrain"))
    assert str(caught.value) == f"{path}: holds no rows; it needs one JSON object a line"


def test_missing_paths_empty_folders_and_no_paths_say_what_to_do(tmp_path):
    for specs, message in (
        (
            [str(tmp_path / "no.jsonl")],
            f"{tmp_path / 'no.jsonl'}: does not exist; give a .jsonl file or a folder of them",
        ),
        ([str(tmp_path / "no.jsonl") + ":0.5"], f"{tmp_path / 'no.jsonl'}: does not exist"),
        ([str(tmp_path)], f"{tmp_path}: the folder holds no *.jsonl files"),
        ([], "no data files were named; give one or more paths with --data_path"),
    ):
        with pytest.raises(DataError) as caught:
            resolve_sources(specs)
        assert str(caught.value).startswith(message)


def test_a_folder_stands_for_all_jsonl_files_below_it_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", "notes.txt"):
        write_lines(tmp_path / name, {"text": name})
    assert [record.text for record in read_records([f"{tmp_path}:2"], "pretrain")] == [
        "a.jsonl",
        "b.jsonl",
        "sub/c.jsonl",
    ]
    (source,) = resolve_sources([f"{tmp_path}:2"])
    assert source.weight == 2.0


def test_a_colon_is_a_weight_only_if_no_file_has_that_name(tmp_path):
    plain, odd = str(tmp_path / "a.jsonl"), str(tmp_path / "a.jsonl:0.7")
    write_lines(tmp_path / "a.jsonl", {"text": "x"})
    assert parse_path_spec(odd) == (Path(plain), 0.7)
    assert parse_path_spec(plain) == (Path(plain), None)
    assert parse_path_spec("C:\\data\\a.jsonl") == (Path("C:\\data\\a.jsonl"), None)
    write_lines(tmp_path / "a.jsonl:0.7", {"text": "x"})
    assert parse_path_spec(odd) == (Path(odd), None)
    assert parse_path_spec(odd + ":0.2") == (Path(odd), 0.2)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_weights_must_be_positive_numbers(tmp_path, weight):
    path = write_lines(tmp_path / "a.jsonl", {"text": "x"})
    with pytest.raises(DataError, match=f"must be a positive number, not {weight}"):
        resolve_sources([f"{path}:{weight}"])


def test_weights_on_some_paths_only_are_refused(tmp_path):
    a, b = (write_lines(tmp_path / name, {"text": "x"}) for name in ("a.jsonl", "b.jsonl"))
    with pytest.raises(DataError) as caught:
        resolve_sources([f"{a}:0.7", b])
    assert (
        str(caught.value) == f"{b}: has no weight while other paths have one; write {b}:1.0, or leave all weights out"
    )
