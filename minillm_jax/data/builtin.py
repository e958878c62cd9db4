"""Built-in data, so that a first run needs no download: the standard library's documentation, and small chat tasks.

Nothing but Python itself goes in; JSONL files in the project's own formats come out. Text is read from the source files
of the running Python, so its amount differs a little between versions; tasks depend on the seed alone.
"""

from __future__ import annotations

import ast
import itertools
import json
import random
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from inspect import cleandoc
from pathlib import Path

from minillm_jax.data.errors import DataError
from minillm_jax.data.tasks import FAMILIES as FAMILIES
from minillm_jax.data.tasks import NEW_FAMILIES as NEW_FAMILIES
from minillm_jax.data.tasks import Family, Split, iter_tasks
from minillm_jax.data.tasks import Task as Task

# ---------------------------------------------------------------------------------------------------------------------
# Pretraining text

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
MIN_DOCSTRING = 40
"""Characters below which a docstring says next to nothing."""
MIN_DOCUMENT = 200
"""Characters below which a module has too little to say to be a document."""

EXERCISES_PER_PAGE = 12

_UNDERLINE = re.compile(r"^\s*([*=\-~^\"#+])\1{2,}\s*$")
_ROLE = re.compile(r":[a-z:]+:`~?([^`<]+?)(?:\s*<[^>]*>)?`")


def _clean(text: str) -> str:
    """Remove reST markup and hard line breaks inside paragraphs; code, lists and grammars keep their lines."""
    lines: list[str] = []
    paragraph = False  # whether the last line is prose that the next one may continue
    for line in text.expandtabs().splitlines():
        line = _ROLE.sub(r"\1", line.rstrip()).replace("``", "")
        if _UNDERLINE.match(line) or line.startswith("Related help topics:"):
            continue
        prose = line[:1].isalpha() or line.startswith(('"', "'", "(", "“", "‘"))
        if paragraph and prose:
            lines[-1] += line if lines[-1].endswith("-") else " " + line
        elif line or (lines and lines[-1]):
            lines.append(line)
        # Only a line that was filled to the margin was broken by it.
        paragraph = prose and len(line) > 50
    return "\n".join(lines).strip()


def _topics() -> Iterator[str]:
    """Yield the language reference, one topic at a time."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        warnings.warn(
            "this Python has no pydoc_data.topics: pretraining text comes from docstrings alone", stacklevel=2
        )
        return
    for name in sorted(topics):
        yield _clean(topics[name])


def _docstrings(tree: ast.Module, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield (heading, docstring) of a module, its classes and functions, in source order."""
    yield prefix, ast.get_docstring(tree) or ""
    stack: list[tuple[ast.AST, str]] = [(tree, prefix)]
    while stack:
        node, path = stack.pop()
        children: list[tuple[ast.AST, str]] = []
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path}.{child.name}({ast.unparse(child.args)})", ast.get_docstring(child) or ""
            elif isinstance(child, ast.ClassDef):
                yield f"class {path}.{child.name}", ast.get_docstring(child) or ""
                children.append((child, f"{path}.{child.name}"))
            elif isinstance(child, ast.If | ast.Try):
                children.append((child, path))
        stack += reversed(children)


def _modules(stdlib: Path) -> Iterator[str]:
    """Yield the docstrings of the standard library, one module at a time; a docstring that was seen is left out."""
    files = [path for path in stdlib.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(stdlib).parts)]
    if not files:
        warnings.warn(
            f"no source files of the standard library in {stdlib}: pretraining text comes from pydoc topics alone",
            stacklevel=2,
        )
    seen: set[str] = set()
    for path in sorted(files):
        name = ".".join(path.relative_to(stdlib).with_suffix("").parts).removesuffix(".__init__")
        try:
            with warnings.catch_warnings(action="ignore"):  # old escapes in old modules are not our business
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        parts = []
        for heading, docstring in _docstrings(tree, name):
            if len(docstring) >= MIN_DOCSTRING and docstring not in seen:
                seen.add(docstring)
                parts.append(f"{heading}\n{_clean(cleandoc(docstring))}")
        if len(document := "\n\n".join(parts)) >= MIN_DOCUMENT:
            yield document


def _exercises(n: int, seed: int) -> Iterator[str]:
    """Yield `n` pages of solved exercises in plain text, from training questions alone."""
    tasks = iter_tasks(seed, "train")
    for _ in range(n):
        page = itertools.islice(tasks, EXERCISES_PER_PAGE)
        yield "\n\n".join(["Exercises", *(f"{task.prompt}\n{task.answer}" for task in page)])


def write_pretrain(path: str | Path, max_bytes: int | None = None, exercise_pages: int = 0, seed: int = 0) -> int:
    """Write the documentation of the running Python as `{"text"}` rows, one topic or module a row.

    Args:
        path: JSONL file to write.
        max_bytes: stop before the documentation grows beyond this many UTF-8 bytes; None takes all, about 2.3 MB.
        exercise_pages: pages of solved exercises to append, 12 training questions each; none is a held-out one.
        seed: seed of the exercises.

    Returns:
        UTF-8 bytes of text written.

    Raises:
        DataError: this Python carries no documentation at all, or not one document fits into `max_bytes`.
    """
    size = 0
    documents: dict[str, None] = {}  # an ordered set: some topics stand under two names
    for text in itertools.chain(_topics(), _modules(Path(sysconfig.get_path("stdlib")))):
        if text in documents:
            continue
        if max_bytes is not None and size + len(text.encode()) > max_bytes:
            break
        size += len(text.encode())
        documents[text] = None
    for text in _exercises(exercise_pages, seed):
        size += len(text.encode())
        documents[text] = None
    if not documents:
        raise DataError("this Python installation has no documentation to train on; pass files of your own")
    _write_rows(path, ({"text": text} for text in documents))
    return size


