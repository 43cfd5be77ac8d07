"""Ships each step's rows to the collector.

`Recorder` runs on the worker's thread and takes notes only; the link's thread does the rest:
waiting for the rows, handles, control, encoding, sending.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Collection
from typing import Any

from moescope_service.addresses import Address
from moescope_service.capture.control import ControlEncoder, NewSequence, StepMessage
from moescope_service.capture.loads import read_notes
from moescope_service.capture.rows import Batch, PendingRows, StepSink
from moescope_service.capture.weights import WeightsVersion
from moescope_service.link import Link
from moescope_service.messages import CaptureSpec, Frames, pack_introduction, unpack
from moescope_service.processes import Process

_MAX_CONTROL_BYTES = 64 * 2**20
_MAX_UNTOLD = 65536
"""Ended sequences of messages that the link did not take, at most; the next message names them.

The collector is not told of the others' end: it waits 300 s for it.
"""


def _copied(block_ids: tuple[list[int], ...]) -> tuple[list[int], ...]:
    return tuple(map(list, block_ids))


class Recorder:
    """Takes each step's rows and sends them; never blocks the worker's thread.

    Args:
        address: Where the collector is bound.
        spec: What this worker captures.
        sink: Holds the rows of the step that runs.
        read_batch: Returns, right after a step, which sequence has which rows; None: no model ran.
        encoder: Makes messages of steps.
        weights: Knows which weights compute them.
        max_rows_bytes: Rows that may wait to be sent; beyond it rows are dropped and counted.
        cores: Where the link's thread may run; see `Link`.
    """

    def __init__(
        self,
        address: Address | str,
        spec: CaptureSpec,
        *,
        sink: StepSink,
        read_batch: Callable[[], Batch | None],
        encoder: ControlEncoder,
        weights: WeightsVersion,
        max_rows_bytes: int,
        cores: Collection[int] | None = None,
    ) -> None:
        self._spec = spec
        self._sink = sink
        self._read_batch = read_batch
        self._encoder = encoder
        self._weights = weights
        self._max_rows_bytes = max_rows_bytes
        self._is_capturing = True
        self._process = str(Process.current())
        self._next_step = 0
        self._hook_s = 0.0
        self._untold: collections.deque[str] = collections.deque(maxlen=_MAX_UNTOLD)
        self._link = Link(
            address,
            self._on_message,
            max_bytes=max_rows_bytes + _MAX_CONTROL_BYTES,
            name="moescope-recorder",
            encode=encoder.pack,
            join=True,
            introduce=self._introduce,
            cores=cores,
        )

    def start_step(self, scheduler_output: Any) -> None:
        """Prepare for a step; called on the worker's thread before the model runs.

        Sends at once which sequences have ended: all their rows were put before, and the step that
        begins may take long. So it does which blocks are loaded, even where the step has no tokens.
        """
        started_s = time.perf_counter()
        self._sink.start_step()
        loaded, filled = read_notes(scheduler_output)
        if scheduler_output.total_num_scheduled_tokens:
            filled = []  # they go with the blocks that the step allocates
        if scheduler_output.finished_req_ids or self._untold or loaded or filled:
            message = self._message()
            message.finished = [*self._untold, *scheduler_output.finished_req_ids]
            message.loaded, message.filled = loaded, filled
            self._untold.clear()
            if not self._link.put(message):
                self._untold.extend(message.finished)
        self._hook_s += time.perf_counter() - started_s

    def record_step(self, scheduler_output: Any) -> None:
        """Take the rows of the step that just ran; called on the worker's thread."""
        if not scheduler_output.total_num_scheduled_tokens:
            return
        started_s = time.perf_counter()
        message = self._message()
        _note_control(message, scheduler_output)
        message.filled = read_notes(scheduler_output).filled
        message.batch = self._read_batch()
        if message.batch is not None:
            message.rows = self._take_rows(int(message.batch.first_row[-1]))
        message.weights_version = self._weights.of_step()
        is_large = self._link.waiting_bytes > self._max_rows_bytes // 4
        if not self._link.put(message, at_once=is_large):
            message.discard()
        self._hook_s += time.perf_counter() - started_s

    def tell_weights(self, number: int) -> None:
        """Tell that the weights have changed; called on the worker's thread.

        Rows of before may be asked for before the next step runs.
        """
        message = self._message()
        message.weights_version = number
        self._link.put(message)

    def close(self) -> None:
        """Send what waits and stop."""
        self._link.close()

    def _message(self) -> StepMessage:
        message = StepMessage(self._next_step, time.time(), self._hook_s)
        self._next_step += 1
        self._hook_s = 0.0  # the hook time of this step is sent with the next message
        return message

    def _take_rows(self, num_rows: int) -> PendingRows | str:
        if not self._is_capturing:
            return "paused"
        if self._link.waiting_bytes > self._max_rows_bytes:
            return "queue_full"
        return self._sink.take(num_rows)

    def _introduce(self) -> list[Frames]:
        is_capturing, worker_state = self._is_capturing, self._encoder.worker_state()
        introduction = pack_introduction(
            self._spec,
            is_capturing=is_capturing,
            worker_state=worker_state,
            process=self._process,
        )
        return [introduction]

    def _on_message(self, frames: Frames) -> None:
        kind, values = unpack(frames)
        if kind == "capture":
            self._is_capturing = bool(values["on"])


def _note_control(message: StepMessage, scheduler_output: Any) -> None:
    # Only what control needs: a scheduler output also holds prompts and images. Block tables
    # are copied: the model runner keeps these very lists and lets them grow.
    if scheduler_output.scheduled_new_reqs:
        message.new = [
            NewSequence(new.req_id, new.prompt_len, new.num_computed_tokens, _copied(new.block_ids))
            for new in scheduler_output.scheduled_new_reqs
        ]
    message.cached = cached = scheduler_output.scheduled_cached_reqs
    if cached.resumed_req_ids:
        blocks = [ids and _copied(ids) for ids in cached.new_block_ids]
        message.cached = dataclasses.replace(cached, new_block_ids=blocks)
    message.block_copies = scheduler_output.kv_cache_block_copies or ()
