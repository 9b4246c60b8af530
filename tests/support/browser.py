"""A headless Chromium over the DevTools protocol, for tests of pages."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def executable() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One page; events of the protocol are collected in `events`."""

    def __init__(self, socket: Any):
        self.socket, self.number, self.events = socket, 0, []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self.events.append(message)

    def evaluate(self, expression: str) -> Any:
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def open(self, url: str, width: int = 1440, height: int = 900, scheme: str = "light") -> None:
        """Load a page at a size, for a light or a dark screen, and wait until it is there."""
        self.events.clear()
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        feature = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media="", features=feature)
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + 30
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < deadline, f"{url} does not load"
            self.evaluate("0")
            time.sleep(0.05)
        self.evaluate("new Promise(done => setTimeout(done, 200))")

    def of(self, *methods: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event["method"] in methods]

    def complaints(self) -> list[str]:
        """What the console shows: errors, warnings, exceptions, violations of the page's policy."""
        logged = [entry["entry"]["text"] for entry in self.of("Log.entryAdded")]
        thrown = [entry["exceptionDetails"]["text"] for entry in self.of("Runtime.exceptionThrown")]
        called = [str(entry["args"]) for entry in self.of("Runtime.consoleAPICalled")]
        return logged + thrown + called

    def requests(self) -> list[str]:
        return [event["request"]["url"] for event in self.of("Network.requestWillBeSent")]

    def screenshot(self, path: Path, whole: bool = True) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def pdf(self) -> bytes:
        return base64.b64decode(self.call("Page.printToPDF", printBackground=False, preferCSSPageSize=True)["data"])

    def key(self, name: str) -> None:
        code = {"Tab": 9, "ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, "Escape": 27}[name]
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A page of a fresh browser, which is closed at the end."""
    import websocket

    program = executable()
    assert program is not None
    command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
               "--disable-extensions", "--disable-background-networking", "--remote-debugging-port=0",
               "--remote-allow-origins=*", f"--user-data-dir={profile}", "about:blank"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file, deadline = profile / "DevToolsActivePort", time.monotonic() + 60
        while not (port_file.is_file() and port_file.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, "the browser does not start"
            time.sleep(0.05)
        port = port_file.read_text().split()[0]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        targets = json.loads(opener.open(f"http://127.0.0.1:{port}/json/list", timeout=20).read())
        url = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
        socket = websocket.create_connection(url, timeout=60, http_no_proxy=["127.0.0.1"])
        yield Page(socket)
        socket.close()
    finally:
        process.terminate()
        process.wait(20)
