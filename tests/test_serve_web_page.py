"""The chat page in a real browser: history, settings and errors.

Every test also fails on an error in the console, a violation of the Content-Security-Policy, or a request to another
origin (see browser.py).
"""

import itertools
import json
import threading

import pytest
from browser import REFUSED, action, body, expect, finished, opened, ready, said, say
from scripted_api import Reply, chunk, event, refused, spoken

from minillm_jax.data.records import read_file

pytestmark = pytest.mark.browser

UNREACHED = "Failed to load resource: net::ERR_"
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TITLES = "#chats .choose"


def set_up(page, **settings):
    """Type into the settings, by label, and close them by the keyboard."""
    page.get_by_role("button", name="Settings").click()
    for label, value in settings.items():
        page.get_by_label(label.replace("_", " ")).fill(value)
    page.keyboard.press("Escape")


def exported(page, folder, button):
    with page.expect_download() as download:
        page.get_by_role("button", name=button, exact=True).click()
    download.value.save_as(folder / "chats.jsonl")
    return folder / "chats.jsonl"


# --- History -----------------------------------------------------------------------------------------------------


def test_reload_keeps_conversations_and_the_one_that_was_open(page, scripted):
    scripted.replies = [spoken("one"), spoken("two")]
    say(page, "First")
    finished(page)
    page.get_by_role("button", name="New conversation").click()
    say(page, "Second")
    finished(page)
    page.get_by_role("button", name="First").click()
    page.reload()
    expect(page.locator(TITLES)).to_have_text(["Second", "First"])
    expect(page.locator("article .body")).to_have_text(["First", "one"])


def test_reload_in_mid_stream_keeps_what_was_said(page, scripted):
    scripted.replies = [Reply(itertools.repeat(chunk(content="and ")), delay=0.01)]
    say(page, "Talk")
    expect(body(page)).to_contain_text("and and")
    page.reload()
    expect(body(page)).to_contain_text("and and")
    assert scripted.hung_up.wait(20)


