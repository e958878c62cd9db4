import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from minillm_jax.data import DataError, builtin, read_records, tasks
from minillm_jax.data.builtin import FAMILIES, generate_tasks, write_eval, write_pretrain, write_prompts, write_sft
from minillm_jax.data.tasks import WORDS


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def train():
    return generate_tasks(20_000, seed=0, split="train")


@pytest.fixture(scope="module")
def heldout():
    return generate_tasks(20_000, seed=0, split="heldout")


# What a question is about, read back from its text alone.


def numbers_in(prompt: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", prompt)]


def spelled_in(prompt: str) -> str:
    return re.search(r"\b[a-z](?:-[a-z])+\b", prompt)[0].replace("-", "")


def letter_in(prompt: str) -> str:
    """The letter to count: a single one beside the spelled word; the English word "a" is in no such phrasing."""
    (letter,) = re.findall(r"\b[a-z]\b", re.sub(r"\b[a-z](?:-[a-z])+\b", "", prompt))
    return letter


def list_in(prompt: str) -> list[str]:
    return re.search(r"[a-z]+(?:, [a-z]+)+", prompt)[0].split(", ")


def times_in(prompt: str) -> tuple[str, int]:
    names = {"two": 2, "three": 3, "four": 4, "five": 5} | {str(n): n for n in range(2, 6)}
    return re.findall(r"[a-z]+", prompt)[-1], names[re.search(r"(\w+) times", prompt)[1]]


def content_of(task: builtin.Task) -> object:
    """The question below the phrasing, order of operands set aside where it does not matter."""
    numbers = numbers_in(task.prompt)
    match task.family:
        case "add" | "subtract" | "compare" | "extreme" | "sort":
            return frozenset(Counter(numbers).items())
        case "parity" | "next_number":
            return tuple(numbers)
        case "reverse":
            return frozenset((spelled_in(task.prompt), spelled_in(task.prompt)[::-1]))
        case "uppercase":
            return spelled_in(task.prompt)
        case "count_letter":
            return spelled_in(task.prompt), letter_in(task.prompt)
        case "repeat":
            return times_in(task.prompt)
        case "copy":
            return task.answer
        case "pick":
            return tuple(list_in(task.prompt))
        case "contains":
            return contains_in(task.prompt)
    raise AssertionError(f"the test does not know the family {task.family}")


def contains_in(prompt: str) -> tuple[str, frozenset[str]]:
    words = list_in(prompt)
    (word,) = [w for w in re.findall(r"[a-z]+", prompt.replace(", ".join(words), "")) if w in WORDS]
    return word, frozenset(words)


def solve(task: builtin.Task) -> str:
    """Work the answer out from the prompt alone."""
    prompt, numbers = task.prompt, numbers_in(task.prompt)
    wants_small = re.search(r"small|low", prompt) is not None
    match task.family:
        case "add":
            return str(sum(numbers))
        case "subtract":
            return str(abs(numbers[0] - numbers[1]))  # never negative: checked below
        case "compare" | "extreme":
            return str(sorted(numbers)[0 if wants_small else -1])
        case "parity":
            return ("even", "odd")[int(str(numbers[0])[-1]) in (1, 3, 5, 7, 9)]
        case "next_number":
            return str(2 * numbers[-1] - numbers[-2])
        case "sort":
            return ", ".join(str(n) for n in sorted(numbers))
        case "reverse":
            return "-".join(reversed(spelled_in(prompt)))
        case "count_letter":
            return str(sum(c == letter_in(prompt) for c in spelled_in(prompt)))
        case "uppercase":
            return "-".join(c.upper() for c in spelled_in(prompt))
        case "pick":
            place = re.search(r"\b(first|second|third|last)\b", prompt)[1]
            return list_in(prompt)[{"first": 0, "second": 1, "third": 2, "last": -1}[place]]
        case "copy":
            return re.search(r'"(.*)"', prompt)[1]
        case "repeat":
            word, count = times_in(prompt)
            return " ".join([word] * count)
        case "contains":
            word, words = contains_in(prompt)
            return "yes" if word in words else "no"
    raise AssertionError(f"the test does not know the family {task.family}")


def test_every_answer_agrees_with_one_worked_out_from_the_prompt(train, heldout):
    for task in train + heldout:
        assert task.answer == solve(task), task


def test_differences_are_never_negative(train):
    for task in train:
        if task.family == "subtract":
            a, b = numbers_in(task.prompt)
            smaller_first = task.prompt.startswith(("Subtract", "Take"))
            assert (a <= b) if smaller_first else (a >= b), task


def test_train_and_heldout_questions_are_disjoint_below_their_phrasing(train, heldout):
    seen = {(task.family, content_of(task)) for task in train}
    asked = {(task.family, content_of(task)) for task in heldout}
    assert len(asked) > 3000
    assert not seen & asked


def test_the_split_depends_on_content_and_holds_out_the_stated_share():
    sides = [tasks.split_of("parity", (n,)) for n in range(5000)]
    assert sides.count("heldout") / 5000 == pytest.approx(tasks.HELDOUT_SHARE, abs=0.02)
    assert sides == [tasks.split_of("parity", (n,)) for n in range(5000)]


def test_families_are_balanced_and_every_phrasing_is_used(train):
    counts = Counter(task.family for task in train)
    assert set(counts) == set(FAMILIES)
    assert max(counts.values()) - min(counts.values()) <= 1
    for name, family in FAMILIES.items():
        patterns = [re.compile(re.sub(r"\\\{\w+\\\}", ".+", re.escape(p))) for p in family.phrasings]
        assert len(set(family.phrasings)) >= 6
        prompts = [task.prompt for task in train if task.family == name]
        assert all(any(pattern.fullmatch(prompt) for prompt in prompts) for pattern in patterns), name


def test_seeds_differ_and_a_longer_draw_begins_with_the_shorter_one():
    assert generate_tasks(50, 1, "train") != generate_tasks(50, 2, "train")
    assert generate_tasks(100, 1, "train")[:50] == generate_tasks(50, 1, "train")


def test_files_are_the_same_in_every_process(tmp_path):
    script = (
        "import sys; from minillm_jax.data import builtin\n"
        "builtin.write_sft(sys.argv[1] + '/sft', 300, 5); builtin.write_eval(sys.argv[1] + '/eval', 140, 5)"
    )
    for hash_seed in ("1", "2"):
        folder = tmp_path / hash_seed
        folder.mkdir()
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run([sys.executable, "-c", script, str(folder)], check=True, env=env)
    for name in ("sft", "eval"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_chat_rows_are_read_by_the_sft_reader_and_some_have_several_turns(tmp_path):
    path = tmp_path / "sft.jsonl"
    write_sft(path, 1000, seed=3)
    assert len(list(read_records([str(path)], "sft"))) == 1000
    conversations = [row["conversations"] for row in rows_of(path)]
    assert all([t["role"] for t in turns] == ["user", "assistant"] * (len(turns) // 2) for turns in conversations)
    turn_counts = Counter(len(turns) // 2 for turns in conversations)
    assert set(turn_counts) == set(builtin.TURNS)
    replies = {turn["content"] for turns in conversations for turn in turns if turn["role"] == "assistant"}
    assert {reply for _, reply in builtin.SMALL_TALK} <= replies


def test_no_heldout_question_is_asked_in_chat_rows(tmp_path):
    write_sft(tmp_path / "sft.jsonl", 5000, seed=0)
    write_eval(tmp_path / "eval.jsonl", 1400, seed=0)
    asked = {
        turn["content"]
        for row in rows_of(tmp_path / "sft.jsonl")
        for turn in row["conversations"]
        if turn["role"] == "user"
    }
    assert not asked & {row["prompt"] for row in rows_of(tmp_path / "eval.jsonl")}


def test_exercise_pages_hold_training_questions_alone(tmp_path):
    plain, solved = tmp_path / "plain.jsonl", tmp_path / "solved.jsonl"
    write_pretrain(plain, max_bytes=50_000)
    write_pretrain(solved, max_bytes=50_000, exercise_pages=300, seed=7)
    pages = [row["text"] for row in rows_of(solved)[len(rows_of(plain)) :]]
    assert len(pages) == 300
    shown = [tuple(block.split("\n")) for page in pages for block in page.split("\n\n")[1:]]
    assert shown == [(task.prompt, task.answer) for task in generate_tasks(300 * 12, 7, "train")]


def test_evaluation_rows_are_different_and_even_over_families(tmp_path):
    path = tmp_path / "eval.jsonl"
    write_eval(path, 1400, seed=1)
    assert len(list(read_records([str(path)], "exact"))) == 1400
    rows = rows_of(path)
    assert len({row["prompt"] for row in rows}) == 1400
    assert set(Counter(row["family"] for row in rows).values()) == {100}


def test_prompts_are_different_training_questions_of_every_family(tmp_path):
    path = tmp_path / "prompts.jsonl"
    write_prompts(path, 1400, seed=1)
    records = list(read_records([str(path)], "rl"))
    assert len({record.row["prompt"] for record in records}) == 1400
    counts = Counter(record.row["family"] for record in records)
    assert set(counts) == set(FAMILIES)
    assert max(counts.values()) < 150  # drawn evenly; what small families lack is made up for by all
    asked = [builtin.Task(r.row["family"], r.row["prompt"], r.answer) for r in records]
    assert all(task.answer == solve(task) for task in asked)
    write_eval(tmp_path / "eval.jsonl", 1400, seed=1)
    heldout = {(row["family"], row["prompt"]) for row in rows_of(tmp_path / "eval.jsonl")}
    assert not heldout & {(task.family, task.prompt) for task in asked}


def test_asking_for_more_questions_than_there_are_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "FAMILIES", {"repeat": FAMILIES["repeat"]})
    monkeypatch.setattr(builtin, "FAMILIES", {"repeat": FAMILIES["repeat"]})
    with pytest.raises(DataError, match="different held-out questions were found; ask for fewer"):
        write_eval(tmp_path / "eval.jsonl", 5000, seed=0)
    with pytest.raises(DataError, match="different training questions were found; ask for fewer"):
        write_prompts(tmp_path / "prompts.jsonl", 5000, seed=0)


def test_pretraining_text_is_the_documentation_of_this_python(tmp_path):
    path = tmp_path / "pretrain.jsonl"
    size = write_pretrain(path)
    texts = [row["text"] for row in rows_of(path)]
    assert size == sum(len(text.encode()) for text in texts) > 1_000_000
    assert len(list(read_records([str(path)], "pretrain"))) == len(texts)
    assert len(set(texts)) == len(texts)
    assert any('The "if" statement is used for conditional execution' in text for text in texts)
    assert any("json.dumps(obj, *, skipkeys=False" in text for text in texts)


def test_pretraining_text_stops_at_max_bytes_and_begins_like_the_whole(tmp_path):
    size = write_pretrain(tmp_path / "part.jsonl", max_bytes=100_000)
    assert 50_000 < size <= 100_000
    write_pretrain(tmp_path / "more.jsonl", max_bytes=200_000)
    part, more = (tmp_path / name for name in ("part.jsonl", "more.jsonl"))
    assert more.read_bytes().startswith(part.read_bytes())


def test_cleaning_joins_wrapped_prose_and_keeps_code():
    code_and_list = (
        "   >>> {0}kept as it{0}\n   1\n\n"
        "* an item of a list that is long enough to have been filled by an editor\n  second line"
    )
    text = (
        "Title\n*****\n\n"
        "This paragraph was filled to a margin of about sixty columns by\n"
        "its author, see :func:`~os.path.join` for more of what is built-\n"
        "in.\n\n\n"
    ) + code_and_list.format("``")
    assert builtin._clean(text) == (
        "Title\n\n"
        "This paragraph was filled to a margin of about sixty columns by "
        "its author, see os.path.join for more of what is built-in.\n\n"
    ) + code_and_list.format("")


def test_without_library_sources_the_topics_remain_and_a_warning_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    with pytest.warns(UserWarning, match="no source files of the standard library"):
        size = write_pretrain(tmp_path / "topics.jsonl")
    assert size > 100_000


def test_without_any_documentation_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda name: str(tmp_path / "nothing"))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with (
        pytest.warns(UserWarning),
        pytest.raises(DataError, match="no documentation to train on; pass files of your own"),
    ):
        write_pretrain(tmp_path / "none.jsonl")


def test_pairs_hold_the_right_answer_and_a_wrong_one_of_their_own_split(tmp_path):
    questions = {}
    for split in ("train", "heldout"):
        builtin.write_preferences(tmp_path / split, 300, 0, split)
        records = list(read_records([str(tmp_path / split)], "preference"))
        assert len(records) == 300
        right = {task.prompt: task.answer for task in builtin.generate_tasks(400, 0, split)}
        for record in records:
            (asked, chosen), (asked_again, rejected) = record.chosen, record.rejected
            assert asked == asked_again
            assert chosen["content"] == right[asked["content"]] != rejected["content"]
        questions[split] = {record.chosen[0]["content"] for record in records}
    assert not questions["train"] & questions["heldout"]


def test_the_new_skill_is_asked_nowhere_else(tmp_path):
    builtin.write_new_skill(tmp_path / "skill.jsonl", 50, 0)
    builtin.write_eval(tmp_path / "heldout.jsonl", 50, 0, builtin.NEW_FAMILIES)
    for record in read_records([str(tmp_path / "skill.jsonl")], "sft"):
        question, reply = (turn["content"] for turn in record.conversations)
        assert reply == re.search('"(.*)"', question)[1][-1]
    taught = {r.conversations[0]["content"] for r in read_records([str(tmp_path / "skill.jsonl")], "sft")}
    asked = {r.prompt for r in read_records([str(tmp_path / "heldout.jsonl")], "exact")}
    assert len(asked) == 50
    assert not taught & asked
    assert not builtin.NEW_FAMILIES.keys() & builtin.FAMILIES.keys()
