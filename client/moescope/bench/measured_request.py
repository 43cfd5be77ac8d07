"""One request of a load test, as the client measured it."""

from __future__ import annotations

import dataclasses
import itertools


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRequest:
    """One request: when it was sent, what came back and when.

    Times are seconds; those named after the run's start count from it, all others from sending.
    """

    conversation: int = 0
    """Which conversation it is of, from 0."""
    turn: int = 0
    """Which turn of that, from 0."""
    due_s: float
    """When it was due, since the run's start: by the schedule, or when its slot became free."""
    queue_s: float = 0.0
    """How long it then waited for a free slot, where an open loop is bounded too."""
    sent_s: float
    """When it was sent, since the run's start."""
    chunk_s: list[float]
    """When each token chunk was read, since it was sent."""
    e2el_s: float
    """End-to-end latency: from sending to the last token chunk, or to the failure."""
    prompt_tokens: int = 0
    """By the server's usage, like the next one."""
    completion_tokens: int = 0
    text: str = ""
    token_ids: list[int] | None = None
    """The output's token ids; None where the server does not send them."""
    finish_reason: str | None = None
    error_kind: str | None = None
    """``http_429`` and other statuses, ``connect``, ``reset``, ``timeout``, ``transport``,
    ``server_error`` (sent within the stream), ``aborted`` (by the server), ``empty``, ``no_token``,
    ``no_usage``, ``malformed``; None: the response is whole."""
    error: str | None = None
    """What went wrong, in words."""

    @property
    def lag_s(self) -> float:
        """How much later than its schedule the client sent it; waiting for a slot is no lag."""
        return self.sent_s - self.due_s - self.queue_s

    @property
    def ttft_s(self) -> float:
        """Time to the first token: from sending to the first token chunk."""
        return self.chunk_s[0]

    @property
    def itls_s(self) -> list[float]:
        """Inter-token latencies: the gaps between token chunks, however many tokens they hold."""
        return [after - before for before, after in itertools.pairwise(self.chunk_s)]

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first, by the usage's count; None for one token."""
        if self.completion_tokens < 2:
            return None
        return (self.e2el_s - self.ttft_s) / (self.completion_tokens - 1)
