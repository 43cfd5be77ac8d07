"""What a stream says, however it is cut, and how responses that are not whole are counted."""

import pytest
from stream_server import CLOSE, DONE, RESET, WAIT, answer, chunk, delta, event, serving, usage
from test_bench_driver import BUSY_S, conversations, one_request, run

from moescope.bench import latency


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk("a") + chunk("b") + chunk("c") + chunk("d")],  # several events in one part
        [chunk("abcd")],  # several tokens in one event, as speculation gives
        [chunk("ab"), chunk("cd")],
        [b"".join([chunk("a")])[:7], chunk("a")[7:] + chunk("bcd")],  # an event in two parts
    ],
)
def test_tokens_are_the_usages_however_chunks_are_cut(chunks):
    request = one_request([*((0.01, data) for data in chunks), (0, usage(7, 4) + DONE)])
    assert request.error is None
    assert request.text == "abcd"
    assert (request.prompt_tokens, request.completion_tokens) == (7, 4)
    expected = (request.e2el_s - request.ttft_s) / 3
    assert request.tpot_s == pytest.approx(expected)


def test_usage_beside_every_chunk_is_taken_from_the_last():
    def chunk_with(completion):
        return event({
            "choices": [{"index": 0, "text": "x"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": completion},
        })  # fmt: skip

    request = one_request([(0, chunk_with(2)), (0.01, chunk_with(5)), (0, DONE)])
    assert request.completion_tokens == 5


def test_a_role_sent_ahead_is_no_token():
    script = [
        (0, delta(role="assistant", content="")),
        (0.08, delta(content="4")),
        (0.01, delta(content="2")),
        (0, usage(completion=2) + DONE),
    ]
    request = one_request(script, endpoint="chat")
    assert request.text == "42"
    assert len(request.chunk_s) == 2
    assert request.ttft_s >= 0.08


@pytest.mark.parametrize("empty", [{}, {"content": ""}, {"content": None, "tool_calls": []}])
def test_an_empty_delta_ahead_is_no_first_token(empty):
    script = [
        (0, delta(role="assistant", content="") + delta(**empty)),
        (0.08, delta(content="4")),
        (0.01, delta(content="")),  # a token whose text is held back, or not shown
        (0.01, delta(content="2")),
        (0, usage(completion=3) + DONE),
    ]
    request = one_request(script, endpoint="chat")
    assert len(request.chunk_s) == 3
    assert request.ttft_s >= 0.08


def test_an_empty_delta_with_a_token_is_a_first_token():
    held_back = event({"choices": [{"index": 0, "delta": {"content": ""}, "token_ids": [7]}]})
    script = [(0, held_back), (0.08, delta(content="4")), (0, usage(completion=2) + DONE)]
    request = one_request(script, endpoint="chat")
    assert len(request.chunk_s) == 2
    assert request.ttft_s < 0.08


@pytest.mark.parametrize(
    "said",
    [
        {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": ""}}]},
        {"function_call": {"arguments": "{"}},
        {"reasoning": "so"},
        {"reasoning_content": "so"},
        {"refusal": "no"},
        {"content": "4"},
    ],
)
def test_every_kind_of_output_is_a_token_though_each_chunk_names_the_role(said):
    script = [
        *((0.02, delta(role="assistant", **said)) for _ in range(3)),
        (0, usage(completion=3) + DONE),
    ]
    request = one_request(script, endpoint="chat")
    assert request.error is None
    assert len(request.chunk_s) == 3


@pytest.mark.parametrize("end", [b"data: [DONE]", b"data: [DONE]\n", b"data:[DONE]\r\n"])
@pytest.mark.parametrize("blank", [b"\n", b""])
def test_done_ends_a_stream_without_blank_lines_too(end, blank):
    script = [(0, chunk()), (0, usage(completion=1).removesuffix(b"\n") + blank + end)]
    request = one_request(script)
    assert request.error is None
    assert (request.text, request.completion_tokens) == ("a", 1)


def test_an_event_that_is_cut_off_at_the_end_is_none():
    request = one_request([(0, chunk()), (0, usage().removesuffix(b"\n"))])
    assert "without [DONE]" in request.error


def test_comments_other_fields_and_carriage_returns_are_understood():
    data = b": ping\r\n\r\nevent: x\r\nid: 3\r\n" + chunk().replace(b"\n", b"\r\n")
    request = one_request([(0, data), (0, usage(completion=1).replace(b"data: ", b"data:") + DONE)])
    assert request.error is None
    assert len(request.chunk_s) == 1
    assert request.tpot_s is None


BROKEN = {
    "http_429": [429, b'{"error": {"message": "slow down"}}'],
    "http_500": [500, b"oops"],
    "reset": [(0, chunk()), (0.05, RESET)],
    "timeout": [(0, chunk()), (0, WAIT)],
    "server_error": [(0, chunk()), (0, event({"error": {"message": "out of memory"}}))],
    "aborted": [*answer()[:-1], (0, chunk(finish_reason="abort") + usage() + DONE)],
    "empty": [],
    "no_token": [(0, DONE)],
    "no_usage": [(0, chunk() + DONE)],
}
SERVER_ERRORS = {
    "vLLM's": event({"error": {"message": "out of memory", "code": 500}}),
    "an error as object": event({"object": "error", "message": "out of memory"}),
    "an error in words": event({"error": "out of memory"}),
    "an error's event": b"event: error\n" + event({"message": "out of memory"}),
    "an error's event in words": b"event:error\r\ndata: out of memory\r\n\r\n",
    "an error's event after its data": b"data: out of memory\nevent: error\n\n",
    "a reason": chunk(text="out of memory", finish_reason="error") + usage() + DONE,
}
MALFORMED = {
    "not JSON": [(0, b"data: {\n\n"), (0, DONE)],
    "no object": [(0, b"data: 3\n\n"), (0, DONE)],
    "no choices": [(0, event({"id": 3})), (0, DONE)],
    "no text": [(0, event({"choices": [{"index": 0}]})), (0, DONE)],
    "no end": [(0, chunk() + usage())],
    "no stream": [(0, b'{"choices": [{"text": "a"}]}')],
    "comments alone": [(0, b": ping\n\n")],
    "not gzip": [500, b"oops", b"Content-Encoding: gzip\r\n"],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_failures_are_counted_by_kind(kind):
    request = one_request(list(BROKEN[kind]), timeout_s=0.3 if kind == "timeout" else 30.0)
    assert request.error_kind == kind, request.error
    assert request.error


@pytest.mark.parametrize("what", SERVER_ERRORS)
def test_errors_within_the_stream_are_the_servers(what):
    request = one_request([(0, chunk() + SERVER_ERRORS[what])])
    assert request.error_kind == "server_error", request.error
    assert "{" not in request.error  # its words, not its JSON
    assert what == "a reason" or request.error == "out of memory"


def test_the_name_of_an_event_is_that_of_one_event():
    named = b"event: ping\ndata: [DONE]\n\n"
    unnamed = b"event: error\n\n"  # without data it is no event, and names none
    script = [(0, chunk() + unnamed + chunk() + usage(completion=2) + named)]
    assert one_request(script).error is None


def test_an_answer_of_which_one_choice_was_aborted_is_aborted():
    ends = [chunk(finish_reason=reason) for reason in ("stop", "abort", "length")]
    request = one_request([(0, b"".join(ends) + usage() + DONE)])
    assert (request.error_kind, request.finish_reason) == ("aborted", "abort")


def test_an_aborted_answer_without_an_end_is_aborted():
    assert one_request([(0, chunk(finish_reason="abort"))]).error_kind == "aborted"


@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls", "content_filter"])
def test_answers_that_end_in_another_way_are_whole(reason):
    request = one_request([(0, chunk(finish_reason=reason) + usage() + DONE)])
    assert (request.error, request.finish_reason) == (None, reason)


def test_what_is_no_stream_is_shown():
    request = one_request([(0, b'{"choices": [{"text": "a"}]}')])
    assert '{"choices"' in request.error


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_streams_are_told(what):
    request = one_request(list(MALFORMED[what]))
    assert request.error_kind == "malformed", request.error


def test_a_connection_closed_in_the_middle_is_a_reset():
    assert one_request([(0, chunk()), (0.05, CLOSE)]).error_kind == "reset"


def test_the_run_goes_on_after_every_failure():
    scripts = [*map(list, BROKEN.values()), *map(list, MALFORMED.values()), answer()]
    with serving(lambda number, body: list(scripts[number])) as server:
        one = run(server, conversations(len(scripts)), timeout_s=BUSY_S)
    summary = latency.summarize(one.requests, one.duration_s)
    assert (summary.completed, summary.failed) == (1, len(scripts) - 1)
    assert summary.errors == {"malformed": len(MALFORMED), **dict.fromkeys(BROKEN, 1)}
    assert summary.total_output_tokens == 4
