"""The load test against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from benchmarks.simulation.server import API_KEY, MODEL
from moescope.bench import workload
from moescope.bench.connections import Target
from moescope.bench.driver import Pace, Run
from moescope.bench.measured_request import MeasuredRequest
from moescope.bench.workload import Conversation, Endpoint, RequestOptions
from moescope.servers import Server


def load(
    server: Server, conversations: Sequence[Conversation], endpoint: Endpoint
) -> list[list[MeasuredRequest]]:
    """Return by conversation the requests of its turns."""
    run = Run(
        conversations,
        RequestOptions(model=MODEL, endpoint=endpoint, ignore_eos=True),
        Target(base_url=server.url, api_key=API_KEY, timeout_s=120.0),
        Pace(max_concurrency=4),
    )
    asyncio.run(run.go())
    assert [request.error for request in run.requests if request.error] == []
    by_conversation: list[list[MeasuredRequest]] = [[] for _ in conversations]
    for request in run.requests:
        by_conversation[request.conversation].append(request)
    return by_conversation


def test_conversations_of_random_tokens_have_the_lengths_asked_for(eager_server: Server) -> None:
    conversations = workload.random_tokens(
        num_conversations=6, turns=3, input_len=40, output_len=7, prefix_len=5
    )
    for requests in load(eager_server, conversations, "completions"):
        assert [request.turn for request in requests] == [0, 1, 2]
        assert [request.completion_tokens for request in requests] == [7] * 3
        assert [request.prompt_tokens for request in requests] == [45, 45 + 47, 45 + 2 * 47]
        assert all(len(request.token_ids or ()) == 7 for request in requests)


def test_chats_grow_by_what_was_said(eager_server: Server) -> None:
    texts = ["Tom has 3 apples.", "He buys 4 more.", "How many has he now?"]
    conversations = workload.from_texts(texts, num_conversations=2, turns=3, max_tokens=5)
    for requests in load(eager_server, conversations, "chat"):
        lengths = [request.prompt_tokens for request in requests]
        assert lengths == sorted(lengths)
        assert lengths[1] > lengths[0] + 5
        assert [request.completion_tokens for request in requests] == [5] * 3
        assert all(1 <= len(request.chunk_s) <= 5 for request in requests)
        assert all(request.tpot_s and request.finish_reason == "length" for request in requests)
