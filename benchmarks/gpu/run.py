"""Measures all that needs a GPU, or one sitting of it: ``python -m benchmarks.gpu.run --out DIR``.

What is measured stands in plan.toml. Raw results go to ``--out``, what may be committed of them to
``summaries`` in it; in the end the overhead tables are printed, and their picture is drawn.
Flags of vLLM for every server stand after ``--``::

    python -m benchmarks.gpu.run --model shape --gsm8k test.jsonl --gate-scale 1e5 --out runs/gpu \
        --only one_server -- --load-format dummy
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plan
from benchmarks.gpu import overhead_table
from benchmarks.plan import Entry
from moescope.errors import CommandError

PLAN = Path(__file__).with_name("plan.toml")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What all sittings have in common."""

    out: Path
    model: str | None = None
    """The plan's where None."""
    options: Sequence[str] = ()
    """Of `benchmarks.gpu.measure`."""
    flags: Sequence[str] = ()
    """Of vLLM, beside the plan's."""


def entries(asked: Asked) -> list[Entry]:
    """Return the sittings of plan.toml."""
    values = tomllib.loads(PLAN.read_text())
    return [
        Entry(
            name=one["name"],
            about=one["about"],
            commands=[["benchmarks.gpu.measure", *_arguments(one, values, asked)]],
            raw=asked.out / one["file"],
            summary=asked.out / "summaries" / one["file"],
        )
        for one in values["sitting"]
    ]


def _arguments(sitting: Mapping[str, Any], values: Mapping[str, Any], asked: Asked) -> list[str]:
    """Return the arguments of `benchmarks.gpu.measure` for a sitting."""
    repeated = {"part": "parts", "load": "loads", "arm": "arms"}
    single = ("placement", "rounds", "stream_interval")
    arguments = ["--model", asked.model or values["model"], *asked.options]
    for option, key in repeated.items():
        for value in sitting.get(key, ()):
            arguments += [f"--{option}", value]
    for key in single:
        if key in sitting:
            arguments += [f"--{key.replace('_', '-')}", str(sitting[key])]
    gib = values["kv_cache"][sitting["kv_cache"]]["gib"]
    arguments += ["--kv-cache-gib", str(gib), "--out", str(asked.out / sitting["file"])]
    return [*arguments, "--", *values["flags"], *sitting.get("flags", ()), *asked.flags]


def tables(picked: Sequence[Entry], out: Path) -> None:
    """Print the overhead tables of the sittings that have loads; draw their picture."""
    measured = {one.summary for one in picked if "throughput" in one.commands[0]}
    if measured:
        rows, sittings = overhead_table.read(sorted(measured))
        print(overhead_table.make_tables(rows, sittings))
        overhead_table.draw(out / "overhead.png", rows, sittings)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="The directory of the results.")
    parser.add_argument("--only", action="append", metavar="NAME", help="Repeat; all by default.")
    parser.add_argument("--list", action="store_true", help="Show the commands; run none.")
    parser.add_argument("--model", help="The model's directory or name; the plan's by default.")
    parser.add_argument("--gsm8k", help="GSM8K's test.jsonl; the hub by default.")
    parser.add_argument("--gate-scale", help="For --load-format dummy: sharpens the gates; 1e5.")
    parser.add_argument("flags", nargs="*", help="After --: flags of vLLM for every server.")
    return parser


def main() -> None:
    """Run what is asked for."""
    args = _options().parse_args()
    given = {"--gsm8k": args.gsm8k, "--gate-scale": args.gate_scale}
    asked = Asked(
        out=args.out,
        model=args.model,
        options=[word for name, value in given.items() if value for word in (name, value)],
        flags=args.flags,
    )
    try:
        picked = plan.pick(entries(asked), args.only)
        for entry in picked:
            if args.list:
                plan.show(entry)
            else:
                plan.run(entry)
    except CommandError as error:
        sys.exit(str(error))
    if not args.list:
        tables(picked, args.out)


if __name__ == "__main__":
    main()
