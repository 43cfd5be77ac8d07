"""Compares traces with HF's routing in processes beside the load."""

from __future__ import annotations

import asyncio
import collections
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from benchmarks.faults.served import judge
from benchmarks.fidelity.reference import reference_model
from moescope import formats

_BATCH = 250
"""Responses that go to a process at once: many begin alike, and the reference knows them then."""


class Judge:
    """Takes traces and counts what is right and wrong.

    Args:
        workers: Processes; each has the reference, and computes with one thread.
    """

    def __init__(self, workers: int) -> None:
        self._pool = ProcessPoolExecutor(workers, get_context("spawn"), _prepare)
        self._batch: list[bytes] = []
        self.counts: collections.Counter[str] = collections.Counter()
        """See `benchmarks.faults.served.judge`."""

    async def take(self, npz: bytes) -> None:
        """Take a response of ``GET /routes/{id}?format=npz``.

        Who fills a batch waits until it is compared: where the processes are behind, clients send
        less, and no more than a batch a client is held.
        """
        self._batch.append(npz)
        if len(self._batch) >= _BATCH:
            await self.finish()

    async def finish(self) -> None:
        """Compare what is left."""
        batch, self._batch = self._batch, []
        loop = asyncio.get_running_loop()
        self.counts += await loop.run_in_executor(self._pool, _judge, batch)

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(cancel_futures=True)


def _prepare() -> None:
    torch.set_num_threads(1)
    reference_model()


def _judge(batch: list[bytes]) -> collections.Counter[str]:
    return judge([trace for npz in batch for trace in formats.load_npz(npz)])
