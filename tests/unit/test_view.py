"""``moescope view``: what it reads, and what the file has in it."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import struct
from html.parser import HTMLParser

import numpy as np
import orjson
import pytest
from analysis_reference import log_of, make_trace, random_trace, response_of

from moescope import arrow, formats, replay, service
from moescope.analyze import inputs
from moescope.cli import main
from moescope.errors import CommandError
from moescope.trace import Source
from moescope.view import html
from moescope.view.read import read
from moescope.view.shown import TRACE_BYTES, Selection

TRACES = [
    dataclasses.replace(random_trace(number), weights_versions=np.array([[0, 3]]))
    for number in range(4)
]
ARRAYS = ("topk_weights", "token_ids", "topk_ids", "source")
HOSTILE = ["</script><script>alert(1)</script>", "<!--", "'\"&amp;", "\u202e", "👩\u200d👧", "]]>"]


@pytest.fixture
def files(tmp_path):
    """The same traces as each kind of input."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "moe_routes.jsonl").write_bytes(log_of(TRACES))
    answers = [response_of(one, number) for number, one in enumerate(TRACES)]
    replay.write_responses(run_dir / "responses.jsonl", answers)
    (tmp_path / "routes.jsonl").write_bytes(log_of(TRACES))
    (tmp_path / "all.npz").write_bytes(formats.dump_npz(TRACES))
    (tmp_path / "all.parquet").write_bytes(arrow.dump_parquet(TRACES))
    return tmp_path


def view(*arguments):
    """The exit status of ``moescope view``."""
    try:
        return main(["view", *map(str, arguments)])
    except SystemExit as error:
        return error.code or 0


class Parsed(HTMLParser):
    """The inline parts of a page, by tag, and every attribute."""

    def __init__(self, text):
        super().__init__()
        self.parts, self.attributes, self._tag = {}, [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))
        self._tag = dict(attrs).get("id", tag) if tag in {"script", "style"} else None
        if self._tag:
            assert self._tag not in self.parts
            self.parts[self._tag] = ""

    def handle_data(self, data):
        if self._tag:
            self.parts[self._tag] += data

    def handle_endtag(self, tag):
        self._tag = None


def unpacked(path):
    """The header of a page's data, and the arrays of each trace."""
    packed = gzip.decompress(base64.b64decode(Parsed(path.read_text()).parts["saved"]))
    (size,) = struct.unpack_from("<I", packed)
    header, at = orjson.loads(packed[4 : 4 + size]), 4 + size
    traces = []
    for facts in header["traces"]:
        num_rows = facts["num_tokens"] - 1
        shape = (num_rows, len(header["layers"]), header["top_k"])
        shapes = (shape, (facts["num_tokens"],), shape, (num_rows,))
        arrays = {}
        for name, dtype, one in zip(ARRAYS, facts["dtypes"], shapes, strict=True):
            if dtype is not None:
                width, length = np.dtype(dtype).itemsize, int(np.prod(one))
                apart = np.frombuffer(packed, np.uint8, width * length, at).reshape(width, length)
                arrays[name] = np.ascontiguousarray(apart.T).view(f"{dtype}").reshape(one)
                at += width * length
        traces.append((facts, arrays))
    assert at == len(packed)
    return header, traces


