"""The report on codes in a browser: headless Chromium, spoken to over two pipes."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lpc_jax.evaluation.codes import page as pages
from tests.evaluation.codes import looks

pytestmark = pytest.mark.parity

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Root, as in containers, has no sandbox.
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
PATIENCE = 30
DESKTOP, PHONE = (1280, 900), (390, 844)


class Chromium:
    """The DevTools protocol: JSON messages, each ended by a zero byte."""

    def __init__(self, program: str, profile: Path) -> None:
        command_out, command_in = os.pipe()
        answer_out, answer_in = os.pipe()
        # Chromium reads from descriptor 3 and writes to 4.
        script = f'exec "$0" "$@" 3<&{command_out} 4>&{answer_in}'
        flags = (*FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}")
        self.process = subprocess.Popen(
            ["bash", "-c", script, program, *flags],
            pass_fds=(command_out, answer_in),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_out)
        os.close(answer_in)
        self._commands, self._answers = command_in, os.fdopen(answer_out, "rb", 0)
        self._number, self._read = 0, b""
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._commands)
        self._answers.close()

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            some = self._answers.read(1 << 20)
            assert some, "Chromium has ended"
            self._read += some
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command; events that come meanwhile are kept."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": params}
        if self.session is not None:
            command["sessionId"] = self.session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            message = self._message()
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def evaluate(self, expression: str) -> Any:
        """What an expression is in the page."""
        result = self.ask(
            "Runtime.evaluate",
            expression=expression,
            returnByValue=True,
            awaitPromise=True,
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, page: Path, size: tuple[int, int]) -> None:
        """The page alone in a new window, loaded to its end."""
        self.session, self.events = None, []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        width, height = size
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=size == PHONE,
        )
        self.events = []
        self.ask("Page.navigate", url=page.as_uri())
        end = time.monotonic() + PATIENCE
        while self.evaluate("location.href + document.readyState") != (
            page.as_uri() + "complete"
        ):
            assert time.monotonic() < end, "the page did not load"

    def screenshot(self, file: Path) -> None:
        """The whole page."""
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no Chromium: none of {', '.join(NAMES)} is in PATH")
    browser = Chromium(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pages.write(looks.look(), tmp_path_factory.mktemp("report"))


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_needs_no_network_and_shows_its_pictures(
    size, page, chromium, tmp_path
):
    chromium.open(page, size)
    requests = [
        event["params"]["request"]["url"].partition(",")[0]
        for event in chromium.events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert requests == [page.as_uri(), *["data:image/png;base64"] * 3]
    complaints = [
        event
        for event in chromium.events
        if event["method"]
        in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    ]
    assert complaints == []
    widths = chromium.evaluate(
        "Promise.all([...document.images].map(i => i.decode().then("
        "() => [i.naturalWidth, i.alt])))"
    )
    assert len(widths) == 3
    assert all(width > 500 and alt for width, alt in widths)
    # Wide things scroll by themselves, the page doesn't.
    assert chromium.evaluate("document.documentElement.scrollWidth") == size[0]
    chromium.screenshot(tmp_path / "page.png")
    print(f"look at {tmp_path / 'page.png'}")


def test_what_others_wrote_is_text(page, chromium):
    chromium.open(page, DESKTOP)
    assert chromium.evaluate("document.scripts.length") == 0
    assert chromium.evaluate("document.title").startswith("Codes of runs/<i>made up")
    prompts = chromium.evaluate(
        "[...document.querySelectorAll('.prompt')].map(p => p.textContent)"
    )
    assert len(prompts) == looks.CODES * 8
    assert all(text.startswith(looks.HOSTILE) for text in prompts)


def test_a_link_to_a_code_opens_it(page, chromium):
    chromium.open(page, DESKTOP)
    opened = "document.querySelectorAll('details[open]').length"
    assert chromium.evaluate(opened) == 0
    chromium.evaluate("document.querySelector('a[href=\"#code-5\"]').click()")
    assert chromium.evaluate(opened) == 1
    summary = chromium.evaluate("document.querySelector('details[open]').innerText")
    assert summary.startswith("Code 5:")


def test_every_id_is_once_and_every_link_leads_to_one(page, chromium):
    chromium.open(page, DESKTOP)
    ids = chromium.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(set(ids)) == len(ids)
    links = chromium.evaluate("[...document.links].map(a => a.getAttribute('href'))")
    assert {link.removeprefix("#") for link in links} <= set(ids)
    # Headings leave out no level, and the page says its language.
    levels = chromium.evaluate(
        "[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])"
    )
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert chromium.evaluate("document.documentElement.lang") == "en"
