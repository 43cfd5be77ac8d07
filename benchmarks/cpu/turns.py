"""What the routes of a conversation take on the wire: ``python -m benchmarks.cpu.turns``.

A conversation of 20 turns in the shape of Qwen1.5-MoE-A2.7B (24 layers, top-4, float16 weights),
128 new tokens a turn, each turn a request with all tokens before. After each turn its routes are
fetched: the whole conversation, or by ``start`` the rows alone that are not here yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx

from benchmarks import result
from benchmarks.cpu.fetch import received, served
from benchmarks.cpu.traffic import PREFILL, Load
from moescope import Client

TURNS = 20
NEW_TOKENS = 128
"""A turn."""
LOAD = Load(
    name="turns", concurrency=1, prompt_len=NEW_TOKENS - 1, output_len=1, growth=NEW_TOKENS,
    steps_per_s=PREFILL.steps_per_s,
)  # fmt: skip
FORMATS = {
    "json": ("json", "identity"),
    "json, gzip": ("json", "gzip"),
    "npz": ("npz", "identity"),
    "npy": ("npy", "identity"),
    "arrow": ("arrow", "identity"),
}
"""The format, and the encoding that the client takes."""


def starts(ids: Sequence[str], *, whole: bool) -> dict[str, int]:
    """Return the first row that is wanted of each turn: the last token of a turn has none yet."""
    return {one: 0 if whole else max(turn * NEW_TOKENS - 1, 0) for turn, one in enumerate(ids)}


def num_rows(url: str, wanted: dict[str, int]) -> int:
    """Fetch every turn; return how many rows came."""
    with Client(url) as client:
        return sum(
            trace.num_rows
            for request_id, start in wanted.items()
            for trace in client.routes(request_id, start=start, wait_s=10)
        )


def num_bytes(url: str, wanted: dict[str, int], form: str, encoding: str) -> int:
    """Fetch every turn in a format; return the bytes of the bodies."""
    with httpx.Client(headers={"Accept-Encoding": encoding}, timeout=60.0) as http:
        return sum(
            received(http, "GET", f"{url}/routes/{one}", params={"format": form, "start": start})
            for one, start in wanted.items()
        )


def measure(url: str, ids: Sequence[str]) -> dict[str, Any]:
    """Fetch the conversation in both ways and all formats."""
    ways = {"whole": starts(ids, whole=True), "start": starts(ids, whole=False)}
    rows = {way: num_rows(url, wanted) for way, wanted in ways.items()}
    if rows["start"] != TURNS * NEW_TOKENS - 1:
        raise RuntimeError(f"{rows['start']} rows of {TURNS * NEW_TOKENS - 1} came by start")
    return {
        "turns": TURNS,
        "new_tokens": TURNS * NEW_TOKENS,
        "rows": rows,
        "bytes_per_new_token": {
            name: {
                way: num_bytes(url, wanted, *form) / (TURNS * NEW_TOKENS)
                for way, wanted in ways.items()
            }
            for name, form in FORMATS.items()
        },
    }


def main() -> None:
    """Measure, print and write."""
    args = result.parser(__doc__).parse_args()
    with served(LOAD, TURNS) as (url, ids, _):
        figures = measure(url, ids)
    result.write(args.out, "benchmarks.cpu.turns", **figures)
    print(args.out.read_text())


if __name__ == "__main__":
    main()