def test_conversation_is_renamed_deleted_and_brought_back(page, scripted):
    scripted.replies = [spoken("one")]
    said(page)
    page.get_by_role("button", name="Rename").click()
    page.keyboard.type("Greeting")
    page.keyboard.press("Enter")
    expect(page.locator(TITLES)).to_have_text(["Greeting"])
    page.get_by_role("navigation").get_by_role("button", name="Delete").click()
    expect(page.locator(TITLES)).to_have_count(0)
    expect(page.locator("article")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    page.reload()
    expect(page.locator(TITLES)).to_have_text(["Greeting"])
    expect(body(page)).to_have_text("one")


def test_export_is_training_data_and_comes_back_the_same(page, scripted, tmp_path):
    scripted.replies = [spoken("Rain & <wind>", reasoning_content="I think."), spoken("plain")]
    set_up(page, System_prompt="Be brief.", Tools=json.dumps([WEATHER]))
    say(page, "Weather?\nToday.")
    finished(page)
    page.get_by_role("button", name="New conversation").click()
    set_up(page, System_prompt="", Tools="")
    said(page)
    file = exported(page, tmp_path, "Export all")
    records = {len(record.conversations): record for record, _ in read_file(file, "sft")}
    assert records[3].conversations == [
        {"role": "system", "content": "Be brief.", "tools": [WEATHER]},
        {"role": "user", "content": "Weather?\nToday."},
        {"role": "assistant", "content": "Rain & <wind>", "reasoning_content": "I think."},
    ]
    assert [turn["content"] for turn in records[2].conversations] == ["Hello", "plain"]
    before = sorted(file.read_text().splitlines())
    page.evaluate("localStorage.clear(); sessionStorage.clear()")
    page.reload()
    expect(page.locator(TITLES)).to_have_count(0)
    page.locator("#import-file").set_input_files(file)
    expect(page.locator("#notice")).to_contain_text("2 conversations imported.")
    assert sorted(exported(page, tmp_path, "Export all").read_text().splitlines()) == before


def test_import_reads_what_it_can_and_says_which_line_it_cannot(page, tmp_path):
    file = tmp_path / "mixed.jsonl"
    call = {"name": "weather", "arguments": {"city": "Oslo"}}
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    rows = [json.dumps({"conversations": turns}), "", '{"conversations": [{"role": "robot", "content": ""}]}', "{"]
    file.write_text("\n".join(rows))
    page.locator("#import-file").set_input_files(file)
    expect(page.locator("#notice")).to_contain_text(
        "1 conversation imported. mixed.jsonl, line 3: conversations[0].role: is unknown (and 1 more)"
    )
    expect(page.locator(".call")).to_contain_text("calls weather")


FORBIDDEN = "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError') } })"
FULL = "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') }"


@pytest.mark.parametrize(
    ("script", "words"),
    [(FORBIDDEN, "lets the page store nothing"), (FULL, "storage is full")],
    ids=["forbidden", "full"],
)
def test_chat_goes_on_without_storage_and_says_so(page, scripted, script, words):
    page.add_init_script(script)
    page.reload()
    ready(page)
    scripted.replies = [spoken("one"), spoken("two")]
    said(page)
    expect(page.locator("#notice")).to_contain_text(words)
    say(page, "More")
    expect(page.locator("article .body")).to_have_text(["Hello", "one", "More", "two"])
    page.get_by_role("button", name="New conversation").click()
    page.locator(TITLES, has_text="Hello").click()
    expect(body(page)).to_have_text("two")


def test_damaged_history_is_passed_over(page):
    page.evaluate("localStorage.setItem('minillm.chat.x', '{'); localStorage.setItem('minillm.settings', '[')")
    page.reload()
    ready(page)
    expect(page.locator(TITLES)).to_have_count(0)


def test_one_conversation_is_exported_under_its_title(page, scripted):
    scripted.replies = [spoken("one"), spoken("two")]
    said(page)
    page.get_by_role("button", name="New conversation").click()
    say(page, "Why / how?")
    finished(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Export", exact=True).click()
    assert download.value.suggested_filename == "Why-how-.jsonl"
    assert [json.loads(line)["title"] for line in download.value.path().read_text().splitlines()] == ["Why / how?"]


def test_replies_to_two_conversations_do_not_mix(page, scripted):
    gate = threading.Event()
    scripted.replies = [Reply((chunk(content="slow"), gate, chunk("stop", content="ly"))), spoken("quick")]
    say(page, "First")
    expect(body(page)).to_have_text("slow")
    page.get_by_role("button", name="New conversation").click()
    say(page, "Second")
    finished(page)
    gate.set()
    expect(page.locator("article .body")).to_have_text(["Second", "quick"])
    page.locator(TITLES, has_text="First").click()
    expect(page.locator("article .body")).to_have_text(["First", "slowly"])


def test_two_windows_share_the_history(page, scripted):
    other = page.context.new_page()
    other.goto(scripted.url)
    ready(other)
    scripted.replies = [spoken("one")]
    said(page)
    expect(other.locator(TITLES)).to_have_text(["Hello"])


# --- Settings ----------------------------------------------------------------------------------------------------


def test_settings_are_sent_and_survive_a_reload(page, scripted):
    scripted.replies = [spoken("one"), spoken("two")]
    numbers = {"Temperature": "0.5", "Top_p": "0.9", "Top_k": "40", "Min_p": "0.05", "Repetition_penalty": "1.1"}
    set_up(page, **numbers, Longest_reply="64", Seed="7", System_prompt="Be brief.")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Thinking", exact=True).select_option("off")
    page.keyboard.press("Escape")
    page.get_by_label("Model").select_option("poet")
    said(page)
    page.reload()
    ready(page)
    action(page, "Regenerate")
    expect(body(page)).to_have_text("two")
    for request in scripted.requests:
        assert request == {
            "model": "poet",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 40,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "max_tokens": 64,
            "seed": 7,
            "chat_template_kwargs": {"enable_thinking": False},
        }


def test_empty_settings_are_left_to_the_server(page, scripted):
    scripted.replies = [spoken("one")]
    set_up(page, Temperature="", Top_p="", Longest_reply="")
    said(page)
    assert set(scripted.requests[0]) == {"model", "messages", "stream", "stream_options"}


@pytest.mark.parametrize(
    ("label", "value", "words"),
    [
        ("Temperature", "hot", "Give a number."),
        ("Top p", "1.5", "Give 0 to 1."),
        ("Top k", "2.5", "Give a whole number."),
        ("Tools", "[{]", "Not JSON"),
        ("Tools", '{"name": "f"}', "Not a list of tools"),
    ],
)
def test_setting_that_makes_no_sense_is_said_and_not_sent(page, scripted, label, value, words):
    scripted.replies = [spoken("one")]
    page.get_by_role("button", name="Settings").click()
    page.get_by_label(label).fill(value)
    expect(page.get_by_role("alert").filter(has_text=words)).to_be_visible()
    expect(page.get_by_label(label)).to_have_attribute("aria-invalid", "true")
    page.keyboard.press("Escape")
    said(page)
    assert scripted.requests[0] | {"temperature": 0.7, "top_p": 0.95} == scripted.requests[0]
    assert "top_k" not in scripted.requests[0] and "tools" not in scripted.requests[0]


def test_defaults_come_back(page, scripted):
    scripted.replies = [spoken("one")]
    set_up(page, Temperature="0.1", Seed="3")
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Back to the defaults").click()
    expect(page.get_by_label("Temperature")).to_have_value("0.7")
    page.keyboard.press("Escape")
    said(page)
    assert scripted.requests[0]["temperature"] == 0.7 and "seed" not in scripted.requests[0]


def test_api_key_is_kept_for_the_session_only(page, scripted):
    scripted.replies = [spoken("one")]
    set_up(page, API_key="s3cret")
    said(page)
    assert scripted.keys[-1] == "Bearer s3cret"
    assert "s3cret" not in page.evaluate("JSON.stringify(localStorage)")
    assert page.evaluate("Object.values(sessionStorage)").count("s3cret") == 1


# --- Errors ------------------------------------------------------------------------------------------------------


def test_missing_key_is_asked_for_where_the_reply_would_be(chromium, scripted):
    scripted.api_key = "right"
    scripted.replies = [spoken("in")]
    with opened(chromium, scripted, REFUSED + "401") as page:
        expect(page.locator("#notice")).to_contain_text("The server wants an API key: give the right key")
        say(page, "Hello")
        trouble = page.locator("#trouble")
        expect(trouble).to_contain_text("The server wants an API key")
        trouble.get_by_role("button", name="Enter API key").click()
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.type("right")
        page.keyboard.press("Tab")
        ready(page)
        page.keyboard.press("Escape")
        trouble.get_by_role("button", name="Try again").click()
        expect(body(page)).to_have_text("in")
        expect(trouble).to_be_empty()


@pytest.mark.parametrize(
    ("status", "headers", "words", "label"),
    [
        (429, {"Retry_After": "2"}, "The server is busy: the reason", "Try again (in 2 s)"),
        (503, {"Retry_After": "9"}, "The server is not ready: the reason", "Try again (in 9 s)"),
        (500, {}, "The server refused the request (500): the reason", "Try again"),
        (400, {}, "The server refused the request (400): the reason", "Try again"),
    ],
)
def test_refusal_is_shown_where_the_reply_would_be(chromium, scripted, status, headers, words, label):
    scripted.replies = [refused(status, "the reason", **headers), spoken("at last")]
    with opened(chromium, scripted, REFUSED + str(status)) as page:
        ready(page)
        say(page, "Hello")
        expect(page.get_by_role("alert").filter(has_text=words)).to_be_visible()
        page.get_by_role("button", name=label, exact=True).click()
        expect(page.locator("article .body")).to_have_text(["Hello", "at last"])
        assert scripted.requests[0] == scripted.requests[1]


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (b"", "The connection ended before the reply did."),
        (event({"error": {"message": "out of memory"}}), "out of memory"),
        (b"data: {oops\n\n", "The server sent something that is not JSON: {oops"),
    ],
    ids=["ends", "error", "not JSON"],
)
def test_reply_that_breaks_off_is_kept_and_can_be_tried_again(page, scripted, last, words):
    scripted.replies = [Reply((chunk(content="half a"), last)), spoken("a whole")]
    said(page)
    expect(page.locator("#trouble")).to_contain_text(words)
    expect(body(page)).to_have_text("half a")
    expect(page.locator("article .stats").last).to_contain_text("broken off")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("article .body")).to_have_text(["Hello", "a whole"])


def test_server_that_is_gone_is_said(chromium, scripted):
    with opened(chromium, scripted, UNREACHED) as page:
        ready(page)
        page.context.set_offline(True)
        say(page, "Hello")
        expect(page.locator("#trouble")).to_contain_text("The server cannot be reached. Is it running?")


def test_page_waits_until_the_server_is_ready(chromium, scripted):
    scripted.ready = False
    with opened(chromium, scripted, REFUSED + "503") as page:
        expect(page.locator("#status")).to_contain_text("not ready")
        scripted.ready = True
        ready(page)
        expect(page.locator("#status")).to_be_empty()
        assert page.locator("#model option").all_inner_texts() == ["base", "poet"]


def test_question_without_a_reply_can_be_asked_again(page, scripted):
    gate = threading.Event()
    scripted.replies = [Reply((gate,)), spoken("late")]
    say(page, "Hello")
    page.locator("#stop").click()
    expect(page.locator("#trouble")).to_contain_text("This message has no reply.")
    page.reload()
    page.get_by_role("button", name="Try again").click()
    expect(body(page)).to_have_text("late")
    gate.set()
