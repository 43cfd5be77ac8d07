"""The files of the page: who gets them, with which headers, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

import moescope_service
from moescope_service.api import page

from .deployment import Deployment

FILES = {file.name: file for file in (Path(moescope_service.__file__).parent / "page").iterdir()}
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}


@pytest.fixture(scope="module")
def locked():
    with Deployment(api_key=["secret"]).running() as running:
        yield running


def test_every_file_with_its_headers_and_without_a_key(locked):
    kinds = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
    for name, file in FILES.items():
        path = "/moescope" if name == "index.html" else f"/moescope/page/{name}"
        answer = locked.http.get(path)
        assert (answer.status_code, answer.content) == (200, file.read_bytes()), name
        assert answer.headers["content-type"] == f"{kinds[file.suffix]}; charset=utf-8"
        rules = [rule.split(" ", 1) for rule in answer.headers[CSP].split("; ")]
        assert dict(rules) == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        head = locked.http.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(file.stat().st_size)
        assert head.headers[CSP] == answer.headers[CSP]


CSP = "content-security-policy"


def test_a_link_on_another_site_leads_to_the_page_and_not_to_what_it_shows(locked):
    site = {"Sec-Fetch-Site": "cross-site", "Host": "moe.example.org"}
    assert locked.http.get("/moescope", headers=site).status_code == 200
    key = {"Authorization": "Bearer secret"}
    assert locked.http.get("/moescope/info", headers=key | site).status_code == 403


def test_the_endpoint_under_it_wants_a_key(locked):
    assert locked.http.get("/moescope/info").status_code == 401


@pytest.mark.parametrize(
    "name",
    ["nothing.js", "", "../plugin.py", "..%2f..%2fplugin.py", "%2e%2e/__init__.py",
     "..%5cplugin.py", "page.py", "app.js%00", "/etc/passwd", "%2fetc%2fpasswd"],
)  # fmt: skip
def test_no_other_file(locked, name):
    url = httpx.URL(locked.url).copy_with(raw_path=f"/moescope/page/{name}".encode())
    assert locked.http.get(url).status_code == 404


def test_only_what_is_read(locked):
    for method in ("POST", "PUT", "DELETE"):
        assert locked.http.request(method, "/moescope").status_code == 405


def test_the_files_name_no_other_host_and_hold_no_markup_for_text():
    for name, file in FILES.items():
        text = file.read_text()
        assert not re.search(r"https?:", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
        assert not re.search(r"localStorage|sessionStorage|document\.cookie|indexedDB", text), name


def test_every_import_is_one_of_the_files():
    assert set(page._FILES) == set(FILES)
    for name, file in FILES.items():
        for other in re.findall(r'from "\./([\w.]+)"', file.read_text()):
            assert other in FILES, name
