import httpx
import numpy as np
import orjson
import pytest
from client_fakes import INFO, make_trace, same, server

import moescope
from moescope import batch, formats


def client(routes, **kwargs) -> moescope.Client:
    return moescope.Client("http://moe", transport=server(routes), **kwargs)


def failing(status: int, **body) -> moescope.Client:
    answer = httpx.MockTransport(lambda _: httpx.Response(status, **body))
    return moescope.Client("http://moe", transport=answer, retries=0)


def test_routes_asks_for_npz_and_gives_the_traces():
    traces = [make_trace(0, index=0), make_trace(1, index=1)]
    asked = []

    def answer(request):
        asked.append(dict(request.url.params))
        return httpx.Response(200, content=formats.dump_npz(traces))

    with client({"GET /routes/chatcmpl-1": answer}) as moe:
        found = moe.routes("chatcmpl-1")
    assert asked == [{"format": "npz"}]
    assert all(same(a, b) for a, b in zip(traces, found, strict=True))


def test_routes_passes_on_every_parameter():
    asked = []

    def answer(request):
        asked.append(dict(request.url.params))
        return httpx.Response(200, content=formats.dump_npz([make_trace()]))

    moe = client({"GET /routes/x": answer})
    moe.routes("x", index=0, layers=[5, 0], weights=False, wait_s=0)
    moe.routes("x", layers="0,5-7")
    assert asked == [
        {"format": "npz", "index": "0", "layers": "5,0", "weights": "false", "wait_s": "0"},
        {"format": "npz", "layers": "0,5-7"},
    ]


@pytest.mark.parametrize(
    "request_id",
    [
        "a/b",
        "..",
        "a/../b",
        "a?b=c",
        "a#b",
        "a%2Fb",
        "a b",
        "ä…",
        ".",
        "a.b",
        "a\\b",
        "x;y",
        "100%",
    ],
)
def test_any_request_id_arrives_as_it_is(request_id):
    seen = []

    def answer(request):
        # An ASGI server splits off the query and decodes the path, once.
        raw = request.url.raw_path.partition(b"?")[0]
        seen.append(httpx.QueryParams(b"p=" + raw.replace(b"+", b"%2B"))["p"])
        return httpx.Response(200, content=formats.dump_npz([make_trace()]))

    moescope.Client("http://moe", transport=httpx.MockTransport(answer)).routes(request_id)
    assert seen == [f"/routes/{request_id}"]


def test_an_empty_request_id_is_refused_without_asking():
    with pytest.raises(ValueError, match="empty"):
        client({}).routes("")


def test_the_key_is_sent_as_a_bearer_token(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    keys = []

    def answer(request):
        keys.append(request.headers.get("authorization"))
        return httpx.Response(200, json=INFO)

    for api_key in ("secret", None):
        client({"GET /moescope/info": answer}, api_key=api_key).info()
    monkeypatch.setenv("VLLM_API_KEY", "from-the-environment")
    for api_key in ("secret", None, ""):
        client({"GET /moescope/info": answer}, api_key=api_key).info()
    assert keys == ["Bearer secret", None, "Bearer secret", "Bearer from-the-environment", None]


@pytest.mark.parametrize(
    ("api_key", "said"),
    [("", "no API key was sent"), ("wrong", "this API key is not one of the server's")],
)
def test_401_says_where_a_key_is_given(api_key, said):
    answer = httpx.MockTransport(lambda _: httpx.Response(401, json={"error": "Unauthorized"}))
    moe = moescope.Client("http://moe", api_key, transport=answer)
    with pytest.raises(moescope.AuthenticationError) as raised:
        moe.info()
    assert str(raised.value) == (
        f"Unauthorized: {said}; give --api-key (api_key in Python) or set VLLM_API_KEY "
        "(HTTP 401 from GET http://moe/moescope/info)"
    )


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("http://moe", "/moescope/info"),
        ("http://moe/", "/moescope/info"),
        ("http://moe/v1", "/moescope/info"),
        ("http://moe/v1/", "/moescope/info"),
        ("http://moe/proxied/v1", "/proxied/moescope/info"),
        ("http://moe/v10", "/v10/moescope/info"),
    ],
)
def test_an_address_may_end_in_v1_as_openais_clients_have_it(address, path):
    asked = []

    def answer(request):
        asked.append(request.url.path)
        return httpx.Response(200, json=INFO)

    moescope.Client(address, transport=httpx.MockTransport(answer)).info()
    assert asked == [path]


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (202, moescope.StillRunningError),
        (401, moescope.AuthenticationError),
        (403, moescope.PermissionDeniedError),
        (404, moescope.RequestNotFoundError),
        (410, moescope.TraceEvictedError),
        (422, moescope.InvalidQueryError),
        (503, moescope.CollectorDownError),
        (500, moescope.ServerError),
        (307, moescope.ServerError),
    ],
)
def test_every_status_has_its_error(status, error):
    with pytest.raises(error, match=f"HTTP {status} from GET http://moe/routes/x") as raised:
        failing(status, json={"detail": "why"}).routes("x")
    assert type(raised.value) is error
    assert raised.value.status_code == status