@pytest.mark.parametrize("name", ["run", "all.npz", "all.parquet", "routes.jsonl"])
def test_every_kind_of_input_is_in_the_page_as_it_was(files, name, capsys):
    assert view(files / name, "-o", files / "page.html") == 0
    assert "page.html: 4 requests, 164 tokens, 0." in capsys.readouterr().out
    header, traces = unpacked(files / "page.html")
    assert {key: header[key] for key in ("model", "layers", "num_experts", "top_k")} == {
        "model": "tiny", "layers": [0, 2, 4], "num_experts": 7, "top_k": 2,
    }  # fmt: skip
    assert (header["num_requests"], header["num_left_out"]) == (4, 0)
    is_log, is_bare = not name.startswith("all"), name == "routes.jsonl"
    for trace, (facts, arrays) in zip(TRACES, traces, strict=True):
        for array in ("topk_ids", "topk_weights"):
            there = getattr(trace, array)[trace.present]
            assert (arrays[array][trace.present] == there).all(), array
        assert (arrays["source"] == trace.source).all()
        assert ("token_ids" in arrays) is not is_bare
        assert is_bare or arrays["token_ids"].tolist() == trace.token_ids.tolist()
        assert (facts["request_id"], facts["coverage"]) == (trace.request_id, trace.coverage)
        assert facts["prompt_len"] == (None if is_bare else trace.prompt_len)
        assert facts["finish_reason"] == (None if is_bare else "stop")
        assert facts["created_s"] == (None if is_log else 1.0)
        assert (facts["oldest_weights_version"], facts["newest_weights_version"]) == (3, 3)


def test_half_precision_and_traces_without_weights_and_tokens(tmp_path):
    half = dataclasses.replace(TRACES[0], topk_weights=TRACES[0].topk_weights.astype(np.float16))
    bare = dataclasses.replace(TRACES[1], topk_weights=None, token_ids=None)
    (tmp_path / "half.npz").write_bytes(formats.dump_npz([half]))
    (tmp_path / "bare.npz").write_bytes(formats.dump_npz([bare]))
    assert view(tmp_path / "*.npz", "-o", tmp_path / "page.html") == 0
    _, ((_, of_bare), (_, of_half)) = unpacked(tmp_path / "page.html")
    assert of_bare.keys() == {"topk_ids", "source"}
    assert of_half["topk_weights"].dtype == np.float16
    assert (of_half["topk_weights"] == half.topk_weights).all()


def test_the_page_allows_its_own_scripts_and_styles_alone(files):
    assert view(files / "all.npz", "-o", files / "page.html") == 0
    page = Parsed((files / "page.html").read_text())
    ((_, policy),) = [one for one in page.attributes if "http-equiv" in one[1]]
    assert policy["http-equiv"] == "Content-Security-Policy"
    rules = dict(rule.split(" ", 1) for rule in policy["content"].split("; "))
    hashes = {
        tag: f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for tag, text in page.parts.items()
    }
    assert rules == {
        "default-src": "'none'", "script-src": hashes["script"], "style-src": hashes["style"],
        "img-src": "data:", "base-uri": "'none'", "form-action": "'none'",
    }  # fmt: skip
    places = [
        page.attributes.index(one) for one in page.attributes if one[0] in {"style", "script"}
    ]
    assert page.attributes.index(("meta", policy)) < min(places)
    for _, attributes in page.attributes:
        assert "src" not in attributes
        assert "style" not in attributes
        assert attributes.get("href", "#")[0] == "#" or attributes["href"] == "data:,"


def test_text_of_prompts_is_in_no_markup(tmp_path):
    texts = [*HOSTILE, *map(str, range(41 - len(HOSTILE)))]
    evil = dataclasses.replace(
        TRACES[0], tokens=texts, request_id=HOSTILE[0], model=HOSTILE[0], finish_reason=HOSTILE[1]
    )
    (tmp_path / "a.npz").write_bytes(formats.dump_npz([evil]))
    assert view(tmp_path / "a.npz", "-o", tmp_path / "page.html") == 0
    text = (tmp_path / "page.html").read_text()
    assert "alert(1)" not in text
    assert Parsed(text).parts.keys() == {"script", "style", "saved"}
    header, ((facts, _),) = unpacked(tmp_path / "page.html")
    assert (header["model"], facts["request_id"], facts["tokens"]) == (
        HOSTILE[0],
        HOSTILE[0],
        texts,
    )


def test_equal_inputs_make_equal_files(files):
    for name in ("one.html", "two.html"):
        assert view(files / "all.npz", "-o", files / name) == 0
    assert (files / "one.html").read_bytes() == (files / "two.html").read_bytes()


