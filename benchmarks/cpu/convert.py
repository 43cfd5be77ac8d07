"""What ``moescope convert`` takes for a million rows: ``python -m benchmarks.cpu.convert``.

The traces of `benchmarks.cpu.analyze` as ``.npz``, to one file of each other format that is named;
wall time, processor time and the most memory that each command held.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks import result
from benchmarks.cpu.analyze import NUM_EXPERTS, NUM_LAYERS, TOP_K, measure, write


def main() -> None:
    """Measure, print and write."""
    parser = result.parser(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--to", nargs="+", default=["parquet", "arrow", "npz"])
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        traces, out = Path(folder) / "traces", Path(folder) / "out"
        traces.mkdir()
        size_bytes = write(traces, args.rows, "npz")
        for form in args.to:
            path = out.with_suffix(f".{form}")
            found[form] = measure("convert", [traces], path) | {"file_bytes": path.stat().st_size}
            path.unlink()
    result.write(
        args.out,
        "benchmarks.cpu.convert",
        rows=args.rows,
        shape={"layers": NUM_LAYERS, "experts": NUM_EXPERTS, "top_k": TOP_K},
        files_bytes=size_bytes,
        to=found,
    )
    for form, one in found.items():
        print(
            f"{args.rows:,} rows of {size_bytes / 1e9:.1f} GB to {form} of "
            f"{one['file_bytes'] / 1e9:.1f} GB: {one['wall_s']:.1f} s, {one['cpu_s']:.1f} s of "
            f"processor time, at most {one['peak_memory_bytes'] / 1e9:.2f} GB of memory"
        )


if __name__ == "__main__":
    main()
