"""The four layouts of data-parallel routing that vLLM's own capturer lists."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import forward_context
from vllm.distributed import parallel_state

from moescope_service.capture.cpu.sink import CpuSink
from moescope_service.capture.own_rows import OwnRows
from moescope_service.capture.rows import StepRows

TOKENS = [5, 3, 4]
"""Of three data-parallel ranks, padding included."""


def routing(num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.arange(num_rows)[:, None]
    return rows.repeat(1, 2), rows.repeat(1, 2) / 64


@pytest.fixture
def in_step(monkeypatch: pytest.MonkeyPatch) -> Any:
    def enter(local_sizes: list[int] | None = None, *, has_metadata: bool = True) -> None:
        metadata = SimpleNamespace(
            num_tokens_across_dp_cpu=torch.tensor(TOKENS), local_sizes=local_sizes
        )
        context = SimpleNamespace(dp_metadata=metadata if has_metadata else None)
        monkeypatch.setattr(forward_context, "get_forward_context", lambda: context)

    return enter


@pytest.mark.parametrize(("rank", "own"), [(0, range(5)), (1, range(5, 8)), (2, range(8, 12))])
def test_all_ranks_tokens_one_rank_after_the_other(in_step: Any, rank: int, own: range) -> None:
    in_step()
    ids, weights = OwnRows(rank, 1)(*routing(sum(TOKENS)))
    assert ids[:, 0].tolist() == list(own)
    assert (weights[:, 0] * 64).tolist() == list(own)


def test_the_own_tokens_alone(in_step: Any) -> None:
    in_step()
    assert OwnRows(1, 1).span(3) == slice(0, 3)


def test_shards_of_all_ranks_gathered(in_step: Any) -> None:
    in_step([3, 3, 2, 2, 2, 2])  # two tensor-parallel workers a rank; the first two pad
    for rank, first in enumerate((0, 6, 10)):
        ids, _ = OwnRows(rank, 2)(*routing(14))
        assert ids[:, 0].tolist() == list(range(first, first + TOKENS[rank]))


def test_a_shard_of_the_own_tokens_is_gathered(
    in_step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_step()
    halves = {0: routing(6)[0][:3], 1: routing(6)[0][3:]}

    def all_gather(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        assert dim == 0
        return torch.cat([tensor, halves[1].to(tensor.dtype)])

    group = SimpleNamespace(all_gather=all_gather)
    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: group)
    ids, _ = OwnRows(0, 2)(halves[0], halves[0] / 64)
    assert ids[:, 0].tolist() == list(range(6))  # the last one is padding


def test_without_other_ranks_all_rows_are_own(in_step: Any) -> None:
    in_step(has_metadata=False)
    assert OwnRows(0, 1).span(7) == slice(0, 7)


def test_rows_of_an_unknown_layout_are_lost_and_it_is_told_once(
    in_step: Any, caplog: pytest.LogCaptureFixture
) -> None:
    in_step()
    own_rows = OwnRows(0, 1)
    sink = CpuSink(
        positions=torch.arange(12), num_layers=1, top_k=2, id_dtype="uint8",
        weights_dtype="float16", own_rows=own_rows,
    )  # fmt: skip
    for _ in range(2):
        sink.start_step()
        sink.write(0, *routing(7))
        assert sink.take(5) == "hook_missed"
    (record,) = caplog.records
    assert re.search(r"7 rows.*\[5, 3, 4\].*hook_missed", record.getMessage())
    sink.start_step()
    sink.write(0, *routing(12))
    rows = sink.take(5)
    assert isinstance(rows, StepRows)
    assert rows.topk_ids[:, 0, 0].tolist() == [*range(5)]
