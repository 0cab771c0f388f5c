"""A headless Chromium that a test drives by its own debugging protocol: no driver, no package beyond the extra's."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.request
from contextlib import ExitStack

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One window.

    Args:
        profile: a new folder for the browser's files.
        width: of the window in CSS pixels, also below the least width of a desktop's window.
        height: of the window.
    """

    def __init__(self, profile, width=1400, height=900):
        from websockets.sync.client import connect

        arguments = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        with ExitStack() as stack:
            process = stack.enter_context(subprocess.Popen([CHROMIUM, *arguments], stderr=subprocess.PIPE, text=True))
            stack.callback(process.terminate)
            port = next(found[1] for line in process.stderr if (found := re.search(r"ws://127.0.0.1:(\d+)/", line)))
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as listed:
                (page,) = [one for one in json.load(listed) if one["type"] == "page"]
            self.socket = stack.enter_context(connect(page["webSocketDebuggerUrl"], max_size=None))
            self._opened = stack.pop_all()
        self.count = 0
        self.requests, self.dialogs = [], []
        """addresses that the page has asked for, and texts of dialogs that a script has opened"""
        for domain in ("Page", "Network", "Runtime"):
            self.send(f"{domain}.enable")
        self.resize(width, height)

    def resize(self, width, height, scale=1):
        """Sets the size of the window."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def send(self, method, **params):
        """Sends one command and returns its result; events that come first are noted."""
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            if message.get("id") == self.count:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message):
        params = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        if message.get("method") == "Network.webSocketCreated":
            self.requests.append(params["url"])
        if message.get("method") == "Page.javascriptDialogOpening":
            self.dialogs.append(params["message"])
            self.count += 1
            self.socket.send(
                json.dumps({"id": self.count, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}})
            )

    def value(self, script):
        """The value of a JavaScript expression."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, address):
        """Goes to an address."""
        self.send("Page.navigate", url=address)

    def wait(self, script, seconds=60):
        """Waits until a JavaScript expression is true, and returns its value."""
        end = time.monotonic() + seconds
        while not (value := self.value(script)):
            assert time.monotonic() < end, f"{script} did not come true; the page shows: {self.text()}"
            time.sleep(0.1)
        return value

    def wait_for(self, text, seconds=60):
        """Waits until the page shows a text."""
        self.wait(f"document.body?.innerText.includes({json.dumps(text)})", seconds)

    def text(self):
        """The text that the page shows."""
        return self.value("document.body?.innerText")

    def click(self, text, tag="button"):
        """Clicks the first element of a kind that has this text."""
        find = f"[...document.querySelectorAll({json.dumps(tag)})].find(e => e.innerText.trim() === {json.dumps(text)})"
        self.wait(f"!!{find}")
        self.value(f"{find}.click()")

    def type(self, label, text):
        """Types into the field with a label."""
        self.wait(f"!!document.querySelector('[aria-label={json.dumps(label)}]')")
        self.value(f"document.querySelector('[aria-label={json.dumps(label)}]').focus()")
        self.send("Input.insertText", text=text)

    def overflow(self):
        """Number of pixels by which the page is wider than its window, the window of each part included."""
        return self.value(
            "Math.max(0, ...[document.documentElement, ...document.querySelectorAll('.stMain, .scroll, .stHtml')]"
            ".map(e => e.scrollWidth - e.clientWidth))"
        )

    def screenshot(self, path):
        """Saves what the window shows as a PNG file."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        """Ends the browser."""
        self._opened.close()
