"""The text of tokens: of every kind of tokenizer, and in every response."""

from __future__ import annotations

import dataclasses
import io
import re
import threading
from types import SimpleNamespace

import numpy as np
import orjson
import pyarrow as pa
import pytest
from pyarrow import parquet
from vllm.tokenizers import get_tokenizer
from vllm.v1.engine import FinishReason

from moescope import Client, batch, formats
from moescope.errors import ServerError
from moescope_service import bundled_model, runtime
from moescope_service.api import tokens as api_tokens
from moescope_service.api.bodies import TEXT_BYTES, making_bytes
from moescope_service.api.sharing import Budget, SharedResponses
from moescope_service.frontend.collector_client import CollectorClient
from moescope_service.offline import OfflineCapture
from moescope_service.token_text import TokenText, shown

from .deployment import Deployment
from .fake_engine import SPEC
from .tokenizers_made import KINDS, PLAIN, TEXT, byte_level


def ids_of(tokenizer, text):
    return np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)


def whole(texts):
    """The text that tokens are together: bytes that some of them show are put together."""
    data = b"".join(
        bytes.fromhex(one[3:5]) if re.fullmatch("<0x[0-9A-F]{2}>", one) else one.encode()
        for text in texts
        for one in re.split("(<0x[0-9A-F]{2}>)", text)
    )
    return data.decode()


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    return KINDS[request.param](tmp_path_factory.mktemp("tokenizer"))


class TestATokenizer:
    def test_loses_nothing(self, tokenizer):
        ids = ids_of(tokenizer, TEXT)
        texts = TokenText(tokenizer).of(ids)
        assert len(texts) == len(ids)
        assert whole(texts).lstrip() == TEXT  # some put a space before a text
        assert "\ufffd" not in "".join(texts)
        assert any("<0xF0>" in text for text in texts)

    def test_shows_names_as_they_are(self, tokenizer):
        names = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
        assert names & {"<|end|>", "</s>"}
        vocabulary = {name: tokenizer.get_vocab()[name] for name in names}
        texts = TokenText(tokenizer).of(np.array([*vocabulary.values()], np.int32))
        assert texts == [*vocabulary]

    def test_has_no_text_beyond_its_vocabulary(self, tokenizer):
        text = TokenText(tokenizer)
        beyond = np.array([-1, tokenizer.max_token_id + 1, 2**31 - 1], np.int32)
        assert text.of(beyond) == ["", "", ""]
        assert len(text.of(np.arange(tokenizer.max_token_id + 1, dtype=np.int32))) > 256

    def test_has_spaces_where_they_are(self, tokenizer):
        """A decoder that is given one token alone may take its space."""
        texts = TokenText(tokenizer).of(ids_of(tokenizer, "Tom Tom"))
        assert "".join(texts).lstrip() == "Tom Tom"


def test_of_tokens_that_are_not_split_is_the_decoded_text(tmp_path):
    tokenizer = byte_level(tmp_path)
    text = PLAIN + "<|end|>▁Ġ odd" + PLAIN
    ids = ids_of(tokenizer, text)
    assert len(ids) < len(text) / 2
    assert "".join(TokenText(tokenizer).of(ids)) == tokenizer.decode(ids.tolist()) == text


def test_of_the_bundled_model():
    tokenizer = get_tokenizer(str(bundled_model.path()))
    ids = ids_of(tokenizer, "<|im_start|>Tom has 3 apples.<|im_end|>\n👍")
    texts = TokenText(tokenizer).of(ids)
    assert texts[0] == "<|im_start|>"
    assert whole(texts) == tokenizer.decode(ids.tolist())
    assert texts[-4:] == ["<0xF0>", "<0x9F>", "<0x91>", "<0x8D>"]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", ""), ("é👍".encode(), "é👍"), (b"a\xf0\x9fb", "a<0xF0><0x9F>b"), (b"\xc3", "<0xC3>"),
        (b"\xa9 \xed\xa0\x80", "<0xA9> <0xED><0xA0><0x80>"), ("\ufffd".encode(), "\ufffd"),
    ],
)  # fmt: skip
def test_bytes_that_are_no_utf8_are_shown(data, text):
    assert shown(data) == text


