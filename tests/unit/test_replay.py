import asyncio

import httpx
import orjson
import pytest
from client_fakes import completion

from moescope import ConnectionFailedError, FormatError, ServerError, http, replay

CHAT = "/v1/chat/completions"


def run(prompts, handler, *, skip=(), offset_s=0.0, **options):
    async def go():
        transport = httpx.MockTransport(handler)
        async with http.connect_async("http://moe", "secret", transport=transport) as client:
            return await replay.replay(
                prompts,
                client,
                replay.ReplayOptions(**{"model": "demo", **options}),
                skip=skip,
                offset_s=offset_s,
            )

    return asyncio.run(go())


def body(request):
    return orjson.loads(request.content)


def prompt_of(request):
    return body(request)["messages"][0]["content"]


def answered(request):
    return httpx.Response(200, json=completion(prompt_of(request)))


@pytest.mark.parametrize("seed", [None, 7])  # vLLM may refuse a seed that nobody asked for
def test_what_is_asked(seed):
    asked = []

    def handle(request):
        asked.append(request)
        return httpx.Response(200, json=completion("hello"))

    run(["hello"], handle, seed=seed)
    assert body(asked[0]) == {
        "model": "demo",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 128,
        "temperature": 0.0,
        "return_token_ids": True,
    } | ({} if seed is None else {"seed": seed})
    assert asked[0].url.path == CHAT
    assert asked[0].headers["authorization"] == "Bearer secret"
    assert "x-request-id" not in asked[0].headers


def test_what_comes_back():
    (response,) = run(["what is it"], lambda _: httpx.Response(200, json=completion("what is it")))
    assert response.request_id == "chatcmpl-0"
    assert (response.model, response.text) == ("demo", "re: what is it")
    assert (response.prompt_tokens, response.completion_tokens) == (3, 3)
    assert response.token_ids == [0, 1, 2]
    assert response.prompt_token_ids == [1, 1, 1]
    assert response.error is None
    assert 0 <= response.latency_s < 5


def test_the_responses_are_in_the_order_of_the_prompts_whatever_comes_first():
    async def handle(request):
        for _ in range(10 - int(prompt_of(request))):
            await asyncio.sleep(0)
        return httpx.Response(200, json=completion(prompt_of(request)))

    prompts = [str(number) for number in range(10)]
    responses = run(prompts, handle, concurrency=10)
    assert [response.prompt for response in responses] == prompts
    assert [response.index for response in responses] == list(range(10))
    assert [response.text for response in responses] == [f"re: {prompt}" for prompt in prompts]


@pytest.mark.parametrize("concurrency", [1, 3, 50])
def test_no_more_requests_are_in_flight_than_asked_for(concurrency):
    flying, most = 0, 0

    async def handle(request):
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        for _ in range(20):
            await asyncio.sleep(0)
        flying -= 1
        return httpx.Response(200, json=completion("x"))

    run(["x"] * 12, handle, concurrency=concurrency)
    assert most == min(concurrency, 12)


def test_a_failure_is_recorded_once_and_the_others_go_on():
    calls = []

    def handle(request):
        calls.append(prompt_of(request))
        if calls[-1] == "bad":
            return httpx.Response(400, json={"error": {"message": "too long"}})
        if calls[-1] == "gone":
            raise httpx.ReadError("closed")
        if calls[-1] == "odd":
            return httpx.Response(200, json={"choices": []})
        return httpx.Response(200, json=completion("x"))

    responses = run(["a", "bad", "gone", "odd", "b"], handle, concurrency=1)
    assert calls == ["a", "bad", "gone", "odd", "b"]
    assert [response.error is None for response in responses] == [True, False, False, False, True]
    assert responses[1].error == "HTTP 400: too long"
    assert "closed" in responses[2].error
    assert "not a chat completion" in responses[3].error


def test_prompts_are_left_out_and_the_time_goes_on():
    responses = run(["a", "b", "c"], answered, skip={0, 2}, offset_s=100.0)
    assert [response.index for response in responses] == [1]
    assert 100.0 <= responses[0].started_s <= responses[0].end_s < 105.0


def test_a_server_that_returns_no_token_ids():
    def handle(request):
        values = completion("x")
        del values["prompt_token_ids"], values["choices"][0]["token_ids"]
        return httpx.Response(200, json=values)

    (response,) = run(["x"], handle)
    assert (response.token_ids, response.prompt_token_ids, response.error) == (None, None, None)


def models(handler):
    """The model that a replay names in its request."""
    named = []

    def handle(request):
        if request.url.path == "/v1/models":
            return handler(request)
        named.append(body(request)["model"])
        return httpx.Response(200, json=completion("x"))

    run(["x"], handle, model=None)
    return named[0]


def test_the_model_is_the_first_that_the_server_lists():
    assert (
        models(lambda _: httpx.Response(200, json={"data": [{"id": "m"}, {"id": "lora"}]})) == "m"
    )


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (httpx.Response(200, json={"data": []}), FormatError),
        (httpx.Response(401, json={"error": "Unauthorized"}), ServerError),
    ],
)
def test_a_server_that_names_no_model(answer, error):
    with pytest.raises(error):
        models(lambda _: answer)


def test_a_server_that_is_not_there_is_told_before_any_prompt_is_sent():
    def refuse(request):
        raise httpx.ConnectError("refused")

    with pytest.raises(ConnectionFailedError, match="http://moe"):
        models(refuse)


def test_responses_survive_their_file(tmp_path):
    def handle(request):
        if prompt_of(request) == "bad":
            return httpx.Response(500)
        return httpx.Response(200, json=completion("\u2028 ä"))

    responses = run(["a\nb", "bad"], handle)
    path = tmp_path / "responses.jsonl"
    replay.write_responses(path, responses)
    assert path.read_bytes().count(b"\n") == 2
    assert replay.read_responses(path) == responses


@pytest.mark.parametrize("text", ["nonsense", '{"unknown": 1}'])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    path = tmp_path / "responses.jsonl"
    path.write_text(text)
    with pytest.raises(FormatError, match=r"responses\.jsonl"):
        replay.read_responses(path)
