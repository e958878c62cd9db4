"""The chat page in a real browser, against a scripted API: replies as they stream, and how they are shown.

Every test also fails on an error in the console, a violation of the Content-Security-Policy, or a request to another
origin (see browser.py).
"""

import itertools
import json
import re
import threading
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import action, body, expect, finished, opened, ready, said, say
from scripted_api import PAGE, Reply, chunk, spoken, usage

ROOT = Path(__file__).parent.parent
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}

on_browser = pytest.mark.browser


# --- The files ---------------------------------------------------------------------------------------------------


class Inline(HTMLParser):
    """Collects what a strict policy would refuse, and what is loaded."""

    def __init__(self):
        super().__init__()
        self.refused, self.loaded = [], []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.refused += [name for name in given if name == "style" or name.startswith("on")]
        if tag == "style" or (tag == "script" and "src" not in given):
            self.refused.append(tag)
        self.loaded += [given[name] for name in ("src", "href") if name in given and tag != "a"]


def test_document_holds_nothing_inline_and_loads_only_its_own_files():
    document = Inline()
    document.feed((PAGE / "index.html").read_text())
    assert document.refused == []
    assert document.loaded and all((PAGE / path.removeprefix("web/")).is_file() for path in document.loaded)


def test_no_module_can_turn_text_into_html():
    for path in PAGE.glob("*.js"):
        assert not re.search(
            r"(inner|outer)HTML|insertAdjacent|document\.write|DOMParser|\beval\b", path.read_text()
        ), path


def test_modules_are_small_and_open_by_saying_what_they_are():
    for path in PAGE.glob("*.js"):
        lines = path.read_text().splitlines()
        assert lines[0].startswith("// ") and len(lines) <= 300 and max(map(len, lines)) <= 120, path


def test_every_file_of_the_page_is_installed_with_the_package():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["serve"]
    assert all(any(fnmatch(f"web/{path.name}", pattern) for pattern in patterns) for path in PAGE.iterdir())


# --- Replies -----------------------------------------------------------------------------------------------------


@on_browser
def test_reply_grows_while_it_streams(page, scripted):
    gate = threading.Event()
    scripted.replies = [Reply((chunk(content="one"), gate, chunk(content=" two"), chunk("stop"), b"data: [DONE]\n\n"))]
    say(page, "Count")
    expect(body(page)).to_have_text("one")
    expect(page.locator("#stop")).to_be_visible()
    gate.set()
    expect(body(page)).to_have_text("one two")
    finished(page)


@on_browser
def test_stop_closes_the_connection_and_keeps_what_was_said(page, scripted):
    scripted.replies = [Reply(itertools.repeat(chunk(content="on and ")), delay=0.01)]
    say(page, "Talk")
    expect(body(page)).to_contain_text("on and on")
    page.locator("#stop").click()
    assert scripted.hung_up.wait(20)
    finished(page)
    expect(body(page)).to_contain_text("on and on")
    expect(page.locator("article .stats").last).to_contain_text("stopped")
    expect(page.locator(".trouble")).to_have_count(0)


@on_browser
def test_regenerate_asks_the_same_again_and_replaces_the_reply(page, scripted):
    scripted.replies = [spoken("first"), spoken("second")]
    said(page)
    action(page, "Regenerate")
    expect(body(page)).to_have_text("second")
    expect(page.locator("article")).to_have_count(2)
    assert scripted.requests[0] == scripted.requests[1]


@on_browser
def test_conversation_is_sent_whole_with_reasoning_where_it_stood(page, scripted):
    scripted.replies = [spoken("Hi", reasoning_content="A greeting."), spoken("Bye")]
    said(page)
    say(page, "Goodbye")
    expect(body(page)).to_have_text("Bye")
    assert scripted.requests[1]["messages"] == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi", "reasoning_content": "A greeting."},
        {"role": "user", "content": "Goodbye"},
    ]


@on_browser
def test_counts_and_speed_stand_under_the_reply(page, scripted):
    scripted.replies = [spoken(*["word "] * 21, delay=0.04)]
    said(page)
    line = page.locator("article .stats").last.inner_text()
    rate = float(re.search(r"([\d.]+) tokens/s", line)[1])
    assert line.startswith("21 tokens · ") and line.endswith("prompt 12 (4 cached)")
    assert 4 < rate < 30  # 20 tokens in at least 0.8 s, less what the browser was late to see the first one


@on_browser
def test_speed_leaves_out_what_the_first_chunk_brought_with_the_prompt(page, scripted):
    halves = [chunk(content="x" * 40), chunk("stop", content="y" * 40)]
    scripted.replies = [Reply((*halves, usage(3, 16), b"data: [DONE]\n\n"), delay=0.5)]
    said(page)
    line = page.locator("article .stats").last.inner_text()
    assert (
        5 < float(re.search(r"([\d.]+) tokens/s", line)[1]) < 22
    )  # 8 tokens in half a second; all but one would be 30