@pytest.mark.parametrize(
    "body",
    [
        {"json": {"error": {"message": "the reason", "code": 404}}},
        {"json": {"error": "the reason"}},
        {"json": {"detail": "the reason"}},
        {"json": {"detail": [{"loc": ["query", "layers"], "msg": "the reason"}]}},
        {"text": "the reason"},
    ],
)
def test_the_servers_own_words_are_in_the_message(body):
    with pytest.raises(moescope.InvalidQueryError, match=r"^(query\.layers: )?the reason \("):
        failing(422, **body).routes("x")


def test_a_body_without_words_still_names_the_status():
    with pytest.raises(moescope.ServerError, match="Bad Gateway"):
        failing(502).routes("x")


def test_404_of_an_endpoint_is_not_an_unknown_request():
    with pytest.raises(moescope.ServerError, match="moescope serve") as raised:
        client({}).info()
    assert type(raised.value) is moescope.ServerError


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (httpx.ConnectError("refused"), "cannot reach http://moe: refused"),
        (httpx.ReadTimeout(""), "no response from http://moe in time"),
        (httpx.ReadError(""), "cannot reach http://moe: ReadError"),
    ],
)
def test_connection_errors_become_one_error_that_names_the_server(error, message):
    def answer(request):
        raise error

    moe = moescope.Client("http://moe", transport=httpx.MockTransport(answer), retries=0)
    with pytest.raises(moescope.ConnectionFailedError, match=message):
        moe.info()


@pytest.mark.parametrize("url", ["moe:8000", "http://", "http://moe:port"])
def test_a_malformed_address_is_a_connection_error(url):
    with pytest.raises(moescope.ConnectionFailedError):
        moescope.Client(url).info()


def test_an_answer_that_is_no_trace_is_a_format_error():
    moe = client({"GET /routes/x": lambda _: httpx.Response(200, text="<html>")})
    with pytest.raises(moescope.FormatError):
        moe.routes("x")


def test_info():
    info = client({"GET /moescope/info": {**INFO, "new_field": 1}}).info()
    assert (info.layers, info.num_hidden_layers) == ((0, 1, 3), 8)
    assert info.versions["vllm"] == "0.32.0"
    assert info.store.limit_bytes == 100


@pytest.mark.parametrize("name", ["model", "layers", "store", "top_k"])
def test_info_without_a_field_is_a_format_error(name):
    values = {key: value for key, value in INFO.items() if key != name}
    with pytest.raises(moescope.FormatError, match=name):
        client({"GET /moescope/info": values}).info()


