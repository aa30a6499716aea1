"""Headless Chromium, driven over its debugging pipe, with nothing but Python's own library.

The browser has a profile of its own that goes with it. Every request that a page makes and
everything that it complains of (console, exceptions, refused by its own policy) is kept.
"""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from harness.waiting import SLOW

PROGRAM = "chromium"
ANSWER_LIMIT_S = 30 * SLOW
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         "--remote-debugging-pipe", "--no-first-run", "--no-default-browser-check",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-extensions", "--disable-default-apps", "--mute-audio", "--hide-scrollbars",
         "--force-color-profile=srgb"]


class PageError(AssertionError):
    """The page's script failed, or the browser refused a command."""


def _high(fd):
    """The descriptor under a number that is out of the way of 3 and 4."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD, 64)
    os.close(fd)
    return moved


class Browser:
    def __init__(self):
        self.profile = Path(tempfile.mkdtemp(prefix="fdbnbd-browser-"))
        self._numbers = itertools.count(1)
        self._answers = {}
        self._buffer = b""
        self.pages = {}
        from_us, self._to = (_high(fd) for fd in os.pipe())
        self._from, to_us = (_high(fd) for fd in os.pipe())
        words = [PROGRAM, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        with open(self.profile / "log", "wb") as log:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "bash", "-c",
                 f'exec "$@" 3<&{from_us} 4>&{to_us}', "bash", *words],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(from_us, to_us),
                start_new_session=True, env=dict(os.environ, HOME=str(self.profile)))
        os.close(from_us)
        os.close(to_us)

    def close(self):
        try:
            self.call("Browser.close")
            self.process.wait(10 * SLOW)
        except (PageError, OSError, subprocess.TimeoutExpired):
            pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        os.close(self._to)
        os.close(self._from)
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method, session=None, **params):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data):]
        deadline = time.monotonic() + ANSWER_LIMIT_S
        while number not in self._answers:
            self._take(deadline - time.monotonic(), method)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise PageError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _take(self, limit_s, why):
        """Takes in what the browser says next."""
        if limit_s <= 0 or not select.select([self._from], [], [], limit_s)[0]:
            raise PageError(f"no answer to {why} within {ANSWER_LIMIT_S:g} s")
        data = os.read(self._from, 1 << 20)
        if not data:
            raise PageError("the browser ended:\n"
                            + (self.profile / "log").read_text(errors="replace")[-2000:])
        *messages, self._buffer = (self._buffer + data).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            elif message.get("sessionId") in self.pages:
                self.pages[message["sessionId"]].event(message["method"], message["params"])

    def open(self, url, *, width=1440, height=900, scheme="light", phone=False):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Page(self, target, session).begin(url, width, height, scheme, phone)


class Page:
    def __init__(self, browser, target, session):
        self.browser, self.target, self.session = browser, target, session
        self.requests, self.complaints, self.size = [], [], None
        browser.pages[session] = self

    def begin(self, url, width, height, scheme, phone):
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.resize(width, height, phone)
        self.scheme(scheme)
        self.call("Page.navigate", url=url)
        self.wait("document.readyState == 'complete'", f"{url} is loaded")
        return self

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def close(self):
        self.browser.call("Target.closeTarget", targetId=self.target)

    def event(self, method, params):
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(" ".join(str(a.get("value", a.get("description")))
                                            for a in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])

    def resize(self, width, height, phone=False):
        self.size = width, height
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=2 if phone else 1, mobile=phone)

    def scheme(self, name):
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": name}])

    def run(self, script):
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True,
                           awaitPromise=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise PageError(details.get("exception", {}).get("description") or details["text"])
        return answer["result"].get("value")

    def wait(self, script, what, limit_s=20 * SLOW):
        """Until the expression is true; gives its value."""
        deadline = time.monotonic() + limit_s
        while True:
            value = self.run(script)
            if value:
                return value
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {limit_s:g} s: {what}\n"
                                     f"the page says:\n{self.text('body')}\n{self.complaints}")
            time.sleep(0.05)

    def text(self, selector):
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def texts(self, selector):
        return self.run(f"[...document.querySelectorAll({json.dumps(selector)})]"
                        ".map(n => n.innerText)")

    def count(self, selector):
        return self.run(f"document.querySelectorAll({json.dumps(selector)}).length")

    def key(self, name):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name,
                      windowsVirtualKeyCode={"Tab": 9, "Enter": 13, "ArrowLeft": 37,
                                             "ArrowRight": 39, "ArrowDown": 40}[name],
                      text="\r" if name == "Enter" else "")

    def screenshot(self, path, whole=True):
        """What is to be seen; `whole`: the page from top to bottom."""
        size = {}
        if whole:
            content = self.call("Page.getLayoutMetrics")["cssContentSize"]
            size = {"captureBeyondViewport": True,
                    "clip": {"x": 0, "y": 0, "width": self.size[0], "height": content["height"],
                             "scale": 1}}
        data = self.call("Page.captureScreenshot", format="png", **size)["data"]
        Path(path).write_bytes(base64.b64decode(data))
