"""Twenty turns of some conversations: each row of them is fetched once, by its start."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import httpx
import numpy as np
import pytest
from vllm.v1.engine import FinishReason

from moescope import AsyncClient, Client, RouteTrace, arrow, formats
from moescope.batch import RoutesBatch

from .deployment import Deployment
from .fake_engine import OUTPUT, rows_of

TURNS = 20
NEW_TOKENS = (3, 4, 7)
"""Further prompt tokens a turn, of each conversation."""
IDS = [f"talk-{number}" for number in range(len(NEW_TOKENS))]
"""Of the conversations; a turn's request has its number behind it."""


@pytest.fixture(scope="module")
def tokens(deployment: Deployment) -> dict[str, list[int]]:
    """Run all turns; return each conversation's tokens."""
    tokens: dict[str, list[int]] = {one: [] for one in IDS}
    for turn in range(TURNS):
        for number, one in enumerate(IDS):
            tokens[one] += range(turn, turn + NEW_TOKENS[number])
            (name,) = deployment.frontend.add(f"{one}-{turn}", prompt=tokens[one])
            running = deployment.engine.start(name, list(tokens[one]))
            for _ in OUTPUT[1:]:
                deployment.engine.step([(running, 1)])
            deployment.frontend.put(name, OUTPUT, FinishReason.STOP)
            deployment.engine.step(finished=[running])
            tokens[one] += OUTPUT
    return tokens


def check(parts: list[RouteTrace], tokens: list[int]) -> None:
    """Check that the parts are all rows of a conversation and its tokens, once."""
    ends = [0, *np.cumsum([part.num_rows for part in parts]).tolist()]
    assert [part.start for part in parts] == ends[:-1]
    assert ends[-1] == len(tokens) - 1
    ids, weights = rows_of(0, len(tokens) - 1)
    np.testing.assert_array_equal(np.concatenate([part.topk_ids for part in parts]), ids)
    np.testing.assert_array_equal(np.concatenate([part.topk_weights for part in parts]), weights)
    got = np.concatenate([part.token_ids[: part.num_rows] for part in parts])
    assert [*got.tolist(), parts[-1].token_ids[-1]] == tokens


def fetched(fetch: Callable[[Mapping[str, int]], RoutesBatch]) -> dict[str, list[RouteTrace]]:
    """Fetch every turn of all conversations in one batch, each from the first row it lacks."""
    parts: dict[str, list[RouteTrace]] = {one: [] for one in IDS}
    for turn in range(TURNS):
        starts = {f"{one}-{turn}": sum(part.num_rows for part in parts[one]) for one in IDS}
        batch = fetch(starts)
        for one in IDS:
            parts[one] += batch.traces[f"{one}-{turn}"]
    return parts


def test_batches_with_a_start_by_id(client: Client, tokens: dict[str, list[int]]) -> None:
    parts = fetched(lambda starts: client.routes_batch([*starts], start=starts, wait_s=5))
    for one in IDS:
        check(parts[one], tokens[one])


def test_batches_of_the_asynchronous_client(
    deployment: Deployment, tokens: dict[str, list[int]]
) -> None:
    async def fetch(starts: Mapping[str, int]) -> RoutesBatch:
        async with AsyncClient(deployment.url) as client:
            return await client.routes_batch([*starts], start=starts, wait_s=5)

    parts = fetched(lambda starts: asyncio.run(fetch(starts)))
    for one in IDS:
        check(parts[one], tokens[one])


def from_json(answer: httpx.Response) -> list[RouteTrace]:
    return [formats.from_dict(one) for one in answer.json()["traces"]]


def from_arrow(answer: httpx.Response) -> list[RouteTrace]:
    pyarrow = pytest.importorskip("pyarrow")
    return arrow.from_table(pyarrow.ipc.open_stream(answer.content).read_all())


@pytest.mark.parametrize(
    ("form", "read"),
    [
        ("json", from_json),
        ("npz", lambda answer: formats.load_npz(answer.content)),
        ("arrow", from_arrow),
    ],
)
def test_one_by_one(
    deployment: Deployment, tokens: dict[str, list[int]], form: str, read: Callable
) -> None:
    parts: list[RouteTrace] = []
    for turn in range(TURNS):
        start = sum(part.num_rows for part in parts)
        params = {"format": form, "start": start, "wait_s": 5}
        answer = deployment.http.get(f"/routes/{IDS[0]}-{turn}", params=params)
        parts += read(answer.raise_for_status())
    check(parts, tokens[IDS[0]])
