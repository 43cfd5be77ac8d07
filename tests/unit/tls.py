"""An authority of our own, and a server on this machine whose certificate it signed."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import orjson
import pytest
from client_fakes import INFO

_CONFIG = """
[req]
distinguished_name = name
[name]
[ca]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = DNS:localhost, IP:127.0.0.1, IP:::1
"""
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class Authority:
    """An authority made for a test: two days valid, its key in the test's own directory."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("the program openssl is not installed")
        self._folder = folder
        self.file, self.server_file = folder / "ca.pem", folder / "server.pem"
        self.key, self.server_key = folder / "ca.key", folder / "server.key"
        (folder / "openssl.cnf").write_text(_CONFIG)
        self._make("ca", self.file, self.key)
        signed = ("-CA", self.file, "-CAkey", self.key)
        self._make("server", self.server_file, self.server_key, *signed)

    def directory(self) -> Path:
        """Make a directory of authorities, each under the name that OpenSSL looks for."""
        directory = self._folder / "authorities"
        directory.mkdir()
        made = self._openssl("x509", "-hash", "-noout", "-in", self.file)
        shutil.copy(self.file, directory / f"{made.strip()}.0")
        return directory

    def _make(self, what: str, file: Path, key: Path, *more: object) -> None:
        self._openssl(
            "req", "-x509", "-days", "2", "-subj", f"/CN=moescope test {what}", *_NEW_KEY,
            "-config", self._folder / "openssl.cnf", "-extensions", what,
            "-keyout", key, "-out", file, *more,
        )  # fmt: skip

    def _openssl(self, *argv: object) -> str:
        command = ["openssl", *map(str, argv)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, family: socket.AddressFamily, host: str, context: ssl.SSLContext) -> None:
        self.address_family = family
        self.context, self.asked = context, 0
        super().__init__((host, 0), _Handler)

    def finish_request(self, request, client_address):  # in the connection's thread
        self.asked += 1
        with (
            contextlib.suppress(OSError),  # clients that do not trust it
            self.context.wrap_socket(request, server_side=True) as secured,
        ):
            super().finish_request(secured, client_address)


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        body = orjson.dumps(INFO)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()


@contextlib.contextmanager
def serving(authority: Authority, host: str) -> Iterator[_Server]:
    """A server that answers every request with `INFO`; ``asked`` counts connections."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.server_file, authority.server_key)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with _Server(family, host, context) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
