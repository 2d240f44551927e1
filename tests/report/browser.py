"""Chromium without a window, driven over its own pipe (Chrome DevTools Protocol): nothing but the browser is needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BINARY = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
PATIENCE = 60.0  # seconds for one answer, on a busy machine


class Browser:
    """One page of a browser. `complaints` are errors, warnings and requests of the page so far."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._read, self._number = commands, answers, b"", 0
        self._session: str | None = None
        self.complaints: list[str] = []
        self._loaded = 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return its result."""
        self._number += 1
        number, message = self._number, {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def open(self, path: Path, width: int, height: int, dark: bool) -> None:
        """Open a file at a size in CSS pixels, in the light or the dark scheme, and wait until it is drawn."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        loaded = self._loaded
        self.call("Page.navigate", url=path.resolve().as_uri())
        while self._loaded == loaded:
            self._event(self._message())
        self.settle()

    def settle(self) -> None:
        """Wait for two frames: what was asked for is drawn then."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 30))))")

    def run(self, script: str) -> Any:
        """Return the value of an expression, awaited."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def pointer(self, kind: str, x: float, y: float, held: bool = False) -> None:
        """Send a mouse event: "mouseMoved", "mousePressed" or "mouseReleased"."""
        self.call(
            "Input.dispatchMouseEvent",
            type=kind,
            x=x,
            y=y,
            button="left" if held or kind != "mouseMoved" else "none",
            buttons=int(held),
            clickCount=int(kind != "mouseMoved"),
        )

    def key(self, key: str) -> None:
        """Press a key on what has the focus."""
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def picture(self, path: Path, whole: bool = True) -> Path:
        """Write a PNG of the page, all of it or what is on the screen."""
        made = self.call(
            "Page.captureScreenshot",
            format="png",
            captureBeyondViewport=whole,
            **({"clip": self._whole()} if whole else {}),
        )
        path.write_bytes(base64.b64decode(made["data"]))
        return path

    def _whole(self) -> dict[str, float]:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}

    def _message(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._read:
            assert select.select([self._answers], [], [], max(0.0, until - time.monotonic()))[0], (
                "the browser is silent"
            )
            found = os.read(self._answers, 1 << 20)
            assert found, "the browser has gone away"
            self._read += found
        text, self._read = self._read.split(b"\0", 1)
        message = json.loads(text)
        self._event(message)
        return message

    def _event(self, message: dict[str, Any]) -> None:
        found, kind = message.pop("params", {}), message.pop("method", None)
        if kind == "Page.loadEventFired":
            self._loaded += 1
        elif kind == "Runtime.exceptionThrown":
            details = found["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif kind == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning", "assert"):
            self.complaints.append(f"console.{found['type']}: {found['args']}")
        elif kind == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
            self.complaints.append(found["entry"]["text"])
        elif kind == "Network.requestWillBeSent" and not found["request"]["url"].startswith(
            ("file:", "data:", "about:")
        ):
            self.complaints.append(f"fetches {found['request']['url']}")


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Run a browser with a profile folder of its own; a context."""
    assert BINARY is not None
    to_read, commands = os.pipe()
    answers, to_write = os.pipe()

    def wire() -> None:  # the browser reads commands from 3 and writes answers to 4
        read, write = os.dup(to_read), os.dup(to_write)
        os.dup2(read, 3)
        os.dup2(write, 4)

    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--remote-debugging-pipe",
        f"--user-data-dir={profile}",
    ]
    process = subprocess.Popen(
        [BINARY, *flags],
        preexec_fn=wire,
        pass_fds=(3, 4, to_read, to_write),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(to_write)
    try:
        yield Browser(commands, answers)
    finally:
        os.close(commands)
        process.terminate()
        process.wait(20)
        os.close(answers)
