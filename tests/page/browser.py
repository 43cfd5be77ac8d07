"""Drives headless Chromium by its DevTools protocol, over the web socket that vLLM brings."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from websockets.sync.client import ClientConnection, connect

from tests.waiting import DEADLINE_S, wait_until

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
    "--disable-background-networking --disable-component-update --remote-debugging-port=0"
)


class Page:
    """A tab, and what it logged and asked for."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count()
        self.problems: list[str] = []
        """What its console and log say of errors."""
        self.hosts: set[str] = set()
        """Where its requests went."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)  # other tabs are open

    def call(self, method: str, **params: Any) -> Any:
        """Send a command and return its result."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(DEADLINE_S))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._note(message["method"], message["params"])

    def _note(self, method: str, params: Any) -> None:
        match method:
            case "Runtime.exceptionThrown":
                self.problems.append(json.dumps(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in {"error", "warning", "assert"}:
                self.problems.append(json.dumps(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in {"error", "warning"}:
                self.problems.append(f"{params['entry']['text']} {params['entry'].get('url')}")
            case "Network.requestWillBeSent":
                url = urlsplit(params["request"]["url"])
                if url.scheme != "data":
                    self.hosts.add(url.netloc)

    def open(self, url: str) -> None:
        """Go to an address."""
        self.call("Page.navigate", url=url)
        wait_until(lambda: self.js("document.readyState") == "complete", f"{url} is loaded")

    def js(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Return the value of an expression once it is true."""
        return wait_until(lambda: self.js(expression), expression)

    def type(self, selector: str, text: str, event: str = "submit") -> None:
        """Put text into an input, and send its form or tell of the change."""
        target = f"document.querySelector({json.dumps(selector)})"
        told = "form.requestSubmit()" if event == "submit" else "dispatchEvent(new Event('change'))"
        self.js(f"{target}.value = {json.dumps(text)}; {target}.{told}")

    def press(self, key: str) -> None:
        """Press a key where the focus is."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key)

    def close(self) -> None:
        """Close the tab."""
        self.call("Page.close")

    def look(self, width: int, height: int, scheme: str) -> None:
        """Be a screen of a size, light or dark."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])


@contextlib.contextmanager
def chromium(program: str, profile: Path) -> Iterator[Callable[[], Page]]:
    """Start Chromium, and give what opens a new tab."""
    with contextlib.ExitStack() as stack:
        command = [program, *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
        log = stack.enter_context((profile.parent / "chromium.log").open("w"))
        process = stack.enter_context(subprocess.Popen(command, stdout=log, stderr=log))
        stack.callback(process.terminate)
        file = profile / "DevToolsActivePort"
        told = wait_until(lambda: file.exists() and file.read_text().split(), "Chromium starts")
        address = f"http://127.0.0.1:{told[0]}/json/new?about:blank"

        def tab() -> Page:
            socket_url = httpx.put(address, timeout=DEADLINE_S).json()["webSocketDebuggerUrl"]
            # Without pings: a test that waits for something else reads no answers to them.
            socket = connect(socket_url, max_size=2**26, ping_interval=None)
            return Page(stack.enter_context(socket))

        yield tab