def test_25_requests_of_24_layers_are_5_megabytes(tmp_path):
    random = np.random.default_rng(0)
    logits = random.normal(size=(25, 300, 24, 60)).astype(np.float32)
    ids = np.argsort(-logits, axis=3)[..., :4]
    shares = np.exp(logits) / np.exp(logits).sum(axis=3, keepdims=True)
    weights = np.take_along_axis(shares, ids, axis=3)
    traces = [
        make_trace(
            f"chatcmpl-{number}", ids[number], weights=weights[number], num_experts=60,
            tokens=random.integers(0, 150_000, 301), prompt_len=100,
        )
        for number in range(25)
    ]  # fmt: skip
    (tmp_path / "a.npz").write_bytes(formats.dump_npz(traces))
    assert view(tmp_path / "a.npz", "-o", tmp_path / "page.html") == 0
    assert (tmp_path / "page.html").stat().st_size <= 5_000_000


def test_the_texts_of_tokens_are_those_of_the_traces_or_else_the_tokenizer(tmp_path):
    own = [f"own{one}" for one in range(41)]
    with_text = dataclasses.replace(TRACES[0], tokens=own)
    (tmp_path / "a.npz").write_bytes(formats.dump_npz([with_text]))
    assert view(tmp_path / "a.npz", "-o", tmp_path / "own.html") == 0
    _, ((facts, _),) = unpacked(tmp_path / "own.html")
    assert facts["tokens"] == own
    vocabulary = {"model": {"vocab": {"five": 5, "four": 4}}}
    (tmp_path / "tokenizer.json").write_bytes(orjson.dumps(vocabulary))
    (tmp_path / "b.npz").write_bytes(formats.dump_npz(TRACES[:1]))
    options = ("--tokenizer", tmp_path / "tokenizer.json", "-o", tmp_path / "b.html")
    assert view(tmp_path / "b.npz", *options) == 0
    _, ((facts, _),) = unpacked(tmp_path / "b.html")
    assert facts["tokens"] == [
        {5: "five", 4: "four"}.get(token) for token in TRACES[0].token_ids.tolist()
    ]


@pytest.mark.parametrize("name", ["run", "all.npz", "routes.jsonl"])
def test_a_limit_keeps_the_first_requests_and_says_what_it_left_out(files, name, capsys):
    assert view(files / name, "--limit", 3, "-o", files / "page.html") == 0
    assert "3 requests (1 left out)" in capsys.readouterr().out
    header, traces = unpacked(files / "page.html")
    assert [facts["request_id"] for facts, _ in traces] == ["r0", "r1", "r2"]
    assert (header["num_requests"], header["num_left_out"]) == (3, 1)


@pytest.mark.parametrize("name", ["run", "all.npz", "routes.jsonl"])
def test_more_than_a_page_holds_is_refused(files, name):
    max_bytes = 2 * (40 * 3 * 2 * (1 + 4) + TRACE_BYTES)
    found = inputs.find([str(files / name)])
    with pytest.raises(CommandError, match=r"the first 3 requests have more than 0 MiB.*--limit"):
        read(found, Selection(max_bytes=max_bytes))
    fits = Selection(2, max_bytes=max_bytes)
    read(found, fits)
    assert (fits.num_requests, fits.num_left_out) == (2, 2)


def test_a_line_of_a_far_position_takes_no_memory(files, capsys):
    line = {"type": "route", "req_id": "far", "token_idx": 2**30, "layer": 0, "topk_ids": [0, 1]}
    with (files / "routes.jsonl").open("ab") as file:
        file.write(orjson.dumps(line) + b"\n")
    assert view(files / "routes.jsonl", "-o", files / "page.html") == 1
    assert "holds 1 rows of far, from row 1073741824 on" in capsys.readouterr().err


def test_a_log_may_be_where_nothing_can_be_written(files):
    (files / "run").chmod(0o555)  # root may write to it all the same
    assert view(files / "run", "-o", files / "page.html") == 0