def _write_rows(path: str | Path, rows: Iterable[Mapping[str, object]]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ---------------------------------------------------------------------------------------------------------------------
# Chat tasks

SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello!", "Hi!", "Hey there.", "Good morning!", "Hello", "Hi"), "Hello! What can I do for you?"),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Are you a human?"),
        "I am minillm-jax, a small language model trained from scratch.",
    ),
    (
        ("What can you do?", "How can you help me?", "What do you know?", "Help", "What should I ask you?"),
        "I can add, compare, sort, count, reverse, copy and pick. Ask me a small question!",
    ),
    (("How are you?", "How do you do?", "How is it going?", "Are you well?"), "I am fine, thank you!"),
    (("Thank you!", "Thanks!", "Thanks a lot.", "Great, thank you.", "Well done!"), "You are welcome!"),
    (("Bye!", "Goodbye.", "See you!", "Good night!", "That is all."), "Goodbye!"),
    (
        ("What is the meaning of life?", "Write me a poem.", "What is the weather?", "Who won the match?"),
        "That is too hard for me. Ask me a small question!",
    ),
)
"""(things people say, what the model replies): a little of it makes the chat feel alive."""
SMALL_TALK_SHARE = 0.04
TURNS = (1, 1, 2, 4, 6)
"""Questions in a conversation, drawn evenly; a long one spends fewer tokens on anything but questions and answers."""


def generate_tasks(n: int, seed: int, split: Split) -> list[Task]:
    """Draw `n` tasks, as many of each family as possible; the two splits share no question.

    The same arguments give the same tasks on every machine. Questions may come more than once.
    """
    return list(itertools.islice(iter_tasks(seed, split), n))


def _conversations(seed: int) -> Iterator[list[dict[str, str]]]:
    """Yield conversations of training tasks and small talk without end."""
    rng = random.Random(f"conversations {seed}")
    tasks = iter_tasks(seed, "train")
    while True:
        turns = []
        for _ in range(rng.choice(TURNS)):
            if rng.random() < SMALL_TALK_SHARE:
                prompts, reply = rng.choice(SMALL_TALK)
                prompt = rng.choice(prompts)
            else:
                task = next(tasks)
                prompt, reply = task.prompt, task.answer
            turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        yield turns


def write_sft(path: str | Path, n: int, seed: int) -> None:
    """Write `n` conversations of training tasks as `{"conversations"}` rows, some of several turns, some small talk."""
    rows = itertools.islice(_conversations(seed), n)
    _write_rows(path, ({"conversations": turns} for turns in rows))


def _turns(prompt: str, reply: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


def write_new_skill(path: str | Path, n: int, seed: int) -> None:
    """Write `n` conversations of one question each, of kinds that `write_sft` never asks about."""
    tasks = itertools.islice(iter_tasks(seed, "train", NEW_FAMILIES), n)
    _write_rows(path, ({"conversations": _turns(task.prompt, task.answer)} for task in tasks))


def _pairs(seed: int, split: Split) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Yield pairs without end: the right answer, and the one of the last question of its kind with another answer."""
    wrong: dict[str, str] = {}
    for task in iter_tasks(seed, split):
        if wrong.get(task.family, task.answer) != task.answer:
            yield {"chosen": _turns(task.prompt, task.answer), "rejected": _turns(task.prompt, wrong[task.family])}
        wrong[task.family] = task.answer


def write_preferences(path: str | Path, n: int, seed: int, split: Split) -> None:
    """Write `n` `{"chosen", "rejected"}` rows: a question with its right answer, and with one that is wrong."""
    _write_rows(path, itertools.islice(_pairs(seed, split), n))


def write_eval(path: str | Path, n: int, seed: int, families: Mapping[str, Family] | None = None) -> None:
    """Write `n` different held-out questions as `{"prompt", "answer", "family"}` rows, evenly over the families.

    Raises:
        DataError: there are not that many different questions.
    """
    quota = -(-n // len(FAMILIES if families is None else families))  # of each family, rounded up
    _write_questions(path, n, seed, "heldout", families, quota)


def write_prompts(path: str | Path, n: int, seed: int) -> None:
    """Write `n` different training questions as `{"prompt", "answer", "family"}` rows, to learn from rewards.

    Families are drawn evenly; small ones have fewer rows, because a question that comes again is left out.

    Raises:
        DataError: there are not that many different questions.
    """
    _write_questions(path, n, seed, "train", None, quota=n)


def _write_questions(
    path: str | Path, n: int, seed: int, split: Split, families: Mapping[str, Family] | None, quota: int
) -> None:
    """Write `n` different questions of a split, at most `quota` of each family."""
    counts: Counter[str] = Counter()
    tasks: dict[str, Task] = {}
    for task in itertools.islice(iter_tasks(seed, split, families), 20 * n):
        if len(tasks) == n:
            break
        if task.prompt not in tasks and counts[task.family] < quota:
            tasks[task.prompt] = task
            counts[task.family] += 1
    if len(tasks) < n:
        kind = {"train": "training", "heldout": "held-out"}[split]
        raise DataError(f"{path}: only {len(tasks)} of {n} different {kind} questions were found; ask for fewer")
    _write_rows(path, ({"prompt": t.prompt, "answer": t.answer, "family": t.family} for t in tasks.values()))
