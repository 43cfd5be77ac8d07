"""Needs an NVIDIA GPU; skipped, with the reason, where there is none."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

with warnings.catch_warnings():  # torch's and vLLM's own, at their import
    warnings.simplefilter("ignore")
    import vllm.model_executor.layers.fused_moe.router.router_factory  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.filterwarnings("default"))  # torch.compile has its own
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))
