"""Requests that end early, or whose routes are not kept, and the capture held for a while."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from moescope import RouteTrace, Source
from moescope.errors import RequestNotFoundError
from tests.fidelity.bundled import Tally
from tests.fidelity.situations.served import (
    BLOCK,
    MODEL,
    Served,
    check_tokens,
    random_prompt,
)
from tests.waiting import wait_until


@contextlib.contextmanager
def streamed(
    served: Served, prompt: list[int], request_id: str, **asked: Any
) -> Iterator[Iterator[str]]:
    """Stream a completion under an id of ours; leaving aborts it."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 1023 - len(prompt), "temperature": 0,
            "ignore_eos": True, "stream": True, **asked}  # fmt: skip
    url, headers = f"{served.server.url}/v1/completions", {"X-Request-Id": request_id}
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as response:
        yield (line for line in response.iter_lines() if line)


def aborted(served: Served, request_id: str) -> RouteTrace | None:
    """Return the trace of a request that was left; None where it ended before anybody noticed."""
    (trace,) = served.routes(request_id)
    return trace if trace.finish_reason == "abort" else None


def test_aborts_in_decode(default_server: Served, rng: np.random.Generator) -> None:
    tally, found = Tally("aborts in decode"), 0
    for number in range(30):
        with streamed(default_server, random_prompt(rng, 70), f"decode-{number}") as lines:
            for _ in range(5 * (found + 1)):
                next(lines)
        trace = aborted(default_server, f"decode-{number}")
        if trace is not None:
            found += 1
            assert trace.prompt_len < trace.num_tokens < 1023
            tally.add(trace)
        if found == 3:
            break
    assert found == 3, "requests ended before they could be aborted"
    tally.record()


def test_aborts_in_prefill(default_server: Served, rng: np.random.Generator) -> None:
    """What was routed before the abort is there; what was not is missing, and not "lost"."""
    tally = Tally("aborts in prefill")
    before = missing_rows(default_server)
    never_routed, found = 0, 0
    for number in range(30):
        name = f"prefill-{number}"
        with streamed(default_server, random_prompt(rng, 1000), name):
            wait_until(lambda name=name: default_server.spans(name), "the first chunk")
        trace = aborted(default_server, name)
        if trace is None:
            continue
        routed = int(trace.present.sum())
        assert trace.present[:routed].all(), "there is a hole"
        found += 0 < routed < 999
        if trace.num_tokens == 1000:
            never_routed += trace.num_rows - routed
            if routed:
                tally.add(rows_of(trace, routed))
        if found >= 2:
            break
    assert found >= 2, "every request was through its prompt before it could be aborted"
    after = missing_rows(default_server)
    assert after.pop("not_routed") - before.pop("not_routed") == never_routed
    assert after == before, "rows that were never routed count as lost"
    tally.record()


def rows_of(trace: RouteTrace, count: int) -> RouteTrace:
    """Return a trace's first rows alone, as a trace of so many tokens and one more."""
    assert trace.token_ids is not None
    return dataclasses.replace(
        trace, topk_ids=trace.topk_ids[:count],
        topk_weights=None if trace.topk_weights is None else trace.topk_weights[:count],
        source=trace.source[:count], token_ids=trace.token_ids[: count + 1], num_tokens=count + 1,
        prompt_len=min(trace.prompt_len, count + 1),
        complete=True,
    )  # fmt: skip


def missing_rows(served: Served) -> dict[str, float]:
    """Return how many rows of finished traces are missing, by cause."""
    causes = ("not_captured", "queue_full", "paused", "hook_missed", "overwritten", "not_routed",
              "unknown")  # fmt: skip
    name = "moescope_trace_rows_missing_total"
    return {cause: served.metric(name, cause=cause) for cause in causes}


