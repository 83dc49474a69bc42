"""A headless Chromium, driven over its debugging pipe (file descriptors 3 and 4, JSON ended by NUL)."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium")


class Browser:
    """One tab. Every call raises AssertionError with what the browser said where it refuses."""

    def __init__(self, out: int, back: int) -> None:
        self._out, self._back = out, back
        self._numbers = itertools.count(1)
        self._pending = b""
        self._session: str | None = None
        self.errors: list[str] = []
        """Console messages, exceptions, and requests that were refused."""
        self._watched: dict[str, list[Any]] = {}
        tab = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def open(self, path: Path, *, width: int, height: int, scheme: str) -> None:
        """Load a file, in a window of `width` by `height` CSS pixels, with `scheme` light or dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=True)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=path.resolve().as_uri())
        while self._read().get("method") != "Page.loadEventFired":
            pass

    @contextlib.contextmanager
    def watching(self, event: str) -> Iterator[list[Any]]:
        """Gives the parameters of each `event` of the block; its domain is enabled for that."""
        domain = event.partition(".")[0]
        found: list[Any] = []
        self.call(f"{domain}.enable")
        self._watched[event] = found
        yield found
        del self._watched[event]
        self.call(f"{domain}.disable")

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """One key, down and up."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            given = {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code, **text}
            self.call("Input.dispatchKeyEvent", **given)

    def _read(self) -> Mapping[str, Any]:
        while b"\0" not in self._pending:
            more = os.read(self._back, 1 << 16)
            assert more, "chromium ended"
            self._pending += more
        first, _, self._pending = self._pending.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        if message.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.errors.append(json.dumps(message["params"]))
        if message.get("method") in self._watched:
            self._watched[message["method"]].append(message["params"])
        return message


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with a new profile in `profile`, ended with the block."""
    assert PROGRAM, "chromium is not installed: apt-get install chromium"
    to_browser, out = os.pipe()
    back, from_browser = os.pipe()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]

    def pipes_in_place() -> None:
        """In the child: above 4 first, as one of them may be 3 or 4 itself."""
        for wanted, high in ((3, os.dup2(to_browser, 103)), (4, os.dup2(from_browser, 104))):
            os.dup2(high, wanted)

    process = subprocess.Popen(
        [PROGRAM, *flags],
        close_fds=False,
        preexec_fn=pipes_in_place,  # noqa: PLW1509  # the tests have one thread
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Browser(out, back)
    finally:
        os.close(out)
        os.close(back)
        process.terminate()
        process.wait(timeout=30)
