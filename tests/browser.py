"""Headless Chromium by its own protocol over two pipes: what a page does, and how it looks."""

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from typing import Any

CHROMIUM = which("chromium")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
WRONG = ("Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening")


class Tab:
    """One page of a browser. Collects what it asked for and what went wrong in it."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive = send, receive
        self._rest, self._number, self._session = b"", 0, ""
        self.asked: list[str] = []
        self.wrong: list[str] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to one command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                assert "error" not in found, found
                return found["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            read = os.read(self._receive, 1 << 20)
            assert read, "the browser has ended"
            self._rest += read
        line, self._rest = self._rest.split(b"\0", 1)
        found = json.loads(line)
        method = found.get("method")
        if method == "Network.requestWillBeSent":
            self.asked.append(found["params"]["request"]["url"])
        error = method == "Runtime.consoleAPICalled" and found["params"]["type"] == "error"
        if method in WRONG or error:
            self.wrong.append(json.dumps(found["params"]))
        return found

    def open(self, page: Path, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a file, as wide as a device is; returns when all is drawn."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self("Emulation.setDeviceMetricsOverride", **size, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self("Page.navigate", url=page.resolve().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            continue
        self.value("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")

    def value(self, expression: str) -> Any:
        """Of an expression in the page; a promise is waited for."""
        asked = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        return self("Runtime.evaluate", **asked)["result"].get("value")

    def picture(self, path: Path) -> None:
        """All of the page as a PNG file."""
        found = self("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(found["data"]))

    def printed(self, path: Path) -> None:
        """The page as it would be printed, as a PDF file."""
        found = self("Page.printToPDF", printBackground=True, preferCSSPageSize=True)
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Tab]:
    """A tab of a fresh Chromium, whose profile lies in `folder`."""
    assert CHROMIUM
    theirs, send = os.pipe()
    receive, answers = os.pipe()

    def pipes() -> None:  # the protocol reads from 3 and writes to 4
        for given, place in ((theirs, 13), (answers, 14), (13, 3), (14, 4)):
            os.dup2(given, place)

    command = [CHROMIUM, *QUIET, f"--user-data-dir={folder}"]
    null = subprocess.DEVNULL
    process = subprocess.Popen(
        command, stdin=null, stdout=null, stderr=null, preexec_fn=pipes, close_fds=False
    )
    os.close(theirs)
    os.close(answers)
    try:
        yield Tab(send, receive)
    finally:
        process.terminate()
        process.wait(30)
        os.close(send)
        os.close(receive)
