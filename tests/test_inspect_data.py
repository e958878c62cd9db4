import json
from itertools import pairwise
from pathlib import Path

import pytest
from example_tokenizers import TOKENIZER

from minillm_jax.chat import render
from minillm_jax.tokenizer import encode_document
from train.inspect_data import Totals, main, show

CHAT = [{"role": "user", "content": "hi 好"}, {"role": "assistant", "content": "yes 好"}]


@pytest.fixture
def tokenizer_path(tmp_path: Path) -> str:
    TOKENIZER.save(tmp_path / "tok")
    return str(tmp_path / "tok")


def write_rows(folder: Path, *rows: object) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def inspect(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    main(list(arguments))
    return capsys.readouterr().out


def test_a_pipe_gets_trained_text_in_brackets(
    tmp_path: Path, tokenizer_path: str, capsys: pytest.CaptureFixture
) -> None:
    data = write_rows(tmp_path, {"conversations": CHAT})
    shown = inspect(capsys, "--data_path", data, "--tokenizer_path", tokenizer_path)
    assert "<|im_start|>user\nhi 好<|im_end|>\n<|im_start|>assistant\n⟦yes 好<|im_end|>\n⟧\n" in shown
    assert f"{data}:1 conversation, {len(render(TOKENIZER, CHAT).token_ids)} tokens" in shown


def test_totals_count_rows_tokens_and_lengths(
    tmp_path: Path, tokenizer_path: str, capsys: pytest.CaptureFixture
) -> None:
    texts = ["times", "times times times", "best"]
    data = write_rows(tmp_path, *({"text": text} for text in texts), {"text": 5})
    lengths = [len(encode_document(TOKENIZER, text)) for text in texts]
    limit = str(max(lengths) - 1)
    shown = inspect(
        capsys, "--data_path", data, "--tokenizer_path", tokenizer_path, "--rows", "0", "--max_seq_len", limit
    )
    squeezed = " ".join(shown.split())
    assert f"rows 3 tokens {sum(lengths)} trained tokens {sum(lengths) - 3} " in squeezed
    assert f"/ {max(lengths)} longer than {limit} 1 rows without a trained token 0 " in squeezed
    assert "skipped 1 bad row(s): 1 x text: must be a string" in squeezed
    assert f"{data}:4: text: must be a string" in squeezed


def test_preference_rows_show_both_answers(tmp_path: Path, tokenizer_path: str, capsys: pytest.CaptureFixture) -> None:
    rejected = [CHAT[0], {"role": "assistant", "content": "no"}]
    data = write_rows(tmp_path, {"chosen": CHAT, "rejected": rejected})
    shown = inspect(capsys, "--data_path", data, "--tokenizer_path", tokenizer_path)
    assert "chosen, " in shown
    assert "⟦yes 好<|im_end|>" in shown
    assert "rejected, " in shown
    assert "⟦no<|im_end|>" in shown


def test_rows_that_a_template_refuses_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    TOKENIZER.save(tmp_path / "tok")
    config = json.loads((tmp_path / "tok" / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ raise_exception('never') }}"
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps(config))
    data = write_rows(tmp_path, {"conversations": CHAT}, {"conversations": CHAT})
    shown = inspect(capsys, "--data_path", data, "--tokenizer_path", str(tmp_path / "tok"))
    assert "skipped 2 bad row(s)" in shown
    assert "never" in shown


def test_a_terminal_gets_colours_that_alternate_and_tell_trained_tokens() -> None:
    rendered = render(TOKENIZER, CHAT)
    shown = show(TOKENIZER, rendered, coloured=True)
    assert shown.plain == TOKENIZER.decode(rendered.token_ids)
    ascii_chat = [{"role": turn["role"], "content": "times best times"} for turn in CHAT]
    rendered = render(TOKENIZER, ascii_chat)  # every token is text of its own, so that it gets a span of its own
    spans = show(TOKENIZER, rendered, coloured=True).spans
    styles: dict[int, list[str]] = {0: [], 1: []}
    for span, trained in zip(spans, rendered.mask, strict=True):
        styles[trained].append(str(span.style))
    assert set(styles[0]).isdisjoint(styles[1])
    assert len(set(styles[0])) == len(set(styles[1])) == 3
    assert all(left != right for of_kind in styles.values() for left, right in pairwise(of_kind))


def test_data_cannot_drive_the_terminal() -> None:
    rendered = render(TOKENIZER, [{"role": "assistant", "content": "\x1b[2J"}])
    assert "␛[2J" in show(TOKENIZER, rendered, coloured=False).plain


def test_percentiles_are_lengths_that_occur() -> None:
    totals = Totals(lengths=list(range(100, 0, -1)))
    assert totals.percentiles() == [50, 90, 99, 100]
    assert Totals(lengths=[7]).percentiles() == [7, 7, 7, 7]


def test_what_cannot_be_read_ends_with_a_clear_error(tmp_path: Path, tokenizer_path: str) -> None:
    with pytest.raises(SystemExit, match="no such folder"):
        main(["--data_path", write_rows(tmp_path, {"text": "a"}), "--tokenizer_path", str(tmp_path / "absent")])
    with pytest.raises(SystemExit, match="does not exist"):
        main(["--data_path", str(tmp_path / "absent.jsonl"), "--tokenizer_path", tokenizer_path])
