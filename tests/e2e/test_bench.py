"""The load test against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from moescope.bench import workload
from moescope.bench.connections import Target
from moescope.bench.driver import Pace, Run
from moescope.bench.record import Record
from moescope.bench.workload import Ask, Conversation, Endpoint
from moescope.servers import Server

from .conftest import API_KEY, MODEL


def load(
    server: Server, conversations: Sequence[Conversation], endpoint: Endpoint
) -> list[list[Record]]:
    """Return by conversation the records of its turns."""
    run = Run(
        conversations,
        Ask(model=MODEL, endpoint=endpoint, ignore_eos=True),
        Target(base_url=server.url, api_key=API_KEY, timeout_s=120.0),
        Pace(max_concurrency=4),
    )
    asyncio.run(run.go())
    assert [record.error for record in run.records if record.error] == []
    by_conversation: list[list[Record]] = [[] for _ in conversations]
    for record in run.records:
        by_conversation[record.conversation].append(record)
    return by_conversation


def test_conversations_of_random_tokens_have_the_lengths_asked_for(eager_server: Server) -> None:
    conversations = workload.random_tokens(
        num_conversations=6, turns=3, input_len=40, output_len=7, prefix_len=5
    )
    for records in load(eager_server, conversations, "completions"):
        assert [record.turn for record in records] == [0, 1, 2]
        assert [record.completion_tokens for record in records] == [7] * 3
        assert [record.prompt_tokens for record in records] == [45, 45 + 47, 45 + 2 * 47]
        assert all(len(record.token_ids or ()) == 7 for record in records)


def test_chats_grow_by_what_was_said(eager_server: Server) -> None:
    texts = ["Tom has 3 apples.", "He buys 4 more.", "How many has he now?"]
    conversations = workload.from_texts(texts, num_conversations=2, turns=3, max_tokens=5)
    for records in load(eager_server, conversations, "chat"):
        lengths = [record.prompt_tokens for record in records]
        assert lengths == sorted(lengths)
        assert lengths[1] > lengths[0] + 5
        assert [record.completion_tokens for record in records] == [5] * 3
        assert all(1 <= len(record.chunk_s) <= 5 for record in records)
        assert all(record.tpot_s and record.finish_reason == "length" for record in records)
