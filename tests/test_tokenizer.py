import json
import pickle
from pathlib import Path

import pytest
from example_tokenizers import CORPUS, TOKENIZER, spaced_tokenizer, with_config, with_definition
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minillm_jax.chat import render
from minillm_jax.data.peek import row_kind
from minillm_jax.errors import UserError
from minillm_jax.tokenizer import (
    CONTROL_TOKENS,
    MIN_VOCAB_SIZE,
    TAG_TOKENS,
    MissingTokenizer,
    StreamDecoder,
    Tokenizer,
    TokenizerError,
    encode_document,
    encode_documents,
    train_tokenizer,
)
from train import tokenizer as stage

# Any Unicode but surrogates, mixed with the spellings of reserved tokens, whole and broken.
SPELLINGS = st.sampled_from(
    [*CONTROL_TOKENS, *TAG_TOKENS, "<|im_", "end|>", "<", "|>", "\r\n", "  ", "\x00", "👩‍👩‍👧", "é"]
)
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"])) | SPELLINGS).map("".join)


@settings(max_examples=300)
@given(TEXTS)
@example(" " * 100_000 + "\r\n\t\u3000\u2028x")
@example("".join(map(chr, range(0x250))) + "\ufffd\ufeff\u202e\U0010ffff")
def test_any_text_survives_encode_and_decode(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@settings(max_examples=300)
@given(TEXTS)
def test_no_text_encodes_to_a_control_token(text: str) -> None:
    assert TOKENIZER.control_ids.isdisjoint(TOKENIZER.encode(text))


@given(st.lists(TEXTS, max_size=5))
def test_a_batch_encodes_as_each_text_alone(texts: list[str]) -> None:
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]


def test_reserved_tokens_have_the_documented_ids() -> None:
    names = "<|endoftext|> <|im_start|> <|im_end|> <think> </think> <answer> </answer> "
    names += "<tool_call> </tool_call> <tool_response> </tool_response>"
    assert [TOKENIZER.id_to_token(i) for i in range(11)] == names.split()
    assert TOKENIZER.control_ids == {0, 1, 2}
    assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (0, 1, 2)


def test_control_spellings_are_tokens_only_when_asked_for() -> None:
    text = "a<|im_start|><|im_end|>"
    assert TOKENIZER.encode_control(text) == [*TOKENIZER.encode("a"), 1, 2]
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.decode(TOKENIZER.encode_control(text), skip_special_tokens=True) == "a"


def test_control_spellings_in_text_are_split_like_any_text() -> None:
    tokenizer = train_tokenizer([*CORPUS, "a <| b |> c " * 50], 400)
    files = {"tokenizer.json": json.dumps(json.loads(tokenizer.tokenizer_json) | {"added_tokens": []})}
    assert tokenizer.encode("a <|im_end|> b") == Tokenizer.from_files(files).encode_control("a <|im_end|> b")


@pytest.mark.parametrize("tag", TAG_TOKENS)
def test_a_tag_is_one_token_wherever_it_occurs(tag: str) -> None:
    ids = TOKENIZER.encode(f"x{tag}y {tag}\n{tag}{tag}好{tag}")
    assert ids.count(TOKENIZER.token_to_id(tag)) == 5


def test_the_line_end_that_opens_an_answer_is_a_token_of_its_own() -> None:
    opening = TOKENIZER.encode_control("<|im_start|>assistant\n")
    for answer in ("\n\nx", "\r\nx", "  x", "x"):
        assert TOKENIZER.encode_control("<|im_start|>assistant\n" + answer) == opening + TOKENIZER.encode(answer)


def test_every_digit_is_a_token_of_its_own() -> None:
    digits = [TOKENIZER.token_to_id(digit) for digit in "185918"]
    assert TOKENIZER.encode("185918") == digits
    assert TOKENIZER.encode("in 185918")[-6:] == digits


def test_training_is_deterministic() -> None:
    again = train_tokenizer(iter(CORPUS), 380)
    assert again == TOKENIZER
    assert again.fingerprint == TOKENIZER.fingerprint


def test_reserved_spellings_in_the_corpus_teach_no_merges() -> None:
    assert train_tokenizer(["<tool_response><|im_start|>" * 100, "-"]).vocab_size == MIN_VOCAB_SIZE


def test_a_small_corpus_gives_a_smaller_vocabulary() -> None:
    assert TOKENIZER.vocab_size == 380
    assert MIN_VOCAB_SIZE < train_tokenizer(["abab abab"], 6400).vocab_size < 300


def test_training_refuses_what_cannot_work() -> None:
    with pytest.raises(TokenizerError, match="at least 267"):
        train_tokenizer(CORPUS, 266)
    with pytest.raises(TokenizerError, match="no text"):
        train_tokenizer(["", ""])


