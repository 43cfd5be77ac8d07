"""Texts of settings and query parameters: what is taken, and what is said of what is not."""

from __future__ import annotations

import pytest

from moescope.layers import parse_layers
from moescope_service.parsers import parse_host_port, parse_size, parse_size_or_zero, shown


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("1000", 1000), ("1k", 1000), ("1KiB", 1024), ("512MB", 512 * 10**6),
     ("1GiB", 2**30), (" 1.5 gib ", 3 * 2**29), ("2g", 2 * 10**9), ("7b", 7)],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "0GiB", "-1", "GiB", "1 TiB", "one", "1e9", "0.1"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match=r"^expected bytes, or a size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["99999999999GiB", "9" * 400, "9" * 400 + "GiB", str(2**63)])
def test_sizes_are_bounded(text):
    with pytest.raises(ValueError, match=r"^expected at most 4,611,686,018,427,387,904 bytes$"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0", (0,)),
        ("0,5-7", (0, 5, 6, 7)),
        (" 3 - 4 , 1", (3, 4, 1)),
        ("2,2,1-3", (2, 1, 3)),
        ("5-5", (5,)),
    ],
)
def test_layers(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", ",", "a", "1,", "3-1", "-1", "1-", "1--2", "1.5", "10000"])
def test_what_is_no_list_of_layers(text):
    with pytest.raises(ValueError, match=r"^expected layer numbers and ranges"):
        parse_layers(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0-9999,0", "expected at most 10,000 layers"),
        (",".join(["0-9998"] * 140), "expected at most 10,000 layers"),
        (",".join(map(str, range(400))), "expected at most 1000 characters, got 1489"),
    ],
)
def test_what_a_list_of_layers_costs_is_bounded(text, words):
    with pytest.raises(ValueError, match=words) as caught:
        parse_layers(text)
    assert len(str(caught.value)) < 1200


def test_every_layer_by_its_number():
    assert parse_layers(",".join(map(str, range(200)))) == tuple(range(200))
    assert len(parse_layers("0-9999")) == 10_000


@pytest.mark.parametrize(
    ("text", "quoted"),
    [("", "''"), ("a'b", '"a\'b"'), ("x" * 80, repr("x" * 80)), ("x" * 81, "'" + "x" * 79 + "…'")],
)
def test_long_texts_are_quoted_in_part(text, quoted):
    assert shown(text) == quoted


def test_nothing_may_be_a_size():
    assert (parse_size_or_zero(" 0 "), parse_size_or_zero("1KiB")) == (0, 1024)
    with pytest.raises(ValueError, match="expected bytes"):
        parse_size_or_zero("off")


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("10.0.0.1:5570", "10.0.0.1", 5570), ("head-0.lan:1", "head-0.lan", 1),
     ("[fd00::1]:65535", "fd00::1", 65535), (" 0.0.0.0:80 ", "0.0.0.0", 80)],
)  # fmt: skip
def test_hosts_with_a_port(text, host, port):
    found = parse_host_port(text)
    assert (found.host, found.port) == (host, port)
    assert str(found) == text.strip()
    assert found.is_any is (host == "0.0.0.0")


@pytest.mark.parametrize(
    "text",
    ["", "head", ":5570", "head:", "head:0", "head:65536", "head:x", "fd00::1:5570", "tcp://h:1",
     "head:5570/x", "h\u00e4:1", "head:-1", "a b:1", "[::1:5", "head:0000001"],
)  # fmt: skip
def test_what_names_no_host_and_port(text):
    with pytest.raises(ValueError, match=r"^expected HOST:PORT, such as 10\.0\.0\.1:5570"):
        parse_host_port(text)


@pytest.mark.parametrize(
    ("host", "is_any"),
    [
        ("0", True), ("0.0", True), ("[::0]", True), ("[0:0:0:0:0:0:0:0]", True),
        ("[::ffff:0.0.0.0]", True), ("10.0.0.0", False), ("[::1]", False),
        ("[::ffff:1.0.0.0]", False), ("0.example.org", False),
    ],
)  # fmt: skip
def test_every_way_to_write_any_address_is_known(host, is_any):
    assert parse_host_port(f"{host}:5570").is_any is is_any