def test_aborts_in_the_queue(default_server: Served, rng: np.random.Generator) -> None:
    """A request that was never scheduled has a trace without a row."""
    for number in range(10):
        busy, queued = f"busy-{number}", f"queued-{number}"
        # As many samples as the engine runs at once.
        with streamed(default_server, random_prompt(rng, 9), busy, n=8, temperature=1) as lines:
            next(lines)
            with streamed(default_server, random_prompt(rng, 50), queued):
                wait_until(
                    # Where the front end is slow, the busy ones end before it has their turn.
                    lambda: (
                        default_server.metric("vllm:num_requests_waiting")
                        or default_server.spans(queued)  # noqa: B023
                    ),
                    "it waits its turn",
                )
            trace = aborted(default_server, queued)
        assert len(default_server.routes(busy)) == 8  # they end before what comes next
        if trace is not None and not default_server.spans(queued):
            break
    assert trace is not None, "every request ended before it could be aborted"
    assert not default_server.spans(queued)
    assert (trace.num_tokens, trace.coverage, trace.complete) == (50, 0.0, False)


def test_opting_out_spoils_no_other_trace(default_server: Served, rng: np.random.Generator) -> None:
    """The rows of a request whose routes are not kept are there for those that share blocks."""
    tally = Tally("opt-out")
    prompt = random_prompt(rng, 4 * BLOCK + 5)
    wishes = ({"headers": {"X-Moescope": "off"}}, {"vllm_xargs": {"moescope": "off"}})
    for number, wish in enumerate(wishes):
        tail = [500 + number] * 10
        hidden = default_server.complete(prompt + tail, **wish)
        with pytest.raises(RequestNotFoundError):
            default_server.client.routes(hidden["id"])
        response = default_server.complete(prompt + tail)
        (trace,) = default_server.routes(response["id"])
        check_tokens([trace], response)
        assert trace.cached_len == 4 * BLOCK
        assert (trace.source == Source.CACHED).sum() == 4 * BLOCK
        tally.add(trace)
    tally.record()


def probe(served: Served, rng: np.random.Generator) -> RouteTrace:
    """Return the trace of a short request."""
    (trace,) = served.routes(served.complete(random_prompt(rng, 4), max_tokens=1)["id"])
    return trace


def test_pause(default_server: Served, rng: np.random.Generator) -> None:
    """Rows of meanwhile are missing, in traces that find them in the prefix cache as well."""
    tally = Tally("pause: rows of meanwhile are missing")
    client = default_server.client
    before, shared, during = (random_prompt(rng, 3 * BLOCK + 1) for _ in range(3))
    whole = default_server.complete(before + shared[:-1])
    tally.add(*default_server.routes(whole["id"]))
    with ThreadPoolExecutor() as pool:
        running = pool.submit(
            default_server.complete, shared, {"X-Request-Id": "over"}, max_tokens=800
        )
        wait_until(
            lambda: any(span.start > 3 * BLOCK + 20 for span in default_server.spans("over")),
            "the request runs",
        )
        assert client.pause() == "paused"
        assert not default_server.metric("moescope_capture_on")
        wait_until(lambda: not probe(default_server, rng).present.any(), "the worker pauses")
        paused = default_server.complete(during, max_tokens=8)
        assert client.resume() == "on"
        (over,) = default_server.routes(running.result()["id"])
    (silent,) = default_server.routes(paused["id"])
    assert silent.num_rows == 3 * BLOCK + 8
    lost = int((~over.present).sum())
    assert 0 < lost < over.num_rows - over.prompt_len, "the pause is no hole in the trace"
    assert over.present[: over.prompt_len].all()
    tally.add(over, missing=lost)
    tally.add(silent, missing=silent.num_rows)
    # What was computed during the pause is missing for those that reuse it, and for them alone.
    for prompt, missing in ((during, 3 * BLOCK), (shared, 0), (random_prompt(rng, 50), 0)):
        response = default_server.complete(prompt)
        (trace,) = default_server.routes(response["id"])
        check_tokens([trace], response)
        assert trace.cached_len == (3 * BLOCK if len(prompt) > 50 else 0)
        tally.add(trace, missing=missing)
    tally.record()
