"""Routes as trainers read them that replay the experts of inference (routing replay, R3).

One function a trainer, from a trace to what it reads. The arrays have an axis of all the model's
layers, by their numbers, zero in layers without experts; so take traces of all captured layers. A
trace that begins at a later row (``client.routes(id, start=…)``) gives those rows alone, where the
trainer takes a start. What each wants was read in its source; ``docs/training.md`` says where.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import numpy.typing as npt

from moescope import formats
from moescope.errors import FormatError
from moescope.trace import RouteTrace


def vllm(trace: RouteTrace) -> str:
    """Return ``choices[].routed_experts`` of vLLM's responses: a ``.npy`` in base64.

    ``[num_tokens - 1 - start, num_hidden_layers, top_k]``, uint8 up to 256 experts, else uint16.
    vime (vLLM's fork of slime) reads this.

    Raises:
        FormatError: A row is missing, which it cannot say, or left out at the end.
    """
    return _base64(formats.dump_npy(_whole(trace, "vLLM's array")))


def slime(trace: RouteTrace) -> dict[str, Any]:
    """Return the fields of slime's ``meta_info``: SGLang's, int32 without a header in base64.

    ``[num_tokens - 1 - start, num_hidden_layers, top_k]``. slime puts the rows behind the first
    ``routed_experts_start_len`` of those that it has of the sequence.

    Raises:
        FormatError: A row is missing, which it cannot say, or left out at the end.
    """
    array = formats.routed_experts(_whole(trace, "slime"), dtype=np.int32)
    return {"routed_experts": _base64(array), "routed_experts_start_len": trace.start}


def prime_rl(trace: RouteTrace) -> dict[str, Any]:
    """Return prime-rl's ``routed_experts``: bytes without a header in base64, and what they are.

    ``[num_tokens - 1 - start, num_hidden_layers, top_k]``, uint8 unless an id is above 255, else
    uint16. A later turn starts at the last row of the one before, which was not routed then: take
    ``client.routes(id, start=len(prompt) + len(completion) - 1)`` of that turn's tokens.

    Raises:
        FormatError: A row is missing, which it cannot say, or left out at the end.
    """
    array = formats.routed_experts(_whole(trace, "prime-rl"), dtype=np.uint16)
    if array.max(initial=0) < 2**8:
        array = array.astype(np.uint8)
    return {
        "data": _base64(array),
        "shape": list(array.shape),
        "start": trace.start,
        "dtype": array.dtype.name,
    }


def nemo_rl(trace: RouteTrace) -> npt.NDArray[Any]:
    """Return the routes for NeMo-RL's alignment: the trainer's own router decides missing rows.

    ``[num_tokens - 1, num_hidden_layers, top_k]``, int8 up to 128 experts, else int16, or int32
    above 32,768. Every expert of a missing row is -1.

    Raises:
        FormatError: The trace does not begin at row 0, or rows are left out at the end.
    """
    if trace.start:
        raise FormatError(
            f"the rows of {trace.request_id!r} begin at {trace.start}, and NeMo-RL takes whole "
            "sequences: fetch them from row 0"
        )
    _check_end(trace)
    dtype = np.int8 if trace.num_experts <= 2**7 else None
    return formats.routed_experts(trace, dtype=dtype, fill=-1)


def nemo_gym(trace: RouteTrace) -> str:
    """Return ``message.routed_experts`` of NeMo-RL's Gym: dtype, shape, and bytes in base64.

    As `nemo_rl`, with a last row more for the token that was never routed: experts 0, 1, 2 …, which
    NeMo-RL replaces by the next turn's.

    Raises:
        FormatError: As of `nemo_rl`.
    """
    array = nemo_rl(trace)
    last = np.broadcast_to(np.arange(trace.top_k, dtype=array.dtype), (1, *array.shape[1:]))
    array = np.concatenate([array, last])
    shape = "x".join(map(str, array.shape))
    return f"nrlre1:{array.dtype.name}:{shape}:{_base64(array)}"


def _whole(trace: RouteTrace, reader: str) -> RouteTrace:
    """Check that nothing is missing or left out at the end."""
    _check_end(trace)
    num_missing = int((~trace.present).sum())
    if num_missing or not trace.complete:
        raise FormatError(
            f"{num_missing} of {trace.num_rows} rows of {trace.request_id!r}, index {trace.index}, "
            f"are missing, and {reader} cannot say so: it would replay expert 0; leave the sample "
            "out"
        )
    return trace


def _check_end(trace: RouteTrace) -> None:
    end, expected = trace.start + trace.num_rows, max(trace.num_tokens - 1, 0)
    if end != expected:
        raise FormatError(
            f"the rows of {trace.request_id!r} end at {end}, not at {expected}: this is a page; "
            "Client joins them"
        )


def _base64(content: bytes | npt.NDArray[Any]) -> str:
    if isinstance(content, np.ndarray):
        content = content.tobytes()
    return base64.b64encode(content).decode()