@on_browser
def test_edited_question_is_asked_again_without_what_followed(page, scripted):
    scripted.replies = [spoken("four"), spoken("six")]
    say(page, "2 + 2")
    finished(page)
    action(page, "Edit", 0)
    page.get_by_label("Text of this message").fill("3 + 3")
    page.get_by_role("button", name="Save and ask again").click()
    expect(body(page)).to_have_text("six")
    expect(page.locator("article")).to_have_count(2)
    assert scripted.requests[1]["messages"] == [{"role": "user", "content": "3 + 3"}]


@on_browser
def test_reply_can_be_corrected_and_a_message_deleted_and_brought_back(page, scripted):
    scripted.replies = [spoken("four"), spoken("thanks")]
    said(page)
    action(page, "Edit")
    page.get_by_label("Text of this message").fill("five")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(body(page)).to_have_text("five")
    action(page, "Delete", 0)
    expect(page.locator("article")).to_have_count(1)
    say(page, "Really?")
    expect(body(page)).to_have_text("thanks")
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("article .body")).to_have_text(["Hello", "five", "Really?", "thanks"])
    assert [turn["content"] for turn in scripted.requests[1]["messages"]] == ["five", "Really?"]


@on_browser
def test_markup_of_a_reply_is_shown_and_never_runs(page, scripted):
    attack = '<script>alert(1)</script> <img src="x" onerror="alert(2)"> [a](javascript:alert(3)) **<b>x</b>**'
    scripted.replies = [spoken(attack, f"\n\n```html\n{attack}\n```\n", reasoning_content=attack)]
    say(page, attack)
    finished(page)
    expect(body(page, 0)).to_have_text(attack)
    expect(body(page)).to_contain_text('<script>alert(1)</script> <img src="x" onerror="alert(2)">')
    expect(page.locator("article pre")).to_have_text(attack)
    expect(page.locator(":is(article, aside, header) :is(script, img, a, b)")).to_have_count(0)


@on_browser
def test_markdown_becomes_nodes(page, scripted):
    text = "# Title\n\nA **bold** `x*y*z` *word*\nnext\n\n1. one\n2. two\n   - inner\n\n```py\na = 1\n\n\tb\n```\nend"
    scripted.replies = [spoken(*text)]
    said(page)
    shape = (
        'node => [...node.children].map(c => c.outerHTML.replace(/ (class|tabindex|type|aria-label)="[^"]*"/g, \'\'))'
    )
    assert body(page).evaluate(shape) == [
        "<h4>Title</h4>",
        "<p>A <strong>bold</strong> <code>x*y*z</code> <em>word</em>\nnext</p>",
        "<ol><li>one</li><li>two<ul><li>inner</li></ul></li></ol>",
        "<figure><figcaption>py<button>Copy</button></figcaption><pre><code>a = 1\n\n\tb</code></pre></figure>",
        "<p>end</p>",
    ]


@on_browser
def test_growing_reply_keeps_the_nodes_of_its_finished_blocks(page, scripted):
    gate = threading.Event()
    scripted.replies = [Reply((chunk(content="first\n\nsec"), gate, chunk("stop", content="ond"), b"data: [DONE]\n\n"))]
    say(page, "Two paragraphs")
    expect(body(page)).to_contain_text("sec")
    body(page).evaluate("node => { node.firstChild.marked = true }")
    gate.set()
    expect(body(page)).to_contain_text("second")
    assert body(page).evaluate("node => node.firstChild.marked") is True


@on_browser
def test_code_is_copied_as_it_was_written(chromium, scripted):
    scripted.replies = [spoken("```\nif a < b:\n    pass\n```")]
    with opened(chromium, scripted, permissions=["clipboard-read", "clipboard-write"]) as page:
        ready(page)
        said(page)
        page.get_by_role("button", name="Copy this code").click()
        expect(page.locator("figcaption button")).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == "if a < b:\n    pass"


@on_browser
def test_thought_is_folded_and_stays_as_the_reader_left_it(page, scripted):
    gates = [threading.Event(), threading.Event()]
    pieces = [chunk(reasoning_content="Let me"), gates[0], chunk(reasoning_content=" see."), gates[1]]
    scripted.replies = [Reply((*pieces, chunk("stop", content="Done."), b"data: [DONE]\n\n"))]
    say(page, "Think")
    thought = page.locator("details.thought")
    expect(thought.locator("summary")).to_have_text("Thinking…")
    expect(thought.locator(".thought-text")).to_be_hidden()
    thought.locator("summary").click()
    gates[0].set()
    expect(thought.locator(".thought-text")).to_have_text("Let me see.")
    expect(thought.locator(".thought-text")).to_be_visible()
    gates[1].set()
    finished(page)
    expect(thought.locator(".thought-text")).to_be_visible()
    expect(thought.locator("summary")).to_contain_text("Thought for")
    expect(body(page)).to_have_text("Done.")


