"""The chat page in a real browser: by keyboard, by ear, on a phone, in light and dark.

Every test also fails on an error in the console, a violation of the Content-Security-Policy, or a request to another
origin (see browser.py).
"""

import itertools
import json
import threading

import pytest
from browser import REFUSED, action, body, expect, finished, opened, ready, said, say
from scripted_api import Reply, chunk, refused, spoken

pytestmark = pytest.mark.browser


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
    assert scripted.hung_up.wait(20)
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
    seen = []
    script = """() => {
        const node = document.activeElement, style = getComputedStyle(node);
        return [node.labels?.[0]?.textContent ?? node.ariaLabel ?? node.textContent, parseFloat(style.outlineWidth),
                style.outlineStyle, node.getBoundingClientRect().width > 0 && (node.closest('.actions')
                ? getComputedStyle(node.closest('.actions')).opacity : '1')];
    }"""
    for _ in range(20):
        name, width, style, opacity = page.evaluate(script)
        assert (width >= 2, style, opacity) == (True, "solid", "1"), name
        seen.append(name)
        page.keyboard.press("Tab")
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
