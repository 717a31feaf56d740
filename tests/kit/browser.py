"""A real browser, headless, driven over a pair of pipes (the DevTools protocol), and a server for
it to visit.
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import uvicorn
from starlette.types import ASGIApp

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_ANSWERS_WITHIN = 20.0  # seconds
# The browser wants its pipes as 3 and 4, either of which may be the other one's number here.
_LAUNCH = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for wanted, pipe in zip((3, 4), pipes):
    os.dup2(pipe, wanted)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str | None:
    """The path of a browser of that family, ``None`` when there is none."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


class Browser:
    """One headless browser with one page; for the ``with`` statement.

    Attributes:
        console: What the page, or the browser about it,
            has put on the console since the last `visit`.
        requests: Address and status of everything loaded since the last `visit`; 0 = refused or
            failed.
    """

    def __init__(self, binary: str) -> None:
        self._binary = binary
        self._folder = Path(tempfile.mkdtemp(prefix="redis-asgi-browser-"))
        self._last_id = 0
        self._session: str | None = None
        self._waiting = b""
        self._answers: dict[int, dict[str, Any]] = {}
        self._loaded = False
        self.console: list[str] = []
        self.requests: list[tuple[str, int]] = []

    def __enter__(self) -> Self:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        os.set_blocking(self._in, False)
        command = [self._binary, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        command += ["--disable-dev-shm-usage", "--hide-scrollbars", f"--user-data-dir={self._folder}"]
        command += ["--remote-debugging-pipe", "about:blank"]
        launch = [sys.executable, "-c", _LAUNCH, str(theirs_in), str(theirs_out), *command]
        self._process = subprocess.Popen(
            launch, pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL, start_new_session=True
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            target = self._ask("Target.createTarget", url="about:blank")["targetId"]
            self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self._ask(f"{domain}.enable")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self._session = None
        with contextlib.suppress(OSError, TimeoutError):
            self._ask("Browser.close")
        self._end()

    def _end(self) -> None:
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._folder, ignore_errors=True)

    def resize(self, width: int, height: int) -> None:
        """Give the page that many CSS pixels."""
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer(self, scheme: str) -> None:
        """Prefer the colour scheme ``light`` or ``dark``."""
        self._ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def visit(self, url: str) -> None:
        """Load *url* and wait until it and what it asks for are there."""
        self.console, self.requests, self._loaded = [], [], False
        self._ask("Page.navigate", url=url)
        self._until(lambda: self._loaded, f"{url} loads")

    def run(self, script: str) -> Any:
        """The value of an expression, evaluated in the page whatever its policy says of scripts."""
        return self._ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def screenshot(self, path: str | Path) -> None:
        """The whole page as a PNG."""
        picture = self._ask("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        Path(path).write_bytes(base64.b64decode(picture))

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._last_id += 1
        number = self._last_id
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        self._until(lambda: number in self._answers, method)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _until(self, truth: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _ANSWERS_WITHIN
        while not truth():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise TimeoutError(f"{what}: not within {_ANSWERS_WITHIN} s, or the browser has ended")
            self._read()
            time.sleep(0.002)

    def _read(self) -> None:
        """Keep what has arrived: answers by their number, and what events say."""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._in, 1 << 20):
                self._waiting += chunk
        *whole, self._waiting = self._waiting.split(b"\0")
        for message in map(json.loads, whole):
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self._note(message["method"], message.get("params", {}))

    def _note(self, event: str, about: dict[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Log.entryAdded":
            self.console.append(about["entry"]["text"])
        elif event in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.console.append(json.dumps(about))
        elif event == "Network.responseReceived":
            self.requests.append((about["response"]["url"], about["response"]["status"]))
        elif event == "Network.loadingFailed" and not about.get("canceled"):
            self.requests.append((about.get("errorText", ""), 0))


@contextlib.contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """*app* behind a real server in a thread of this process; gives its address."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", ws="none", lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + _ANSWERS_WITHIN
        while not server.started:
            if time.monotonic() > deadline or not thread.is_alive():
                raise TimeoutError("the server did not start")
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(_ANSWERS_WITHIN)
