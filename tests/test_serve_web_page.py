"""The chat page in a real browser: history, settings, errors, and whether everybody can use it.

Every test also fails on an error in the console, a violation of the Content-Security-Policy, or a request to another
origin (see browser.py).
"""

import itertools
import json
import threading

import pytest
from browser import action, body, expect, finished, ready, said, say, watched
from scripted_api import Reply, chunk, event, refused, spoken

from minillm_jax.data.records import read_file

pytestmark = pytest.mark.browser

REFUSED = "Failed to load resource: the server responded with a status of "
UNREACHED = "Failed to load resource: net::ERR_"
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TITLES = "#chats .choose"


def opened(chromium, scripted, *expected_errors, **options):
    return watched(chromium, scripted.url, expected_errors, **options)


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
    assert scripted.hung_up.wait(5)


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


# --- Everybody ---------------------------------------------------------------------------------------------------


def tab_around_to_the_top(page):
    """The focus is in the message field; behind it come Send, the end of the page, and its top."""
    for _ in range(3):
        page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the message field")).to_be_focused()


def test_keyboard_alone_is_enough(page, scripted):
    scripted.replies = [Reply(itertools.repeat(chunk(content="on and ")), delay=0.01), spoken("short")]
    tab_around_to_the_top(page)
    page.keyboard.press("Enter")
    expect(page.locator("#message")).to_be_focused()
    page.keyboard.type("two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    page.keyboard.press("Enter")
    expect(body(page)).to_contain_text("on and on")
    page.keyboard.press("Escape")
    assert scripted.hung_up.wait(5)
    finished(page)
    assert scripted.requests[0]["messages"] == [{"role": "user", "content": "two\nlines"}]
    page.keyboard.press("Shift+Tab")
    expect(page.locator("article").last.get_by_role("button", name="Regenerate")).to_be_focused()
    page.keyboard.press("Enter")
    expect(body(page)).to_have_text("short")
    expect(page.locator("#message")).to_be_focused()


def test_focus_goes_from_top_to_end_and_can_be_seen(page, scripted):
    scripted.replies = [spoken("one")]
    said(page)
    tab_around_to_the_top(page)
    page.keyboard.press("Shift+Tab")
    seen = []
    script = """() => {
        const node = document.activeElement, style = getComputedStyle(node);
        return [node.labels?.[0]?.textContent ?? node.ariaLabel ?? node.textContent, parseFloat(style.outlineWidth),
                style.outlineStyle, node.getBoundingClientRect().width > 0 && (node.closest('.actions')
                ? getComputedStyle(node.closest('.actions')).opacity : '1')];
    }"""
    for _ in range(20):
        page.keyboard.press("Tab")
        name, width, style, opacity = page.evaluate(script)
        assert (width >= 2, style, opacity) == (True, "solid", "1"), name
        seen.append(name)
    assert seen == [
        "Skip to the message field",
        "New conversation",
        *["Hello", "Rename", "Delete", "Export"],
        *["Export all", "Import", "Colours"],
        *["Model", "Settings", "Messages"],
        *["Copy this message", "Edit", "Delete"],
        *["Copy this message", "Edit", "Delete", "Regenerate"],
        "Message",
    ]


def test_words_of_an_input_method_are_not_sent(page, scripted):
    page.locator("#message").fill("にほ")
    page.locator("#message").dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    assert scripted.requests == []
    expect(page.locator("#message")).to_have_value("にほ")


def test_sentences_are_read_out_once_and_as_they_end(page, scripted):
    gate = threading.Event()
    pieces = [chunk(content="It rains. It"), gate, chunk("stop", content=" pours! Or"), b"data: [DONE]\n\n"]
    scripted.replies = [Reply(pieces)]
    say(page, "Weather?")
    spoken_out = page.locator("[aria-live] p")
    expect(spoken_out).to_have_text(["It rains."])
    gate.set()
    expect(spoken_out.last).to_have_text("End of the reply.")
    assert " ".join(spoken_out.all_inner_texts()) == "It rains. It pours! Or End of the reply."


def test_every_control_has_a_name(page, scripted):
    scripted.replies = [spoken("```\ncode\n```")]
    said(page)
    action(page, "Edit")
    page.get_by_role("button", name="Settings").click()
    unnamed = """[...document.querySelectorAll('button, input, select, textarea')].filter(node =>
        !(node.labels?.length || node.ariaLabel || (node.tagName === 'BUTTON' && node.textContent.trim())))"""
    assert page.evaluate(f"{unnamed}.map(node => node.outerHTML)") == []


CONTRAST = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
    const light = (color) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
        const line = (v) => v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
        return [0.2126 * line(r) + 0.7152 * line(g) + 0.0722 * line(b), a];
    };
    const ground = (node) => {
        const [value, alpha] = light(getComputedStyle(node).backgroundColor);
        return alpha === 255 ? value : ground(node.parentElement);
    };
    const low = [];
    let count = 0;
    for (const node of document.querySelectorAll('body *')) {
        const own = [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
        if (!(own || node.matches('textarea')) || !node.checkVisibility()) continue;
        const [a, b] = [light(getComputedStyle(node).color)[0], ground(node)].sort((x, y) => y - x);
        count++;
        if ((a + 0.05) / (b + 0.05) < 4.5) low.push([node.outerHTML.slice(0, 80), (a + 0.05) / (b + 0.05)]);
    }
    return [count, low];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_its_ground(chromium, scripted, scheme):
    call = {"index": 0, "id": "c", "function": {"name": "weather", "arguments": "{}"}}
    shown = chunk(content="`code`\n\n```py\nx\n```", reasoning_content="Hm.", tool_calls=[call])
    scripted.replies = [Reply((shown, chunk("length"), b"data: [DONE]\n\n")), refused(500, "no")]
    with opened(chromium, scripted, REFUSED + "500", color_scheme=scheme) as page:
        ready(page)
        said(page)
        say(page, "More")
        expect(page.locator(".trouble")).to_be_visible()
        count, low = page.evaluate(CONTRAST)
        assert count > 25 and low == []
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Top p").fill("x")
        assert page.evaluate(CONTRAST)[1] == []


def test_colours_follow_the_system_until_they_are_switched(chromium, scripted):
    ground = "getComputedStyle(document.body).backgroundColor"
    with opened(chromium, scripted, color_scheme="dark") as page:
        dark = page.evaluate(ground)
        page.get_by_label("Colours").select_option("light")
        light = page.evaluate(ground)
        page.reload()
        assert dark != light == page.evaluate(ground)


def test_narrow_window_never_scrolls_sideways(chromium, scripted):
    long = f"{'x' * 300}\n\n- {'y' * 200}\n\n`{'z' * 200}`\n\n```\n{'code ' * 60}\n```"
    call = {"index": 0, "id": "c", "function": {"name": "n" * 90, "arguments": json.dumps({"key": "v" * 300})}}
    scripted.models = ["base", "m" * 80]
    scripted.replies = [Reply((chunk(content=long, tool_calls=[call]), chunk("stop"))), refused(500, "w" * 200)]
    places = "[...document.querySelectorAll('html, #scroll, aside, dialog, header')]"
    fits = f"{places}.every(node => node.scrollWidth <= node.clientWidth)"
    with opened(chromium, scripted, REFUSED + "500", viewport={"width": 360, "height": 640}) as page:
        ready(page)
        assert page.evaluate(fits)
        page.get_by_label("Model").select_option("m" * 80)
        say(page, "q" * 200)
        finished(page)
        assert page.evaluate(fits)
        page.get_by_label("Result of").fill("done")
        page.get_by_role("button", name="Send results").click()
        expect(page.locator(".trouble")).to_be_visible()
        assert page.evaluate(fits)
        page.get_by_role("button", name="Chats").click()
        expect(page.locator("#sidebar")).to_be_visible()
        assert page.evaluate(fits)
        page.keyboard.press("Escape")
        expect(page.locator("#sidebar")).to_be_hidden()
        expect(page.get_by_role("button", name="Chats")).to_be_focused()
        page.get_by_role("button", name="Settings").click()
        assert page.evaluate(fits)
        expect(page.locator("#message")).to_be_in_viewport()
