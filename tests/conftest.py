"""Triton chooses its interpreter when it and its kernels are imported: before any other import.

What the tests start does not inherit the choice.
"""

from __future__ import annotations

import contextlib
import warnings

import pytest

with (
    warnings.catch_warnings(),  # torch's own, at its import
    pytest.MonkeyPatch.context() as patch,
    contextlib.suppress(ModuleNotFoundError),  # the light environment has no torch
):
    warnings.simplefilter("ignore")
    import torch

    if not torch.cuda.is_available():
        patch.setenv("TRITON_INTERPRET", "1")
    import moescope_service.capture.cuda.kernels  # noqa: F401