@on_browser
def test_thought_unfolds_while_it_streams_if_wanted(page, scripted):
    gate = threading.Event()
    scripted.replies = [
        Reply((chunk(reasoning_content="Hm."), gate, chunk("stop", content="Yes."), b"data: [DONE]\n\n"))
    ]
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Unfold thoughts").check()
    page.keyboard.press("Escape")
    say(page, "Think")
    expect(page.locator(".thought-text")).to_be_visible()
    gate.set()
    finished(page)
    expect(page.locator(".thought-text")).to_be_hidden()


@on_browser
def test_tool_calls_are_shown_and_answered(page, scripted):
    first = {"index": 0, "id": "c1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    rest = [{"index": 0, "function": {"arguments": piece}} for piece in ('{"city": "Os', 'lo", "days": 3}')]
    second = {"index": 1, "id": "c2", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    deltas = [chunk(tool_calls=[call]) for call in (first, *rest, second)]
    scripted.replies = [Reply((*deltas, chunk("tool_calls"), usage(40, 9), b"data: [DONE]\n\n")), spoken("Rain.")]
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Tools").fill(json.dumps([WEATHER]))
    page.keyboard.press("Escape")
    say(page, "Weather?")
    expect(page.locator(".call pre").first).to_have_text('{\n  "city": "Oslo",\n  "days": 3\n}')
    page.get_by_label("Result of weather").fill('{"sky": "rain"}')
    page.get_by_label("Result of clock").fill("noon")
    page.get_by_role("button", name="Send results").click()
    expect(body(page)).to_have_text("Rain.")
    expect(page.get_by_label("Result of weather")).to_be_hidden()
    assert scripted.requests[0]["tools"] == [WEATHER]
    call, *answers = scripted.requests[1]["messages"][1:]
    assert call["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo", "days": 3}'}},
        {"id": "c2", "type": "function", "function": {"name": "clock", "arguments": "{}"}},
    ]
    assert answers == [
        {"role": "tool", "content": '{"sky": "rain"}', "tool_call_id": "c1"},
        {"role": "tool", "content": "noon", "tool_call_id": "c2"},
    ]


@on_browser
@pytest.mark.parametrize("end", ["\r\r", "\r\n\r\n", "\n\ndata: cut off"], ids=["CR", "CRLF", "cut off"])
def test_events_are_read_however_the_bytes_are_cut(page, end):
    head = ': hi\r\ndata: {"a": "é漢😀"}\r\n\r\nevent: x\ndata:two\r\ndata: lines\n\nid: 1\r\rdata: last'
    script = """async stream => {
        const { readEvents } = await import('/web/sse.js');
        const bytes = new TextEncoder().encode(stream);
        const seen = new Set();
        for (let a = 0; a <= bytes.length; a++) for (let b = a; b <= bytes.length; b++) {
            const parts = [bytes.slice(0, a), bytes.slice(a, b), bytes.slice(b)];
            const events = [];
            const cut = new ReadableStream({ start(c) { parts.forEach((part) => c.enqueue(part)); c.close(); } });
            for await (const data of readEvents(cut)) events.push(data);
            seen.add(JSON.stringify(events));
        }
        return [...seen];
    }"""
    assert [json.loads(events) for events in page.evaluate(script, head + end)] == [
        ['{"a": "é漢😀"}', "two\nlines", "last"],
    ]


@on_browser
def test_log_follows_only_a_reader_who_is_at_the_end(page, scripted):
    gates = [threading.Event(), threading.Event()]
    lines = "line\n\n" * 40
    pieces = [chunk(content=lines), gates[0], chunk(content=lines), gates[1], chunk(content=lines)]
    scripted.replies = [Reply((*pieces, chunk("stop"), b"data: [DONE]\n\n"))]
    say(page, "Go on")
    shown = body(page).locator("p")
    below = (
        "() => { const s = document.getElementById('scroll'); return s.scrollHeight - s.scrollTop - s.clientHeight }"
    )
    expect(shown).to_have_count(40)
    gates[0].set()
    expect(shown).to_have_count(80)
    assert page.evaluate(below) < 2
    page.evaluate("document.getElementById('scroll').scrollTop = 100")
    gates[1].set()
    expect(shown).to_have_count(120)
    finished(page)
    assert page.evaluate("document.getElementById('scroll').scrollTop") == 100
    page.get_by_role("button", name="To the latest").click()
    assert page.evaluate(below) < 2
