"""A headless Chromium for tests of pages, driven over its own pipe, without further packages."""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

HIGH = 10  # first file number that is surely free
# Chromium reads commands from file 3 and answers in file 4.
START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"
)
FIGURES = """[...document.querySelectorAll("[data-figure]")].map(
  e => [e.dataset.domain, e.dataset.task, e.dataset.figure, e.dataset.value, e.textContent])"""


class Browser:
    """One page at a time."""

    def __init__(self, profile: Path) -> None:
        theirs_in, self.out = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, HIGH) for end in _pipe())
        self.into, theirs_out = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, HIGH) for end in _pipe())
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
        ]
        command = ["chromium", *options, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(theirs_in), str(theirs_out), *command],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.number, self.rest, self.session = 0, b"", ""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.send("Page.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command of the DevTools protocol."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.out, json.dumps(command).encode() + b"\0")
        while (answer := self._read()).get("id") != self.number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self, seconds: float = 60) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.into], [], [], max(0, end - time.monotonic()))
            assert ready, "chromium says nothing"
            new = os.read(self.into, 1 << 20)
            assert new, "chromium is gone"
            self.rest += new
        first, _, self.rest = self.rest.partition(b"\0")
        return json.loads(first)

    def evaluate(self, script: str) -> Any:
        """The value of a script in the page."""
        return self.send("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def open(self, page: Path, width: int, scheme: str = "light") -> None:
        """Open a page that is `width` pixels wide."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("Page.navigate", url=page.as_uri())
        end = time.monotonic() + 60
        while self.evaluate("document.readyState + location.protocol") != "completefile:":
            assert time.monotonic() < end, "the page does not load"
            time.sleep(0.05)

    def figures(self) -> dict[tuple[str, str, str], tuple[str, str]]:
        """Exact value and text of each figure of the page."""
        found = self.evaluate(FIGURES)
        assert len({tuple(one[:3]) for one in found}) == len(found), "a figure comes twice"
        return {tuple(one[:3]): tuple(one[3:]) for one in found}

    def width(self) -> tuple[int, int]:
        """Of the window and of what is in it."""
        return tuple(self.evaluate("[innerWidth, document.documentElement.scrollWidth]"))

    def shoot(self, path: Path) -> PIL.Image.Image:
        """A picture of the whole page."""
        self.evaluate("document.querySelectorAll('img').forEach(e => e.loading = 'eager')")
        self.evaluate("document.querySelector('.banner').style.position = 'static'")
        end = time.monotonic() + 60
        while not self.evaluate("[...document.images].every(e => e.complete && e.naturalWidth > 0)"):
            assert time.monotonic() < end, "a picture does not load"
            time.sleep(0.05)
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(shot))
        return PIL.Image.open(io.BytesIO(path.read_bytes())).convert("RGB")

    def close(self) -> None:
        """End Chromium."""
        os.close(self.out)
        self.process.terminate()
        self.process.wait(30)
        os.close(self.into)


def _pipe() -> Iterator[int]:
    """Both ends, closed when the next one is asked for."""
    for end in os.pipe():
        yield end
        os.close(end)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if shutil.which("chromium") is None:
        pytest.skip("no chromium")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()