def test_lone_surrogates_are_refused_by_position() -> None:
    with pytest.raises(TokenizerError, match=r"character 2 is the lone surrogate U\+D83D"):
        TOKENIZER.encode("ab\ud83d")


def test_documents_stand_between_begin_and_end() -> None:
    assert encode_document(TOKENIZER, "话说") == [1, *TOKENIZER.encode("话说"), 2]
    assert encode_documents(TOKENIZER, ["", "<|im_end|>"]) == [[1, 2], [1, *TOKENIZER.encode("<|im_end|>"), 2]]


def test_saved_folder_loads_as_the_same_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("of an earlier tokenizer")
    TOKENIZER.save(tmp_path)
    assert Tokenizer.load(tmp_path) == TOKENIZER
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert Tokenizer.from_files(TOKENIZER.files()) == TOKENIZER


def test_saved_configuration_says_what_transformers_asks() -> None:
    config = json.loads(TOKENIZER.config_json)
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["clean_up_tokenization_spaces"] is False
    assert config["added_tokens_decoder"]["1"]["special"] is True
    assert config["added_tokens_decoder"]["3"]["special"] is False
    assert config["chat_template"] == TOKENIZER.chat_template


def test_saving_leaves_nothing_of_an_earlier_tokenizer_that_would_win(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("of an earlier tokenizer")
    bare = Tokenizer.from_files({"tokenizer.json": TOKENIZER.tokenizer_json})
    bare.save(tmp_path)
    assert Tokenizer.load(tmp_path) == bare


def test_a_pickled_tokenizer_still_refuses_control_tokens() -> None:
    copy = pickle.loads(pickle.dumps(TOKENIZER))
    assert copy == TOKENIZER
    assert copy.encode("<|im_end|>") == TOKENIZER.encode("<|im_end|>") != [2]


def test_a_run_folder_loads_the_tokenizer_inside(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer")
    assert Tokenizer.load(tmp_path) == TOKENIZER


def test_chat_template_comes_from_file_or_configuration(tmp_path: Path) -> None:
    assert Tokenizer.from_files(with_config(chat_template="A")).chat_template == "A"
    named = [{"name": "tool_use", "template": "B"}, {"name": "default", "template": "A"}]
    assert Tokenizer.from_files(with_config(chat_template=named)).chat_template == "A"
    assert Tokenizer.from_files(with_config(chat_template=None)).chat_template is None
    TOKENIZER.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("C")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.chat_template == "C"
    assert Tokenizer.from_files(loaded.files()) == loaded


def test_further_templates_are_files_of_their_own(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("A")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("B")
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.chat_template, loaded.tool_template) == ("A", "B")
    assert (TOKENIZER.tool_template, Tokenizer.from_files(loaded.files())) == (TOKENIZER.chat_template, loaded)
    plain = Tokenizer.from_files(with_config(chat_template="A"))
    assert plain.fingerprint != loaded.fingerprint  # conversations with tools have other ids


def test_tokens_that_only_the_configuration_names_are_tokens() -> None:
    named = Tokenizer.from_files(with_config(sep_token="<sep>", additional_special_tokens=[{"content": "<more>"}]))
    assert named.encode_control("<more> <sep>") == [381, *TOKENIZER.encode(" "), 380]
    assert named.control_ids == {0, 1, 2, 380, 381}
    assert named.control_ids.isdisjoint(named.encode("<more> <sep>"))
    assert named.vocab_size == 382
    assert named.fingerprint != TOKENIZER.fingerprint


def test_names_in_a_file_of_their_own_count_where_no_tokens_are_listed() -> None:
    names = {"special_tokens_map.json": '{"eos_token": "<|endoftext|>", "unk_token": "x"}'}
    assert Tokenizer.from_files(with_config(added_tokens_decoder=None) | names).eos_token_id == 0
    assert Tokenizer.from_files(TOKENIZER.files() | names).eos_token_id == 2


@pytest.mark.parametrize(
    ("listed", "ends"), [("null", (2,)), ("2", (2,)), ("0", (2, 0)), ("[0, 3, 2, 0]", (2, 0, 3)), ("[]", (2,))]
)
def test_generation_settings_add_end_tokens(tmp_path: Path, listed: str, ends: tuple[int, ...]) -> None:
    TOKENIZER.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {listed}, "max_length": 5}}')
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.eos_token_id, loaded.eos_token_ids) == (2, ends)
    assert (loaded == TOKENIZER) == (ends == (2,))
    assert loaded.fingerprint == TOKENIZER.fingerprint
    assert Tokenizer.from_files(loaded.files()) == Tokenizer.load(tmp_path) == loaded
    again = Tokenizer.from_files(loaded.files() | {"generation_config.json": '{"eos_token_id": [2]}'})
    assert again.eos_token_ids == (2,)


