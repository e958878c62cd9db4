"""A headless Chromium for tests of the chat page, watched: whatever goes wrong in it fails the test that opened it.

Debian's `chromium`, or another one on the PATH, is driven through playwright's Python package, which brings no browser.
"""

import os
import shutil
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 20_000
"""Milliseconds that anything may take on a busy machine."""
REFUSED = "Failed to load resource: the server responded with a status of "
"""How the console's line on a refused request begins."""
WATCH = "addEventListener('securitypolicyviolation', e => console.error('policy: ' + e.violatedDirective))"


@contextmanager
def launched():
    """Start the browser, or skip with what is missing; fail instead where the environment says that it is required."""
    give_up = pytest.fail if os.environ.get("MINILLM_TEST_BROWSER") == "required" else pytest.skip
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        give_up(f"no Chromium: apt-get install chromium (Debian), or put one of {', '.join(NAMES)} on the PATH")
    try:
        from playwright.sync_api import expect, sync_playwright
    except ImportError:
        give_up("playwright is missing; pip install -e '.[dev]' brings it")
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable)
        yield browser
        browser.close()


@contextmanager
def watched(browser, url, expected_errors=(), **options):
    """Open a page in a fresh profile; at the end, fail on errors in its console and on requests to other origins.

    Args:
        browser: from `launched`.
        url: of the server, the only origin that may be asked.
        expected_errors: beginnings of the console's errors that the test provokes.
        options: of the profile, such as `viewport`.
    """
    context = browser.new_context(**options)
    context.add_init_script(WATCH)
    wrong = []

    def watch(page):
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: wrong.append(f"uncaught: {error}"))
        page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
        page.on("request", lambda request: request.url.startswith((url, "blob:")) or wrong.append(request.url))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))

    context.on("page", watch)
    page = context.new_page()
    page.goto(url)
    yield page
    context.close()
    unexpected = [text for text in wrong if not text.startswith(tuple(expected_errors))] if expected_errors else wrong
    assert unexpected == []


def opened(browser, scripted, *expected_errors, **options):
    """Open the chat page of a scripted API, as `watched` does."""
    return watched(browser, scripted.url, expected_errors, **options)


# --- What a person does, and waits for ---------------------------------------------------------------------------


def expect(thing):
    """Playwright's assertion, which waits until it holds."""
    from playwright.sync_api import expect

    return expect(thing)


def ready(page):
    page.locator("#model:enabled").wait_for()


def say(page, text):
    page.locator("#message").fill(text)
    page.keyboard.press("Enter")


def finished(page):
    expect(page.locator("#send")).to_be_visible()


def said(page):
    """Say hello and wait for the end of the reply."""
    say(page, "Hello")
    finished(page)


def body(page, number=-1):
    """The text of a message."""
    return page.locator("article .body").nth(number)


def action(page, name, number=-1):
    """Press a button of a message, which shows its buttons when it is pointed at."""
    article = page.locator("article").nth(number)
    article.hover()
    article.get_by_role("button", name=name).click()