def test_many_sequences_of_a_request_are_bounded(tmp_path):
    line = {"type": "route", "req_id": "a", "token_idx": 0, "layer": 0, "topk_ids": [0]}
    lines = [orjson.dumps(line | {"index": number}) + b"\n" for number in range(9)]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    found = inputs.find([str(tmp_path / "a.jsonl")])
    with pytest.raises(CommandError, match="the first 1 requests have more than"):
        read(found, Selection(max_bytes=8 * 1024))
    read(found, Selection(max_bytes=12 * 1024))


def test_tokens_that_lack_a_layer_are_missing(tmp_path):
    head, *lines = log_of([random_trace(0, num_rows=3)]).splitlines(keepends=True)
    del lines[4]
    (tmp_path / "a.jsonl").write_bytes(head + b"".join(lines))
    assert view(tmp_path / "a.jsonl", "-o", tmp_path / "page.html") == 0
    _, ((facts, arrays),) = unpacked(tmp_path / "page.html")
    assert arrays["source"].tolist() == [Source.COMPUTED, Source.MISSING, Source.COMPUTED]
    assert (facts["complete"], facts["coverage"]) == (False, pytest.approx(2 / 3))


def test_a_page_of_a_trace_is_refused(tmp_path, capsys):
    for page, words in ((TRACES[0].page(0, 10), "from row 0"), (TRACES[0].page(11, 99), "row 11")):
        (tmp_path / "a.npz").write_bytes(formats.dump_npz([page]))
        assert view(tmp_path / "a.npz", "-o", tmp_path / "page.html") == 1
        told = capsys.readouterr().err
        assert words in told
        assert "fetch it without start and limit" in told


@pytest.mark.parametrize(
    "change", [{"model": "big"}, {"num_experts": 9}, {"layers": np.array([0, 2, 5], np.int32)}]
)
def test_two_models_are_refused(files, change, capsys):
    other = dataclasses.replace(TRACES[0], **change)
    (files / "other.npz").write_bytes(formats.dump_npz([other]))
    assert view(files / "all.npz", files / "other.npz", "-o", files / "page.html") == 1
    told = capsys.readouterr().err
    assert "are not of one model" in told
    assert "give inputs of one model" in told
    assert not (files / "page.html").exists()


def cut(data):
    return data[: len(data) // 2]


def another(_):
    return b"{}"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("all.npz", cut), ("all.npz", another), ("all.parquet", cut), ("all.parquet", another),
        ("routes.jsonl", another),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_and_nothing_is_written(files, name, damage, capsys):
    (files / name).write_bytes(damage((files / name).read_bytes()))
    (files / "page.html").write_text("before")
    assert view(files / name, "-o", files / "page.html") == 1
    assert name in capsys.readouterr().err
    assert (files / "page.html").read_text() == "before"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "-o", "page.html"], "there is no nowhere"),
        (["a=all.npz", "-o", "page.html"], "has a label: view takes paths alone"),
        (["all.npz", "-o", "all.npz"], "all.npz is an input"),
        (["all.npz", "-o", "none/page.html"], "there is no directory"),
        (["all.npz", "-o", "run"], "it is a directory"),
        (["nothing.npz", "-o", "page.html"], "no routed token"),
        (["all.npz", "-o", "page.html", "--tokenizer", "none.json"], "cannot read none.json"),
    ],
)
def test_what_cannot_be_done_is_said(files, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(files)
    nothing = make_trace("a", [[[0, 1]]], missing=[0])
    (files / "nothing.npz").write_bytes(formats.dump_npz([nothing]))
    assert view(*arguments) == 1
    assert words in capsys.readouterr().err
    assert not (files / "page.html").exists()


def test_a_page_that_was_there_is_replaced(files):
    (files / "page.html").write_text("before")
    assert view(files / "all.npz", "-o", files / "page.html") == 0
    assert (files / "page.html").read_text().startswith("<!doctype html>")
    assert not [one for one in files.iterdir() if one.name.startswith(".")]


def test_an_index_that_is_not_as_expected_is_refused():
    page = service.page()
    page["index.html"] = page["index.html"].replace("app.js", "main.js")
    with pytest.raises(CommandError, match=r"has 0 of .*app\.js"):
        html.render(page, b"")
