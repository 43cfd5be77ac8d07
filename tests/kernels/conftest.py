"""The capture's Triton kernels: on the GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

import warnings

import pytest
import torch

with warnings.catch_warnings():  # torch's and vLLM's own, at their import
    warnings.simplefilter("ignore")
    import vllm.model_executor.layers.fused_moe.router.fused_topk_router  # noqa: F401


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton reads it with every call, too."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