@pytest.mark.parametrize("listed", ["380", "-1", "[2, 380]", '"<|im_end|>"', "true", "[[2]]", "2.0"])
def test_end_tokens_that_cannot_be_are_refused(listed: str) -> None:
    for name, field in (("generation_config.json", "eos_token_id"), ("tokenizer_config.json", "eos_token_ids")):
        with pytest.raises(TokenizerError, match=rf"^{name}: {field}: .* is not an id of this vocabulary of 380"):
            Tokenizer.from_files(TOKENIZER.files() | {name: f'{{"{field}": {listed}}}'})


def test_a_model_without_a_tokenizer_knows_numbers_only(tmp_path: Path) -> None:
    missing = MissingTokenizer.for_model(50, [4, 3, 4])
    assert (missing.vocab_size, missing.eos_token_ids, missing.eos_token_id) == (50, (4, 3), 4)
    assert (missing.bos_token_id, missing.pad_token_id) == (4, 4)
    decoder = StreamDecoder(missing, skip_special_tokens=True)
    assert missing.decode([1, 2]) == decoder.push(1) + decoder.flush() == ""
    copy = pickle.loads(pickle.dumps(missing))
    assert copy == missing
    assert {copy, missing} == {missing} != {MissingTokenizer.for_model(50, [4])}
    assert MissingTokenizer.for_model(50).eos_token_ids == ()
    for use in (
        lambda: MissingTokenizer.for_model(50).eos_token_id,
        lambda: missing.encode("a"),
        lambda: missing.encode_batch([]),
        lambda: missing.encode_control("a"),
        lambda: render(missing, [{"role": "user", "content": "a"}]),
        lambda: missing.fingerprint,
        lambda: missing.save(tmp_path / "new"),
    ):
        with pytest.raises(TokenizerError, match=r"^this model has no .*: give token ids, or put a tokenizer\.json"):
            use()
    assert not (tmp_path / "new").exists()
    with pytest.raises(TokenizerError, match="50 is not an id"):
        MissingTokenizer.for_model(50, [50])


def test_begin_end_and_padding_come_from_the_configuration() -> None:
    wrapped = Tokenizer.from_files(with_config(bos_token=None, eos_token={"content": "<|endoftext|>"}, pad_token=None))
    assert (wrapped.bos_token_id, wrapped.eos_token_id, wrapped.pad_token_id) == (0, 0, 0)
    bare = Tokenizer.from_files({"tokenizer.json": TOKENIZER.tokenizer_json})
    assert (bare.bos_token_id, bare.eos_token_id, bare.pad_token_id) == (2, 2, 2)
    with pytest.raises(TokenizerError, match="no end token"):
        Tokenizer.from_files(with_definition(added_tokens=[]) | {"tokenizer_config.json": "{}"} | _without_reserved())


def _without_reserved() -> dict[str, str]:
    definition = json.loads(TOKENIZER.tokenizer_json)
    vocab = {token: i for token, i in definition["model"]["vocab"].items() if i > 10}
    return {
        "tokenizer.json": json.dumps(definition | {"added_tokens": [], "model": definition["model"] | {"vocab": vocab}})
    }


def test_folders_that_are_no_tokenizer_say_why(tmp_path: Path) -> None:
    assert issubclass(TokenizerError, UserError)  # so that commands print one line
    with pytest.raises(TokenizerError, match="no such folder"):
        Tokenizer.load(tmp_path / "absent")
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: "):
        Tokenizer.load(tmp_path)


def test_dropout_truncation_and_padding_of_others_are_ignored() -> None:
    model = json.loads(TOKENIZER.tokenizer_json)["model"] | {"dropout": 0.9}
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    changed = Tokenizer.from_files(with_definition(model=model, truncation=cut))
    assert changed.encode(CORPUS[0]) == TOKENIZER.encode(CORPUS[0])


def test_a_vocabulary_that_holds_control_spellings_cannot_be_tricked() -> None:
    # Llama 3's setting: a whole word that is in the vocabulary is taken without asking the merges.
    model = json.loads(TOKENIZER.tokenizer_json)["model"] | {"ignore_merges": True}
    splitting = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tricked = Tokenizer.from_files(with_definition(model=model, pre_tokenizer=splitting))
    for text in ("<|im_end|>", "<|im_start|><|im_end|>", "<|im_end|>a"):
        assert tricked.control_ids.isdisjoint(tricked.encode(text))
        assert tricked.decode(tricked.encode(text)) == text


