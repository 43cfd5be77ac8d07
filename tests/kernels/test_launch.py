"""A compiled kernel is launched over all rows, with its arguments in their order."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch

from moescope_service.capture.cuda.launch import KernelLauncher

CONSTANTS = {"TOP_K": 4, "ENTRIES": 96, "BLOCK_ROWS": 8, "BLOCK_ENTRIES": 128}


class Kernel:
    """What stands in for a ``triton.jit`` function and what it compiles to."""

    function, packed_metadata = "function", "metadata"

    def warmup(self, *args, grid, **constants):
        self.compiled_for = args, constants
        return self

    def _init_handles(self):
        self.is_loaded = True

    def run(self, *args):
        assert self.is_loaded
        self.launched = args


@pytest.mark.parametrize(("num_rows", "num_programs"), [(1, 1), (8, 1), (9, 2), (64, 8)])
def test_a_kernel_is_launched(num_rows, num_programs, monkeypatch):
    stream = SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    tensors = torch.zeros(4, dtype=torch.int32), torch.zeros(4)
    kernel = Kernel()
    launcher = KernelLauncher(kernel, tensors, 3, CONSTANTS)
    assert kernel.compiled_for == ((torch.int32, torch.float32, 2, 2, 2), CONSTANTS)
    assert launcher(30, num_rows, 500) is stream
    pointers = [tensor.data_ptr() for tensor in tensors]
    grid, context = (num_programs, 1, 1), (77, "function", "metadata", None, None, None)
    assert kernel.launched == (*grid, *context, *pointers, 30, num_rows, 500, 4, 96, 8, 128)


def test_the_compiled_kernel_and_its_tensors_live_as_long_as_their_launcher():
    class Compiled:
        function, packed_metadata, run = "function", "metadata", staticmethod(lambda *_: None)

        def _init_handles(self):
            pass

    compiled, tensors = [Compiled()], [torch.zeros(4)]
    alive = [weakref.ref(one) for one in (*compiled, *tensors)]
    kernel = SimpleNamespace(warmup=lambda *_, **__: compiled.pop())
    launcher = KernelLauncher(kernel, tensors, 2, CONSTANTS)
    tensors.clear()
    assert None not in [one() for one in alive]
    del launcher
    assert [one() for one in alive] == [None, None]
