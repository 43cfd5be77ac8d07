"""An independent oracle of `capture.control.ControlEncoder`: a simulated step as a message.

It shares no code with the encoder and is written another way, from what the messages mean: from the
scheduler's output alone, a step at a time, without generations of blocks or what a new collector is
told. ``tests/contract/test_recorder.py`` holds both to the same messages on random schedules, and
``test_engine.py`` takes this one, so that an error of the encoder and one of the reassembler cannot
cancel out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.simulation.engine import Output, truth
from moescope_service.messages import Admission, CaptureSpec, Step


class SimEncoder:
    """Gives each sequence a small integer and numbers the steps."""

    def __init__(self, spec: CaptureSpec) -> None:
        self.spec = spec
        self.next_step = 0
        self._handles: dict[str, int] = {}
        self._free: list[int] = []

    def encode(self, output: Output, lost: str | None = None, version: int = 0) -> Step:
        step = Step(number=self.next_step, time_s=0.0, hook_s=0.0, spans=np.empty((0, 3), np.int32))
        self.next_step += 1
        for name in output.finished_req_ids:
            handle = self._handles.pop(name, None)
            if handle is None:
                step.finished_unseen.append(name)
            else:
                step.finished.append(handle)
        self._free += step.finished
        for new in output.scheduled_new_reqs:
            computed = new.num_computed_tokens
            step.admitted.append(
                self._admission(new.req_id, new.prompt_len, computed, new.block_ids)
            )
        cached = output.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[i]
            if name in cached.resumed_req_ids:
                step.resumed.append(self._admission(name, 0, cached.num_computed_tokens[i], blocks))
            elif blocks is not None:
                step.grown.append((self._handles[name], blocks[0]))
        copies = output.kv_cache_block_copies or ()
        step.block_copies = [(copy.src_block_id, copy.dst_block_id) for copy in copies]
        if output.batch:
            spans = [(self._handles[seq.name], start, count) for seq, start, count in output.batch]
            step.spans = np.array(spans, np.int32)
            step.weights_version = version
            self._add_rows(step, output, lost)
        return step

    def _add_rows(self, step: Step, output: Output, lost: str | None) -> None:
        step.lost, version = lost, step.weights_version
        if lost is None:
            hashes = [h for seq, start, n in output.batch for h in seq.row_hashes(start, n)]
            step.topk_ids, step.topk_weights = truth(hashes, self.spec, version)

    def _admission(self, name: str, prompt_len: int, num_cached: int, blocks: Any) -> Admission:
        handle = self._handles.get(name)
        if handle is None:
            handle = self._free.pop() if self._free else len(self._handles)
            self._handles[name] = handle
        return Admission(handle, name, prompt_len, num_cached, list(blocks[0]))
