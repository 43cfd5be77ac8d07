"""What ``moescope analyze`` takes for a million rows: ``python -m benchmarks.cpu.analyze``.

Random traces of 94 layers, 128 experts and top-8 as ``.npz`` or Parquet files; then the command, a
process of its own, with its wall time, processor time and the most memory that it held. With
``--diff`` that is ``moescope diff`` of them and of the same with other experts in some rows.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import result
from moescope import formats
from moescope.trace import RouteTrace

NUM_LAYERS, NUM_EXPERTS, TOP_K = 94, 128, 8
VOCABULARY = 151_936
_TRACE_ROWS, _FILE_ROWS = 500, 10_000
_CHANGED = 0.05


def trace(number: int, random: np.random.Generator, pool: npt.NDArray[Any]) -> RouteTrace:
    """Return a trace: experts from a pool of random choices, tokens as words are distributed.

    Args:
        number: The request's number.
        random: Where choices come from.
        pool: Expert ids, ``[num, top_k]``; the first ones are chosen more often.
    """
    shape = (_TRACE_ROWS, NUM_LAYERS)
    chosen = (random.random(shape) ** 2 * len(pool)).astype(np.int64)
    weights = random.random((*shape, TOP_K), np.float32)
    tokens = np.minimum(random.zipf(1.2, _TRACE_ROWS + 1), VOCABULARY) - 1
    return RouteTrace(
        request_id=f"chatcmpl-{number}",
        index=0,
        model="random",
        num_experts=NUM_EXPERTS,
        num_hidden_layers=NUM_LAYERS,
        layers=np.arange(NUM_LAYERS, dtype=np.int32),
        topk_ids=pool[chosen],
        topk_weights=(weights / weights.sum(axis=-1, keepdims=True)).astype(np.float16),
        source=np.zeros(_TRACE_ROWS, np.uint8),
        token_ids=tokens.astype(np.int32),
        prompt_len=_TRACE_ROWS // 2,
        num_tokens=_TRACE_ROWS + 1,
        cached_len=0,
        finish_reason="length",
        complete=True,
        created_s=0.0,
    )


def with_other_experts(trace: RouteTrace) -> RouteTrace:
    """Return a trace with another expert in some rows and layers."""
    random = np.random.default_rng(list(trace.request_id.encode()))
    ids = trace.topk_ids.copy()
    some = random.random(ids.shape[:2]) < _CHANGED
    unused = np.argmin((ids[some, :, None] == np.arange(TOP_K + 1)).any(axis=1), axis=1)
    ids[some, -1] = unused
    return dataclasses.replace(trace, topk_ids=ids)


def write(folder: Path, num_rows: int, kind: str, *, changed: bool = False) -> int:
    """Write files of traces, the same or with other experts; return their bytes."""
    folder.mkdir()
    random = np.random.default_rng(0)
    pool = np.argsort(random.random((4096, NUM_EXPERTS)), axis=1)[:, :TOP_K].astype(np.uint8)
    size_bytes, number = 0, 0
    for file in range(-(-num_rows // _FILE_ROWS)):
        traces = [trace(number + one, random, pool) for one in range(_FILE_ROWS // _TRACE_ROWS)]
        number += len(traces)
        if changed:
            traces = [with_other_experts(one) for one in traces]
        if kind == "npz":
            data = formats.dump_npz(traces)
        else:
            from moescope import arrow

            data = arrow.dump_parquet(traces)
        (folder / f"{file:04}.{kind}").write_bytes(data)
        size_bytes += len(data)
    return size_bytes


def measure(command: str, folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Run a command of moescope; return what it took."""
    arguments = [sys.executable, "-m", "moescope", command, *map(str, folders), "--out", str(out)]
    started_s = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)  # of this process alone
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} exited with {process.returncode}")
    return {
        "wall_s": time.perf_counter() - started_s,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_memory_bytes": usage.ru_maxrss * 1024,
    }


def main() -> None:
    """Measure, print and write."""
    parser = result.parser(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kind", choices=("npz", "parquet"), default="npz")
    parser.add_argument("--diff", action="store_true", help="measure moescope diff")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / name for name in ("a", "b")[: 1 + args.diff]]
        size_bytes = sum(
            write(one, args.rows, args.kind, changed=place > 0) for place, one in enumerate(folders)
        )
        found = measure("diff" if args.diff else "analyze", folders, Path(folder) / "out")
    result.write(
        args.out,
        "benchmarks.cpu.analyze",
        rows=args.rows,
        shape={"layers": NUM_LAYERS, "experts": NUM_EXPERTS, "top_k": TOP_K},
        files=args.kind,
        files_bytes=size_bytes,
        **found,
    )
    print(
        f"{args.rows:,} rows in {args.kind} files of {size_bytes / 1e9:.1f} GB: "
        f"{found['wall_s']:.1f} s, {found['cpu_s']:.1f} s of processor time, at most "
        f"{found['peak_memory_bytes'] / 1e9:.2f} GB of memory"
    )


if __name__ == "__main__":
    main()