EXPERTS = {
    "model": "demo",
    "phase": "decode",
    "since_s": 5.0,
    "num_rows": 3,
    "num_experts": 3,
    "layers": [0, 4],
    "counts": [[1, 2, 0], [0, 0, 3]],
    "entropy": [0.6, None],
}


def test_experts():
    asked = []

    def answer(request):
        asked.append(dict(request.url.params))
        return httpx.Response(200, json=EXPERTS)

    counts = client({"GET /experts": answer}).experts("decode")
    assert asked == [{"phase": "decode"}]
    assert counts.counts.tolist() == EXPERTS["counts"]
    assert counts.counts.dtype == np.int64
    assert counts.layers.tolist() == [0, 4]


def test_experts_whose_counts_do_not_fit_are_refused():
    with pytest.raises(moescope.FormatError, match="counts must be"):
        client({"GET /experts": {**EXPERTS, "num_experts": 4}}).experts()


def test_routes_batch_passes_on_every_parameter():
    asked = []
    found = moescope.RoutesBatch(
        status={"a": "finished", "b": "running"}, traces={"a": [make_trace()]}
    )

    def answer(request):
        asked.append(orjson.loads(request.content))
        return httpx.Response(200, content=batch.dump_npz(found))

    moe = client({"POST /routes/batch": answer})
    loaded = moe.routes_batch(["a", "b"])
    moe.routes_batch(("a",), layers=[5, 0], weights=False, wait_s=0)
    assert asked == [
        {"request_ids": ["a", "b"], "format": "npz"},
        {"request_ids": ["a"], "format": "npz", "layers": "5,0", "weights": False, "wait_s": 0},
    ]
    assert same(loaded.traces["a"][0], found.traces["a"][0])
    assert loaded.failed == {"b": "running"}


def test_a_server_that_answers_no_batch_is_a_format_error():
    moe = client({"POST /routes/batch": lambda _: httpx.Response(200, text="<html>")})
    with pytest.raises(moescope.FormatError):
        moe.routes_batch(["a"])


def test_recent_pages():
    sequence = {
        "request_id": "x",
        "ids": ["x", "y"],
        "index": 0,
        "status": "finished",
        "prompt_len": 3,
        "num_tokens": 9,
        "finish_reason": "stop",
        "complete": True,
        "coverage": 1.0,
        "created_s": 1.0,
        "size_bytes": 10,
    }
    asked = []

    def answer(request):
        asked.append(dict(request.url.params))
        next_before = 18 - len(asked)
        return httpx.Response(200, json={"sequences": [sequence], "next_before": next_before})

    moe = client({"GET /routes": answer})
    page = moe.recent()
    moe.recent(limit=5, before=page.next_before)
    assert page.sequences[0].ids == ("x", "y")
    assert asked == [{"limit": "50"}, {"limit": "5", "before": "17"}]


def test_a_list_that_is_none_is_a_format_error():
    with pytest.raises(moescope.FormatError):
        client({"GET /routes": {"sequences": [1], "next_before": None}}).recent()


def test_delete_pause_resume_and_reset():
    moe = client(
        {
            "DELETE /routes/a%2Fb": {"request_id": "a/b", "deleted": 2},
            "POST /routes/pause": {"capture": "paused"},
            "POST /routes/resume": {"capture": "on"},
            "POST /routes/reset": {"since_s": 12.5},
        }
    )
    assert moe.delete("a/b") == 2
    assert (moe.pause(), moe.resume(), moe.reset()) == ("paused", "on", 12.5)
    with pytest.raises(moescope.RequestNotFoundError):
        moe.delete("unknown")


def test_an_answer_without_its_field_is_a_format_error():
    with pytest.raises(moescope.FormatError, match="since_s"):
        client({"POST /routes/reset": {"since_s": None}}).reset()


def test_a_key_that_no_header_can_carry_is_told():
    with pytest.raises(moescope.CommandError, match="API key"):
        moescope.Client("http://moe", "clé")
