"""Which sink a worker gets, by its device and the settings."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch

from moescope_service.capture.cpu.counts import CpuCounts
from moescope_service.capture.cpu.sink import CpuSink
from moescope_service.capture.cuda import counts, sink
from moescope_service.capture.routers import RoutedLayer
from moescope_service.capture.sinks import make_sink
from moescope_service.settings import Settings

LAYERS = [
    RoutedLayer(number, SimpleNamespace(top_k=2), num_experts=8, index_dtype=torch.int32)
    for number in (1, 3)
]


def made(device_type, mode):
    positions = torch.arange(16)
    return make_sink(
        LAYERS, device_type, Settings(mode=mode), positions=positions, id_dtype="uint8",
        own_rows=None,
    )  # fmt: skip


@pytest.mark.parametrize(("mode", "kind"), [("routes", CpuSink), ("counts", CpuCounts)])
def test_on_the_cpu(mode, kind):
    assert type(made("cpu", mode)) is kind


@pytest.mark.parametrize(
    ("mode", "module", "name"), [("routes", sink, "CudaSink"), ("counts", counts, "CudaCounts")]
)
def test_on_the_gpu_it_gets_what_it_takes(mode, module, name, monkeypatch):
    kind = create_autospec(getattr(module, name))  # refuses arguments that the class does not take
    monkeypatch.setattr(module, name, kind)
    assert made("cuda", mode) is kind.return_value
    given = kind.call_args.kwargs
    assert (given["num_layers"], given["top_k"], given["num_experts"]) == (2, 2, 8)
    assert given["index_dtype"] is torch.int32