class Counted:
    """A tokenizer of pieces; counts those that are asked for."""

    all_special_tokens = ()

    def __init__(self, pieces):
        self.pieces = pieces
        self.max_token_id = len(pieces) - 1
        self.asked = []

    def get_added_vocab(self):
        return {}

    def convert_ids_to_tokens(self, ids, skip_special_tokens=False):
        self.asked += ids
        return [self.pieces[number] for number in ids]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


def test_each_token_is_looked_up_once():
    tokenizer = Counted(["a", "b", "c", None, b"\xf0", "\ud800"])
    text = TokenText(tokenizer)
    assert text.of(np.array([2, 1, 2], np.int32)) == ["c", "b", "c"]
    assert text.of(np.array([5, 1, 4, 3], np.int32)) == ["<0xED><0xA0><0x80>", "b", "<0xF0>", ""]
    assert sorted(tokenizer.asked) == [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return byte_level(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def deployment(made):
    with Deployment(tokenizer=made).running() as running:
        yield running


def serve(deployment, name, prompt):
    """Run a request of some tokens, the last one sampled."""
    *prompt, last = prompt
    (internal,) = deployment.frontend.add(name, prompt=prompt)
    running = deployment.engine.start(internal, prompt)
    deployment.frontend.put(internal, [last], FinishReason.STOP)
    deployment.engine.step(finished=[running])
    assert deployment.http.get(f"/routes/{name}?wait_s=30&limit=1").status_code == 200


@pytest.fixture(scope="module")
def said(deployment, made):
    ids = ids_of(made, TEXT).tolist()
    serve(deployment, "said", ids)
    return TokenText(made).of(np.array(ids, np.int32))


def get(deployment, form="json", name="said", **params):
    params = {"format": form, "tokens": "true", **params}
    return deployment.http.get(f"/routes/{name}", params=params)


class TestAResponse:
    @pytest.mark.parametrize("form", ["json", "npz", "arrow", "parquet", "jsonl"])
    def test_has_it_in_its_format(self, deployment, said, form):
        read = {
            "json": lambda body: formats.from_dict(orjson.loads(body)["traces"][0]).tokens,
            "npz": lambda body: formats.load_npz(body)[0].tokens,
            "arrow": lambda body: pa.ipc.open_stream(body).read_all()["token"].to_pylist(),
            "parquet": lambda body: parquet.read_table(io.BytesIO(body))["token"].to_pylist(),
            "jsonl": lambda body: [
                line["token"] for line in map(orjson.loads, body.splitlines()[1:])
            ],
        }[form]
        found = read(get(deployment, form, layers="3").content)
        assert found == (said[:-1] if form == "jsonl" else said)
        with pytest.raises(KeyError if form not in ("json", "npz") else TypeError):
            assert len(read(get(deployment, form, tokens="false").content))

    def test_pages_have_their_tokens(self, deployment, said):
        (page,) = get(deployment, start=3, limit=4).json()["traces"]
        assert page["tokens"] == said[3:7]
        (last,) = get(deployment, start=3, limit=1000).json()["traces"]
        assert last["tokens"] == said[3:]

    def test_is_not_that_of_who_asked_without(self, deployment, said):
        """Responses that are made at a time are shared by all that ask the same."""
        found = [None] * 20

        def ask(number):
            wanted = str(number % 2 == 1).lower()
            found[number] = get(deployment, "json", tokens=wanted).json()["traces"][0]

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [one.get("tokens") for one in found] == [None, said] * 10

    def test_the_client_has_it(self, deployment, said):
        with Client(deployment.url) as client:
            (one,) = client.routes("said", tokens=True, layers=[1], weights=False)
            (other,) = client.routes_batch(["said", "never"], tokens=True).traces["said"]
            (without,) = client.routes("said")
        assert one.tokens == other.tokens == said
        assert without.tokens is None

    @pytest.mark.usefixtures("said")
    def test_npy_does_not_take_it(self, deployment):
        answer = get(deployment, "npy")
        assert answer.status_code == 422
        assert "tokens: npy holds expert ids alone" in answer.json()["error"]["message"]

    @pytest.mark.parametrize("form", ["json", "npz"])
    def test_a_batch_has_it(self, deployment, said, form):
        body = {"request_ids": ["said"], "format": form, "tokens": True}
        content = deployment.http.post("/routes/batch", json=body).content
        if form == "json":
            (result,) = orjson.loads(content)["results"]
            assert result["traces"][0]["tokens"] == said
        else:
            assert batch.load_npz(content).traces["said"][0].tokens == said


def test_without_a_tokenizer_it_says_so():
    with Deployment().running() as bare, Client(bare.url) as client:
        serve(bare, "said", [5, 6, 7])
        for ask, wanted in ((client.routes, "said"), (client.routes_batch, ["said"])):
            with pytest.raises(ServerError, match=r"no tokenizer.*--skip-tokenizer-init.*501"):
                ask(wanted, tokens=True)
        assert client.routes("said")[0].tokens is None


def test_where_ids_are_kept_out_there_is_none(made):
    with Deployment(tokenizer=made, token_ids="off").running() as silent:
        serve(silent, "said", [5, 6, 7])
        for form in ("json", "npz", "arrow", "parquet", "jsonl"):
            assert get(silent, form).status_code == 200
        assert "tokens" not in get(silent).json()["traces"][0]


NUM_LONG, NUM_SHORT, LONG = 7000, 24_000, "\x00" * 200
"""The first tokens alone are a little more than `TEXT_BYTES`: 1,203 bytes of JSON each."""


class Noted(Budget):
    """Notes what is taken of it."""

    def __init__(self):
        super().__init__()
        self.taken = []

    async def take(self, size_bytes):
        self.taken.append(size_bytes)
        return await super().take(size_bytes)


@pytest.fixture
def budget(deployment):
    state, budget = deployment.app.state, Noted()
    before, state.moescope_responses = state.moescope_responses, SharedResponses(budget)
    yield budget
    state.moescope_responses = before


@pytest.mark.usefixtures("said")
def test_it_counts_while_a_response_is_made(deployment, budget):
    for tokens in (False, True):
        get(deployment, tokens=tokens)
        body = {"request_ids": ["said"], "format": "npz", "tokens": tokens}
        assert deployment.http.post("/routes/batch", json=body).status_code == 200
    bare = [making_bytes("json"), making_bytes("npz")]
    assert budget.taken == [*bare, *(size_bytes + 5 * TEXT_BYTES for size_bytes in bare)]


@pytest.fixture(scope="module")
def long():
    spec = dataclasses.replace(SPEC, num_blocks=2**16)
    with Deployment(tokenizer=Counted(["short", LONG]), spec=spec).running() as running:
        serve(running, "said", [1] * NUM_LONG + [0] * NUM_SHORT)
        yield running


class TestLongText:
    @pytest.mark.parametrize("form", ["json", "jsonl", "npz", "arrow", "parquet"])
    def test_is_bounded_in_every_format(self, long, form):
        assert "X-Moescope-Next-Start" not in get(long, form, tokens="false").headers
        answer = get(long, form)
        assert answer.status_code == 200
        if form in ("json", "jsonl"):
            assert 0 < answer.content.count(rb"\u0000" * 200) * 1203 < TEXT_BYTES
        assert 1000 < int(answer.headers["X-Moescope-Next-Start"]) < NUM_LONG
        end = get(long, form, start=NUM_LONG)
        assert "X-Moescope-Next-Start" not in end.headers

    def test_comes_in_pages_that_the_client_joins(self, long):
        with Client(long.url) as client:
            (one,) = client.routes("said", tokens=True)
            (other,) = client.routes_batch(["said"], tokens=True).traces["said"]
        assert one.tokens == other.tokens == [LONG] * NUM_LONG + ["short"] * NUM_SHORT
        assert one.complete

    def test_of_one_row_is_sent_whatever_it_takes(self, long, monkeypatch):
        monkeypatch.setattr(api_tokens, "TEXT_BYTES", 10)
        (trace,) = get(long, start=5000).json()["traces"]
        assert trace["tokens"] == [LONG]


def test_a_script_has_it_too(made):
    ids = ids_of(made, TEXT).tolist()
    choices = [SimpleNamespace(token_ids=ids[-1:])]
    output = SimpleNamespace(request_id="said", prompt_token_ids=ids[:-1], outputs=choices)
    capture = OfflineCapture.__new__(OfflineCapture)
    with Deployment().running() as running:
        serve(running, "said", ids)
        capture._collector = CollectorClient(runtime.collector_address())
        try:
            capture._text = None
            with pytest.raises(RuntimeError, match="skip_tokenizer_init"):
                capture.routes(output, tokens=True)
            capture._text = TokenText(made)
            assert whole(capture.routes(output, tokens=True)[0].tokens) == TEXT
            assert capture.routes(output)[0].tokens is None
        finally:
            capture._collector.close()
