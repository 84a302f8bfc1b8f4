"""Takes pictures of a report in headless Chromium: desktop and phone, light and dark, and its first page in print.

    bpt-rl demo --out runs/demo && python benchmarks/report_pictures.py runs/demo/report.html --out docs/pictures

Needs Chromium or Chrome (Debian: apt-get install chromium) and Pillow. Speaks to it through its own debugging pipe.
"""

import argparse
import base64
import io
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
PICTURES = {"desktop": (1280, 1500), "phone": (390, 1500)}
"""Width and height, in pixels of a style sheet."""
_PLACE_PIPES = """
import os, sys
ends = [os.dup(int(end)) for end in sys.argv[1:3]]
spare = [os.dup2(end, number) for end, number in zip(ends, (60, 61))]
os.dup2(spare[0], 3), os.dup2(spare[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""The browser reads from its file descriptor 3 and writes to 4."""


def find_chromium() -> str | None:
    """Returns the browser's path, or None where there is none."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


class Chromium:
    """A headless browser with one tab, to be used in a `with` statement; keeps every event that the tab reports."""

    def __init__(self, program: str):
        self.events: list[dict[str, Any]] = []
        self._numbers = itertools.count(1)
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        read_here, write_there = os.pipe()
        read_there, write_here = os.pipe()
        arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
        ]
        arguments += ["--remote-debugging-pipe", "--no-first-run", f"--user-data-dir={self._folder.name}"]
        # Of its own accord the browser asks its maker for updates and components.
        arguments += [
            "--disable-background-networking",
            "--disable-component-update",
            "--no-default-browser-check",
        ]

        self._process = subprocess.Popen(
            [
                sys.executable,
                "-ISc",
                _PLACE_PIPES,
                str(read_there),
                str(write_there),
                program,
                *arguments,
                "about:blank",
            ],
            pass_fds=(read_there, write_there),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_there)
        os.close(write_there)
        self._read, self._write = read_here, write_here
        self._unread = b""
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(self, *_: object) -> None:
        self._session = ""
        try:
            self.call("Browser.close")
            self._process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        os.close(self._write)
        self._folder.cleanup()

    def requests(self) -> list[str]:
        """Returns what the tab asked for since the last `open`, as the browser itself reports it."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[Any]:
        """Returns errors on the console, in the log or thrown by the script since the last `open`."""
        found = []
        for event in self.events:
            kind, values = event.get("method"), event.get("params", {})
            if kind == "Runtime.exceptionThrown" or (
                kind == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert")
            ):
                found.append(values)
            if kind == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
                found.append(values["entry"]["text"])
        return found

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Returns what a method of the DevTools protocol answers."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next(30.0)
            if found.get("id") == number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return dict(found["result"])
            self.events.append(found)

    def _next(self, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self._unread:
            if not select.select([self._read], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(
                    f"The browser must answer within {seconds} s; it did not. Start it by hand."
                )
            found = os.read(self._read, 1 << 20)
            if not found:
                raise OSError("The browser must stay alive; it ended. Start it by hand to see why.")
            self._unread += found
        line, _, self._unread = self._unread.partition(b"\0")
        return dict(json.loads(line))

    def open(self, url: str, *, width: int, height: int, dark: bool = False) -> None:
        """Opens a page as a screen of that size and theme shows it, and waits until it is there; forgets old events."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        end = time.monotonic() + 30
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next(end - time.monotonic()))

    def run(self, script: str) -> Any:
        """Returns the value of an expression of JavaScript."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def click(self, selector: str) -> None:
        """Clicks in the middle of an element, as a mouse does."""
        box = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Presses and releases a key, `Tab` or `Enter`."""
        values = {"key": key, "code": key, "windowsVirtualKeyCode": {"Tab": 9, "Enter": 13}[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **values, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **values)

    def picture(self, *, whole: bool = False) -> bytes:
        """Returns a PNG of what the screen shows, or of the whole page."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(found["data"])


def save_small(png: bytes, path: Path) -> None:
    """Writes a picture with 256 colours, a part of the bytes."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        small = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        small.save(path, optimize=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the pictures; returns 1 where there is no browser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    parser.add_argument("--section", default="", help="heading that each picture begins with")
    options = parser.parse_args(arguments)
    program = find_chromium()
    if program is None:
        print(f"no browser: none of {', '.join(PROGRAMS)} is installed", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    for (device, (width, height)), theme in itertools.product(PICTURES.items(), ("light", "dark")):
        with Chromium(program) as browser:
            browser.open(options.page.resolve().as_uri(), width=width, height=height, dark=theme == "dark")
            heading = json.dumps(options.section)
            browser.run(
                f"[...document.querySelectorAll('h2')].find((h) => h.textContent === {heading})?.scrollIntoView()"
            )
            suffix = (
                f"_{options.section.split(',')[0].lower().replace(':', '').replace(' ', '_')}"
                if options.section
                else ""
            )
            path = options.out / f"report{suffix}_{device}_{theme}.png"
            save_small(browser.picture(), path)
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
