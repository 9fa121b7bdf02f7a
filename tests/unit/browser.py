"""A headless chromium for tests of web pages, driven over its DevTools protocol.

Needs Debian's package `chromium` and the Python package `websockets`, which nicegui brings along.
"""

import base64
import json
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 30.0


class Page:
    """One page of the browser; `requests` has every address that it asked for."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._number = socket, 0
        self.requests: list[str] = []
        self.errors: list[str] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=SECONDS))
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            elif message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(message["params"]["exceptionDetails"]["text"])
            elif message.get("id") == self._number:
                assert "error" not in message, (method, message["error"])
                return message["result"]

    def value(self, script: str) -> Any:
        """Return what a JavaScript expression gives."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, (script, result["exceptionDetails"])
        return result["result"].get("value")

    def wait_for(self, script: str, accept: Callable[[Any], bool] = bool) -> Any:
        """Evaluate until the value is accepted, and return it."""
        deadline = time.monotonic() + SECONDS
        while not accept(value := self.value(script)):
            assert time.monotonic() < deadline, f"{script} is still {value!r}"
            time.sleep(0.05)
        return value

    def type(self, selector: str, text: str) -> None:
        """Put the cursor into a field, empty it, type a text and press Enter."""
        self.value(f"(e => {{e.focus(); e.select()}})(document.querySelector({selector!r}))")
        self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                **{"type": kind, "key": "Enter", "code": "Enter", "text": "\r"},
                windowsVirtualKeyCode=13,
            )

    def choose_file(self, selector: str, file: Path) -> None:
        """Give a file to an upload, as if a person had chosen it."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def screenshot(self, file: Path) -> None:
        picture = self.call("Page.captureScreenshot", format="png")["data"]
        file.write_bytes(base64.b64decode(picture))


@contextmanager
def open_page(
    address: str, *, chromium: str, profile: Path, size: tuple[int, int]
) -> Iterator[Page]:
    """Yield a page that shows an address; the browser ends with the block."""
    from websockets.sync.client import connect

    browser = subprocess.Popen(
        [
            *(chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-dev-shm-usage", "--remote-debugging-port=0", "--disable-extensions"),
            *(f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}", "about:blank"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        target = _first_target(browser, profile / "DevToolsActivePort")
        with connect(target, max_size=None) as socket:
            page = Page(socket)
            for domain in ("Page", "Network", "Runtime", "DOM"):
                page.call(f"{domain}.enable")
            page.call("Page.navigate", url=address)
            yield page
    finally:
        browser.terminate()
        browser.wait(timeout=SECONDS)


def _first_target(browser: subprocess.Popen[bytes], port_file: Path) -> str:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        assert browser.poll() is None, f"chromium ended with code {browser.returncode}"
        if port_file.exists() and (lines := port_file.read_text().split()):
            with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json/list") as answer:
                for target in json.load(answer):
                    if target["type"] == "page":
                        return target["webSocketDebuggerUrl"]
        time.sleep(0.05)
    raise AssertionError("chromium opened no page")
