"""Our ids against those of `transformers`: folders that we write, read by AutoTokenizer, and the other way round."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

from example_tokenizers import CORPUS
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine

from minillm_jax.chat import ChatError, render
from minillm_jax.tokenizer import CONTROL_TOKENS, TAG_TOKENS, Tokenizer, train_tokenizer

pytestmark = pytest.mark.conformance
transformers.logging.set_verbosity_error()

TEXTS = [
    "Hi.",
    "",
    "话说天下大势，分久必合，合久必分。",
    "🙂 👩‍👩‍👧 e\u0301 é ﬁ",
    "def f(x):\n    return [x,\n\t\tx]\n\n\n",
    "  spaces  on both sides  ",
    "\n\nline ends first, and last\n",
    "\r\nof another system\r\n\r\n",
    'quotes " and \' and \\ and <b>&amp;</b> {"a": [1, 2.5, null]}',
    "<think>\n18 + 59 = 77\n</think>\n\n<answer>77</answer>",
    "</tool_call><tool_response> 今日は、世界！\u3000１２３",
    "It was the best of times, it was the worst of times; we don't know which.",
]
TOOLS = [
    {"name": "add", "description": "Adds 2 numbers", "parameters": {"type": "object", "properties": {"a": {}}}},
    {"name": "天气", "description": "今天的天气 <b>", "parameters": {"type": "object", "required": ["城市"]}},
]
NAMES = ("add", "天气", 'odd "name"')


# --- Conversations ---------------------------------------------------------------------------------------------------


def some_call(rng: random.Random, forms: str) -> dict[str, Any]:
    """A tool call in one of the forms that people write."""
    arguments: Any = {rng.choice("abc城"): rng.choice([*TEXTS, 1, 2.5, None, True, {"deep": [1, "x"]}])}
    form = rng.choice(forms.split())
    if form == "string":
        arguments = json.dumps(arguments, ensure_ascii=False)
    call = {"name": rng.choice(NAMES), "arguments": arguments}
    if form == "bare":
        return call
    return {"id": f"call{rng.randrange(10**5)}", "type": "function", "function": call}


def some_answer(rng: random.Random, texts: list[str], forms: str) -> list[dict[str, Any]]:
    """An assistant turn; behind one that calls tools their results, and the turn that makes use of them."""
    turn = {"role": "assistant", "content": rng.choice(texts)}
    if rng.random() < 0.3:
        turn["reasoning_content"] = rng.choice(TEXTS)
    if not forms or rng.random() < 0.6:
        return [turn]
    calls = [some_call(rng, forms) for _ in range(rng.randint(1, 3))]
    turn["tool_calls"] = calls
    if rng.random() < 0.5:
        turn["content"] = rng.choice([None, ""])
    results = [{"role": "tool", "content": rng.choice(TEXTS)} for _ in calls]
    return [turn, *results, {"role": "assistant", "content": rng.choice(texts)}]


def conversations(
    number: int, *, answers: list[str] = TEXTS, forms: str = "wrapped bare string"
) -> list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]]:
    """Varied turns, each with the tools that are given beside them; every one ends with an assistant turn."""
    found = []
    for seed in range(number):
        rng = random.Random(seed)
        tools = [{"type": "function", "function": tool} for tool in TOOLS] if rng.random() < 0.5 else TOOLS
        turns: list[dict[str, Any]] = []
        offered = rng.choice(["nowhere", "beside", "system"]) if forms else "nowhere"
        if offered == "system" or rng.random() < 0.5:
            turns.append({"role": "system", "content": rng.choice(TEXTS)})
        if offered == "system":
            turns[0]["tools"] = tools
        for _ in range(rng.randint(1, 4)):
            turns += [{"role": "user", "content": rng.choice(TEXTS)}, *some_answer(rng, answers, forms)]
        found.append((turns, tools if offered == "beside" else None))
    return found


def their_ids(theirs: Any, turns: list, tools: list | None = None, **options: Any) -> list[int]:
    options = {name: value for name, value in options.items() if value is not None}
    return theirs.apply_chat_template(turns, tools=tools, tokenize=True, return_dict=False, **options)


def prompts_of(turns: list) -> list[list]:
    """What led to each answer."""
    return [turns[:i] for i, turn in enumerate(turns) if turn["role"] == "assistant"]


# --- Folders that we write -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """A tokenizer of ours, and what AutoTokenizer reads from its folder."""
    folder = tmp_path_factory.mktemp("written")
    ours = train_tokenizer([*CORPUS, *TEXTS * 3, "a\n\n\n\nb\n\nc" * 20], 600)
    ours.save(folder)
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


def test_conversations_have_the_same_ids_and_mask(written: tuple[Tokenizer, Any]) -> None:
    ours, theirs = written
    for turns, tools in conversations(150):
        rendered = render(ours, turns, tools=tools)
        assert their_ids(theirs, turns, tools) == rendered.token_ids, turns
        marked = theirs.apply_chat_template(turns, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
        assert marked["assistant_masks"] == rendered.mask, turns


@pytest.mark.parametrize("thinking", [None, True, False])
def test_prompts_have_the_same_ids(written: tuple[Tokenizer, Any], thinking: bool | None) -> None:
    ours, theirs = written
    options = {"add_generation_prompt": True, "enable_thinking": thinking}
    for turns, tools in conversations(100):
        for prompt in filter(None, prompts_of(turns)):
            assert their_ids(theirs, prompt, tools, **options) == render(ours, prompt, tools=tools, **options).token_ids


def test_their_prompts_begin_the_conversations_too(written: tuple[Tokenizer, Any]) -> None:
    _, theirs = written
    for turns, tools in conversations(100):
        whole = their_ids(theirs, turns, tools)
        for prompt in filter(None, prompts_of(turns)):
            ids = their_ids(theirs, prompt, tools, add_generation_prompt=True)
            assert whole[: len(ids)] == ids


def test_control_spellings_are_text_to_us_and_tokens_to_them(written: tuple[Tokenizer, Any]) -> None:
    ours, theirs = written
    turns = [{"role": "user", "content": "a <|im_end|> b"}, {"role": "assistant", "content": "c"}]
    mine, other = render(ours, turns).token_ids, their_ids(theirs, turns)
    assert (mine.count(2), other.count(2)) == (3, 4)
    assert ours.decode(mine) == ours.decode(other)


def test_tools_as_a_json_string_must_be_parsed_for_them(written: tuple[Tokenizer, Any]) -> None:
    ours, theirs = written
    turns = [{"role": "system", "content": "s", "tools": json.dumps(TOOLS)}, {"role": "user", "content": "u"}]
    with pytest.raises(Exception, match="must be a list, not a JSON string"):
        their_ids(theirs, turns)
    turns[0]["tools"] = TOOLS
    assert their_ids(theirs, turns) == render(ours, turns).token_ids


def test_plain_texts_have_the_same_ids_and_nothing_is_added(written: tuple[Tokenizer, Any]) -> None:
    ours, theirs = written
    for text in TEXTS:
        assert theirs.encode(text) == ours.encode(text) == ours.encode_control(text)
        assert theirs.decode(theirs.encode(text)) == text
    spelled = "".join(f"{token}x {token}\n" for token in CONTROL_TOKENS + TAG_TOKENS)
    ids = ours.encode_control(spelled)
    assert theirs.encode(spelled) == ids
    assert theirs.encode(spelled, split_special_tokens=True) == ours.encode(spelled)
    for skip in (True, False):
        assert theirs.decode(ids, skip_special_tokens=skip) == ours.decode(ids, skip_special_tokens=skip)


def test_begin_end_padding_and_tags_have_the_same_ids(written: tuple[Tokenizer, Any]) -> None:
    ours, theirs = written
    named = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert named == (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id)
    assert [theirs.encode(tag) for tag in TAG_TOKENS] == [[ours.token_to_id(tag)] for tag in TAG_TOKENS]
    assert set(theirs.all_special_ids) == ours.control_ids
    assert len(theirs) == ours.vocab_size


def test_a_folder_with_several_end_tokens_is_read_by_them(written: tuple[Tokenizer, Any], tmp_path: Path) -> None:
    ours, _ = written
    several = Tokenizer.from_files(ours.files() | {"generation_config.json": '{"eos_token_id": [2, 0]}'})
    several.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == 2
    turns, tools = conversations(1)[0]
    assert their_ids(theirs, turns, tools) == render(ours, turns, tools=tools).token_ids


def test_a_folder_that_passed_through_their_hands_is_the_same_tokenizer(
    written: tuple[Tokenizer, Any], tmp_path: Path
) -> None:
    ours, theirs = written
    theirs.save_pretrained(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.chat_template, again.control_ids) == (ours.chat_template, ours.control_ids)
    for turns, tools in conversations(20):
        assert render(again, turns, tools=tools) == render(ours, turns, tools=tools)


# --- Folders of other people -----------------------------------------------------------------------------------------

CHATML = (
    "{% if tools %}{{ '<|sys|>' ~ (tools | tojson(indent=1)) ~ '<|end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|' ~ m.role[:3] ~ '|>\n' ~ (m.content or '') }}"
    "{% if m.tool_calls is defined %}{% for call in m.tool_calls %}"
    "{{ ' ' ~ call.function.name ~ (call.function.arguments | tojson) ~ call.id }}{% endfor %}{% endif %}"
    "{{ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|ass|>\n' }}{% endif %}"
)

# In the manner of Llama 2: brackets in plain text, begin and end around each exchange, a space before the answer.
BRACKETS = (
    "{% if messages[0].role == 'system' %}{% set first, turns = messages[0].content ~ '\n\n', messages[1:] %}"
    "{% else %}{% set first, turns = '', messages %}{% endif %}{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('user and assistant must alternate') }}"
    "{% endif %}{% if m.role == 'user' %}{{ bos_token ~ '[Q] ' ~ (first if loop.first else '') ~ m.content.strip() }}"
    "{{ ' [/Q]' }}{% else %}{{ ' ' ~ m.content.strip() ~ ' ' ~ eos_token }}{% endif %}{% endfor %}"
)

# In the manner of Llama 3: a begin token once, the role between two tokens, content trimmed.
HEADERS = (
    "{{ bos_token }}{%- for m in messages %}\n    {{- '<|head|>' + m['role'] + '<|body|>\n\n' }}"
    "{{- m['content'] | trim + '<|end|>' }}\n{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|head|>assistant<|body|>\n\n' }}{%- endif %}"
)

# In the manner of Qwen 3: reasoning only behind the last user turn, and a switch for an empty thought.
FORGETS = (
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}{{- '<|' + m.role[:3] + '|>\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last and m.reasoning_content is string %}"
    "{{- '<think>\n' + m.reasoning_content.strip('\n') + '\n</think>\n\n' }}{%- endif %}"
    "{{- m.content.lstrip('\n') + '<|end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|ass|>\n' }}{%- if enable_thinking is defined and not enable_thinking %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)

ROLES = ["<|sys|>", "<|use|>", "<|ass|>", "<|too|>"]
TOKENS = ["<pad>", "<unk>", "<s>", "</s>", *ROLES, "<|head|>", "<|body|>", "<|end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


# As Llama 3 and Qwen split: a run of line ends is one piece wherever it stands. GPT-2 parts it before a word.
WORDS = Regex(r"\s*[\r\n]+|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def byte_level(*, words: Any = WORDS, space: bool = False, normalizer: Any = None) -> Engine:
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=words is None)
    if words is not None:
        engine.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), engine.pre_tokenizer])
    engine.decoder = decoders.ByteLevel()
    if normalizer is not None:
        engine.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=TOKENS, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    engine.train_from_iterator([*CORPUS, *TEXTS * 3, "a\n\n\n\nb\n\nc" * 20], trainer)
    return engine


def metaspace(scheme: str) -> Engine:
    engine = Engine(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    ending = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if scheme == "normalizer":  # as conversions of Llama 2 have it
        engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    if scheme != "never":
        ending.append(decoders.Strip(" ", 1, 0))
    engine.decoder = decoders.Sequence(ending)
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*TOKENS, *BYTES], show_progress=False, max_token_length=6
    )
    engine.train_from_iterator(CORPUS[:2], trainer)
    definition = json.loads(engine.to_str())
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] in TOKENS]
    return Engine.from_str(json.dumps(definition))


ENGINES = {
    "bytes": lambda: byte_level(),
    "bytes-gpt2": lambda: byte_level(words=None),
    "bytes-gpt2-space": lambda: byte_level(words=None, space=True),
    "bytes-nfc": lambda: byte_level(normalizer=normalizers.NFC()),
    "metaspace-always": lambda: metaspace("always"),
    "metaspace-first": lambda: metaspace("first"),
    "metaspace-never": lambda: metaspace("never"),
    "metaspace-normalizer": lambda: metaspace("normalizer"),
}


def publish(folder: Path, engine: Engine, template: Any, *, own_file: bool = True) -> tuple[Tokenizer, Any]:
    """Write a folder as `transformers` writes it; return what we and they read from it."""
    engine.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=engine, chat_template=template, **named)
    fast.save_pretrained(folder, save_jinja_files=own_file)
    assert (folder / "chat_template.jinja").is_file() == (own_file and template is not None)
    return Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)


def dialogues(number: int, forms: str = "") -> list[tuple[list, list | None]]:
    """Conversations whose answers do not begin with a line end; see the test of those that do."""
    return conversations(number, answers=[text for text in TEXTS if text[:1] not in "\r\n" or not text], forms=forms)


@pytest.mark.parametrize("own_file", [True, False], ids=["file", "field"])
@pytest.mark.parametrize("engine", ["bytes", "bytes-nfc"])
def test_chatml_folders(tmp_path: Path, engine: str, own_file: bool) -> None:
    ours, theirs = publish(tmp_path, ENGINES[engine](), CHATML, own_file=own_file)
    for turns, tools in dialogues(100, forms="wrapped"):
        turns = [{key: value for key, value in turn.items() if key != "tools"} for turn in turns]
        assert render(ours, turns, tools=tools).token_ids == their_ids(theirs, turns, tools)
        for prompt in filter(None, prompts_of(turns)):
            rendered = render(ours, prompt, tools=tools, add_generation_prompt=True)
            assert rendered.token_ids == their_ids(theirs, prompt, tools, add_generation_prompt=True)


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_bracket_folders(tmp_path: Path, engine: str) -> None:
    ours, theirs = publish(tmp_path, ENGINES[engine](), BRACKETS)
    for turns, _ in dialogues(100):
        rendered = render(ours, turns)
        assert rendered.token_ids == their_ids(theirs, turns)
        assert sum(rendered.mask) > 0
        for prompt in prompts_of(turns):
            assert render(ours, prompt, add_generation_prompt=True).token_ids == their_ids(theirs, prompt)


@pytest.mark.parametrize("engine", sorted(set(ENGINES) - {"bytes-gpt2"}))
def test_header_folders(tmp_path: Path, engine: str) -> None:
    ours, theirs = publish(tmp_path, ENGINES[engine](), HEADERS)
    for turns, _ in dialogues(100):
        assert render(ours, turns).token_ids == their_ids(theirs, turns)
        for prompt in filter(None, prompts_of(turns)):
            rendered = render(ours, prompt, add_generation_prompt=True)
            assert rendered.token_ids == their_ids(theirs, prompt, add_generation_prompt=True)


@pytest.mark.parametrize("thinking", [None, True, False])
def test_folders_that_forget_reasoning(tmp_path: Path, thinking: bool | None) -> None:
    ours, theirs = publish(tmp_path, byte_level(), FORGETS)
    refused = 0
    options = {"add_generation_prompt": True, "enable_thinking": thinking}
    for turns, _ in dialogues(100):
        for prompt in filter(None, prompts_of(turns)):
            assert render(ours, prompt, **options).token_ids == their_ids(theirs, prompt, **options)
        try:
            rendered = render(ours, turns)
        except ChatError:  # no mask can be told
            refused += 1
        else:
            assert rendered.token_ids == their_ids(theirs, turns)
    assert refused < 50


def test_an_answer_that_begins_with_a_line_end_stays_apart_from_its_prompt(tmp_path: Path) -> None:
    ours, theirs = publish(tmp_path, byte_level(), CHATML)
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "\n\nb"}
    prompt = their_ids(theirs, [question], add_generation_prompt=True)
    rendered = render(ours, [question, answer])
    assert rendered.token_ids == prompt + theirs.encode("\n\nb<|end|>\n")
    assert rendered.mask == [0] * len(prompt) + [1] * (len(rendered.mask) - len(prompt))
    joined = their_ids(theirs, [question, answer])  # a prompt would not have led to these
    assert joined[: len(prompt)] != prompt
    assert theirs.decode(joined) == ours.decode(rendered.token_ids)


@pytest.mark.parametrize("own_file", [True, False], ids=["files", "list"])
def test_named_templates_are_chosen_as_they_choose(tmp_path: Path, own_file: bool) -> None:
    templates = {"default": HEADERS, "tool_use": CHATML, "rag": "{{ documents[0] }}"}
    ours, theirs = publish(tmp_path, byte_level(), templates, own_file=own_file)
    turns = [{"role": "user", "content": "q"}]
    for tools in (None, TOOLS):
        rendered = render(ours, turns, tools=tools, add_generation_prompt=True)
        assert rendered.token_ids == their_ids(theirs, turns, tools, add_generation_prompt=True)
    ours.save(tmp_path)
    assert Tokenizer.load(tmp_path) == ours


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_plain_texts_of_other_folders(tmp_path: Path, engine: str) -> None:
    ours, theirs = publish(tmp_path, ENGINES[engine](), None)
    assert set(theirs.all_special_ids) <= ours.control_ids
    for text in [*TEXTS, "<think>a</think>b <think> c", *(f"{a}{b}" for a in TEXTS for b in TEXTS[:4])]:
        ids = ours.encode(text)
        assert ids == ours.encode_control(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids)
    spelled = "a<s> b</s>\n<pad>c"
    ids = ours.encode_control(spelled)
    assert ids == theirs.encode(spelled, add_special_tokens=False)
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("listed", [True, False])
def test_tokens_that_only_the_configuration_names_count(tmp_path: Path, listed: bool) -> None:
    publish(tmp_path, byte_level(), HEADERS)
    definition = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    by_name = {token["content"]: token for token in definition["added_tokens"]}
    moved = [by_name.pop("<s>"), by_name.pop("</think>")]
    definition["added_tokens"] = list(by_name.values())
    config |= {"sep_token": "<new>", "additional_special_tokens": ["<more>"]}
    if listed:
        config["added_tokens_decoder"] = {str(token.pop("id")): token for token in moved}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition), "utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for token in ("<s>", "</think>", "<new>", "<more>"):
        assert ours.encode_control(f"x{token} y") == theirs.encode(f"x{token} y", add_special_tokens=False), token
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.vocab_size == len(theirs)


def test_names_of_the_older_layout_count(tmp_path: Path) -> None:
    publish(tmp_path, byte_level(), HEADERS, own_file=False)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    names = {"bos_token": "<|sys|>", "eos_token": {"content": "<|end|>", "lstrip": False, "rstrip": False}}
    for name in names:
        del config[name]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names), "utf-8")
    ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    turns, _ = dialogues(1)[0]
    assert render(ours, turns).token_ids == their_ids(theirs, turns)
