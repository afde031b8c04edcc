"""Headless Chromium, controlled by the DevTools protocol over a pipe: no driver and no port are needed.

with Browser(tmp_path) as browser:
    page = browser.open(path, width=390)
    page.evaluate("document.title")
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_TIMEOUT = 60
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    """One process, one tab after the other.

    Args:
        profile: a folder for what the browser keeps.
    """

    def __init__(self, profile: Path):
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()

        def as_three_and_four():
            # what chromium reads is 3, what it writes 4; a number may be in the other's place, and os.dup could choose it
            read, write = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_read, to_write))
            os.dup2(read, 3)
            os.dup2(write, 4)

        self._process = subprocess.Popen(
            [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=as_three_and_four,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._numbers = itertools.count(1)
        self._rest = b""
        self._events: list[dict] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._read)
        os.close(self._write)

    def open(self, path: Path, *, width: int, dark: bool = False, height: int = 900) -> Page:
        """The page, loaded, with everything it had to complain about."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        phone = width < 500
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[theme])
        self._events.clear()
        page.call("Page.navigate", url=path.resolve().as_uri())
        page.wait_for("Page.loadEventFired")
        # what is logged after loading
        page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        page.complaints = [event for event in map(_complaint, page.events()) if event]
        page.requests = [
            event["params"]["request"]["url"]
            for event in page.events()
            if event["method"] == "Network.requestWillBeSent"
        ]
        return page

    def call(self, method: str, session: str | None = None, **params):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.next_message()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self._events.append(answer)

    def next_message(self) -> dict:
        until = time.monotonic() + _TIMEOUT
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], until - time.monotonic())
            assert ready, "chromium does not answer"
            part = os.read(self._read, 1 << 20)
            assert part, f"chromium ended with {self._process.poll()}"
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)


class Page:
    """A tab. `complaints` are console messages of warnings and errors, exceptions, and failed requests."""

    complaints: list[str]
    requests: list[str]

    def __init__(self, browser: Browser, session: str):
        self._browser, self._session = browser, session

    def call(self, method: str, **params):
        return self._browser.call(method, self._session, **params)

    def events(self) -> list[dict]:
        return [event for event in self._browser._events if event.get("sessionId") == self._session]

    def wait_for(self, name: str) -> None:
        while not any(event["method"] == name for event in self.events()):
            self._browser._events.append(self._browser.next_message())

    def evaluate(self, expression: str):
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path: Path, *, most: int = 20_000) -> None:
        """The whole page, as far down as `most` pixels."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], most), "scale": 1}
        image = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(image["data"]))


def _complaint(event: dict) -> str | None:
    params = event["params"]
    if event["method"] == "Runtime.exceptionThrown":
        return str(params["exceptionDetails"]["text"])
    if event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
        return str(params["args"])
    if event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
        return params["entry"]["text"]
    if event["method"] == "Network.loadingFailed":
        return params["errorText"]
    return None
