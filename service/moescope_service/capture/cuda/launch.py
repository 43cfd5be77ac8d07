"""Launches a Triton kernel without the JIT's work, which takes longer than the launch itself.

Relies on Triton 3.6 and 3.7, ``compiler/compiler.py``: ``CompiledKernel.run``, called as
``CompiledKernel.__getitem__`` calls it; pointers may be integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


class KernelLauncher:
    """A kernel over rows that is compiled once, for tensors that stay where they are.

    Args:
        kernel: The ``triton.jit`` function; it takes the tensors, then 32-bit integers that it does
            not specialize on, the second of them the number of rows, then the constants.
        tensors: Aligned to 16 bytes; held, for the kernel is given their addresses alone.
        num_scalars: How many integers.
        constants: In the kernel's order; see `kernels.pack_blocks`.
    """

    def __init__(
        self,
        kernel: Any,
        tensors: Sequence[torch.Tensor],
        num_scalars: int,
        constants: Mapping[str, int],
    ) -> None:
        # Held: Triton 3.7 unloads a kernel's code with its last reference.
        self._kernel = compiled = kernel.warmup(
            *(tensor.dtype for tensor in tensors), *[2] * num_scalars, grid=(1,), **constants
        )
        compiled._init_handles()
        self._run = compiled.run
        # Launch metadata and hooks, for profilers of Triton's own, are None.
        self._handles = (compiled.function, compiled.packed_metadata, None, None, None)
        self._tensors = tuple(tensors)
        self._pointers = [tensor.data_ptr() for tensor in tensors]
        self._constants = tuple(constants.values())
        self._block_rows = constants["BLOCK_ROWS"]
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, first: int, num_rows: int, *more: int) -> torch.cuda.Stream:
        """Launch behind the model's kernels, on their stream.

        Args:
            first: The kernel's first integer.
            num_rows: Its second.
            more: The others.

        Returns:
            The stream that was current at the first launch, in the worker's thread.
        """
        if self._stream is None:  # by the first step the worker's thread has set it for good
            self._stream = torch.cuda.current_stream()
        self._run(
            -(-num_rows // self._block_rows),
            1,
            1,
            self._stream.cuda_stream,
            *self._handles,
            *self._pointers,
            first,
            num_rows,
            *more,
            *self._constants,
        )
        return self._stream
