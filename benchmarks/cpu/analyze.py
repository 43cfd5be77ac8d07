"""What ``moescope analyze`` takes for a million rows: ``python -m benchmarks.cpu.analyze``.

Random traces of 94 layers, 128 experts and top-8 as ``.npz`` or Parquet files; then the command, a
process of its own, with its wall time, processor time and the most memory that it held.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
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


def write(folder: Path, num_rows: int, kind: str) -> int:
    """Write files of traces; return their bytes."""
    random = np.random.default_rng(0)
    pool = np.argsort(random.random((4096, NUM_EXPERTS)), axis=1)[:, :TOP_K].astype(np.uint8)
    size_bytes, number = 0, 0
    for file in range(-(-num_rows // _FILE_ROWS)):
        traces = [trace(number + one, random, pool) for one in range(_FILE_ROWS // _TRACE_ROWS)]
        number += len(traces)
        if kind == "npz":
            data = formats.dump_npz(traces)
        else:
            from moescope import arrow

            data = arrow.dump_parquet(traces)
        (folder / f"{file:04}.{kind}").write_bytes(data)
        size_bytes += len(data)
    return size_bytes


def measure(name: str, folder: Path, out: Path) -> dict[str, Any]:
    """Run a command on a folder of traces; return what it took."""
    command = [sys.executable, "-m", "moescope", name, str(folder), "--out", str(out)]
    started_s = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)  # of this process alone
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {process.returncode}")
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
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        traces, out = Path(folder) / "traces", Path(folder) / "out"
        traces.mkdir()
        size_bytes = write(traces, args.rows, args.kind)
        found = measure("analyze", traces, out)
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