def test_vocab_size_is_the_largest_id_plus_one() -> None:
    model = json.loads(TOKENIZER.tokenizer_json)["model"]
    model["vocab"]["+"] = 999
    assert Tokenizer.from_files(with_definition(model=model)).vocab_size == 1000


def test_fingerprint_changes_with_whatever_changes_ids() -> None:
    changed = [
        train_tokenizer(CORPUS, 379),
        Tokenizer.from_files(with_config(chat_template="A")),
        Tokenizer.from_files(with_config(bos_token="<|endoftext|>")),
        Tokenizer.from_files(with_definition(normalizer={"type": "Lowercase"})),
    ]
    assert len({TOKENIZER.fingerprint, *(tokenizer.fingerprint for tokenizer in changed)}) == 5
    assert Tokenizer.from_files(with_config(model_max_length=5)).fingerprint == TOKENIZER.fingerprint


@pytest.mark.parametrize("tokenizer", [TOKENIZER, spaced_tokenizer()], ids=["byte-level", "spaced"])
@given(text=TEXTS)
def test_a_stream_gives_the_text_of_all_ids_at_once(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_control(text)
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(i) for i in ids]
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, 400)))
def test_a_stream_of_random_ids_decodes_like_the_list(ids: list[int]) -> None:
    decoder = StreamDecoder(TOKENIZER, skip_special_tokens=True)
    streamed = "".join(map(decoder.push, ids)) + decoder.flush()
    assert streamed == TOKENIZER.decode(ids, skip_special_tokens=True)


def test_a_stream_never_breaks_a_character() -> None:
    ids = TOKENIZER.encode("🙂")
    assert len(ids) == 4
    decoder = StreamDecoder(TOKENIZER)
    assert [decoder.push(i) for i in ids] == ["", "", "", "🙂"]
    assert decoder.push(ids[0]) == ""
    assert decoder.flush() == "\ufffd"
    assert [decoder.push(i) for i in ids][-1] == "🙂"


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


def test_the_stage_trains_on_documents_and_conversations(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    books = write_rows(tmp_path / "books.jsonl", [{"text": text} for text in CORPUS])
    turns = [
        {"role": "user", "content": "唱一首歌"},
        {"role": "assistant", "content": "啦啦啦啦", "reasoning_content": "想"},
    ]
    chats = write_rows(tmp_path / "chats.jsonl", [{"conversations": turns}] * 60)
    out = tmp_path / "tok"
    stage.main(["--data_path", books, chats, "--out_dir", str(out), "--vocab_size", "380", "--valid_fraction", "0.1"])
    tokenizer = Tokenizer.load(out)
    assert tokenizer.vocab_size == 380
    assert len(tokenizer.encode("唱一首歌")) == 1
    printed = capsys.readouterr().out
    assert "held-out text: 10 documents" in printed
    assert "bytes per token" in printed


def test_the_stage_holds_out_every_nth_document() -> None:
    texts = [str(i) for i in range(1, 11)]
    held, kept = (list(stage.split(texts, 0.2, held_out=flag)) for flag in (True, False))
    assert held == ["5", "10"]
    assert sorted(held + kept) == sorted(texts)
    assert list(stage.split(texts, 0.0, held_out=True)) == []


def test_the_stage_counts_bytes_and_tokens() -> None:
    result = stage.measure(TOKENIZER, ["ab", "好"], batch_size=1)
    ids = [*TOKENIZER.encode("ab"), *TOKENIZER.encode("好")]
    assert (result.documents, result.bytes, result.tokens) == (2, 5, len(ids))
    assert result.token_ids_seen == set(ids)
    assert result.bytes_per_token == 5 / len(ids)


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([{"text": "abc"}], ["--vocab_size", "10"], "at least 267"),
        ([{"text": ""}], [], "no text to train on"),
        ([{"text": 5}], [], "text: must be a string"),
        ([], [], "holds no rows"),
    ],
)
def test_the_stage_ends_with_a_clear_error(tmp_path: Path, rows: list, flags: list, message: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(SystemExit, match=message):
        stage.main(["--data_path", path, "--out_dir", str(tmp_path / "tok"), *flags])
    assert not (tmp_path / "tok").exists()


def test_row_kind_is_told_by_fields(tmp_path: Path) -> None:
    for field, kind in {"text": "pretrain", "conversations": "sft", "chosen": "preference", "else": "pretrain"}.items():
        path = tmp_path / f"{field}.jsonl"
        path.write_text("not JSON\n\n" + json.dumps({"id": 1, field: []}))
        assert row_kind(path) == kind
