"""A proxy of a server that plants one fault in its routes, which `moescope verify` must see.

``python -m benchmarks.fidelity.planted --url http://127.0.0.1:8000 --fault wrong_expert -- moescope
verify --model DIRECTORY`` runs the command with ``--url`` of the proxy, and exits as it does.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import numpy as np

from moescope import formats

Arrays = dict[str, Any]
"""Of an ``.npz`` of traces: `moescope.formats`."""

_TIMEOUT_S = 600.0


def _wrong_expert(arrays: Arrays) -> None:
    """One expert of one row and layer is the first that was not selected."""
    ids = _middle(arrays["topk_ids"])
    ids[0] = min(set(range(len(ids) + 1)) - set(ids.tolist()))


def _swapped_weights(arrays: Arrays) -> None:
    """The largest and the smallest weight of one row and layer have changed places."""
    weights = _middle(arrays["topk_weights"])
    both = [weights.argmin(), weights.argmax()]
    weights[both] = weights[both[::-1]]


def _shifted_rows(arrays: Arrays) -> None:
    """Each row of the trace is that of the token before."""
    for name in ("topk_ids", "topk_weights"):
        arrays[name] = np.roll(arrays[name], 1, axis=0)


FAULTS: dict[str, Callable[[Arrays], None]] = {
    "wrong_expert": _wrong_expert,
    "swapped_weights": _swapped_weights,
    "shifted_rows": _shifted_rows,
}
"""Each changes the first trace that is fetched."""


def _middle(values: Any) -> Any:
    """Return the row in the middle of ``[num_rows, num_layers, top_k]``, in the layer there."""
    return values[len(values) // 2, values.shape[1] // 2]


@contextlib.contextmanager
def planted(url: str, fault: str) -> Iterator[str]:
    """Return the address of a proxy, on this machine, of a server with a fault.

    Args:
        url: The server's address.
        fault: One of `FAULTS`.
    """
    with (
        httpx.Client(base_url=url, timeout=_TIMEOUT_S, trust_env=False) as client,
        ThreadingHTTPServer(("127.0.0.1", 0), _handler(client, FAULTS[fault])) as proxy,
    ):
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{proxy.server_port}"
        finally:
            proxy.shutdown()
            thread.join()


def _handler(client: httpx.Client, plant: Callable[[Arrays], None]) -> type[BaseHTTPRequestHandler]:
    first = threading.Lock()  # held by the trace that the fault was planted in, and never let go

    class Handler(BaseHTTPRequestHandler):
        def _forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            kept = {k: v for k, v in self.headers.items() if k.lower() != "host"}
            response = client.request(self.command, self.path, headers=kept, content=body)
            content = response.content
            if self.path.startswith("/routes/") and "format=npz" in self.path:
                content = self._changed(content)
            self.send_response(response.status_code)
            self.send_header("Content-Type", response.headers.get("Content-Type", ""))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _forward  # noqa: N815, the names of http.server

        def _changed(self, content: bytes) -> bytes:
            if not first.acquire(blocking=False):
                return content
            arrays = {name: array.copy() for name, array in formats.read_npz(content).items()}
            plant(arrays)
            buffer = io.BytesIO()
            np.savez(buffer, allow_pickle=False, **arrays)
            return buffer.getvalue()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    return Handler


def main() -> int:
    """Run a command against the proxy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="The server's address.")
    parser.add_argument("--fault", choices=FAULTS, required=True)
    parser.add_argument("command", nargs="+", help="After --: the command.")
    args = parser.parse_args()
    with planted(args.url, args.fault) as url:
        return subprocess.run([*args.command, "--url", url], check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
