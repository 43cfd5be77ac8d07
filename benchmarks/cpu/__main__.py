"""Measures what needs no GPU, on a machine that does nothing else: ``python -m benchmarks.cpu``.

Raw results go to ``--out``, what may be committed of them to ``summaries`` in it.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from pathlib import Path

from benchmarks import plan
from benchmarks.plan import Entry
from moescope.errors import CommandError

PLAN = Path(__file__).with_name("plan.toml")


def entries(out: Path) -> list[Entry]:
    """Return what plan.toml says.

    Args:
        out: Where the results go.
    """
    return [
        Entry(
            name=one["name"],
            about=one["about"],
            commands=[[word.format(out=out) for word in words] for words in one["commands"]],
            raw=out / one.get("raw", f"{one['name']}.json"),
            summary=out / "summaries" / f"{one['name']}.json",
            environment=one.get("environment", {}),
        )
        for one in tomllib.loads(PLAN.read_text())["entry"]
    ]


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="The directory of the results.")
    parser.add_argument("--only", action="append", metavar="NAME", help="Repeat; all by default.")
    parser.add_argument("--list", action="store_true", help="Show the commands; run none.")
    args = parser.parse_args()
    try:
        for entry in plan.pick(entries(args.out), args.only):
            if args.list:
                plan.show(entry)
            else:
                plan.run(entry)
    except CommandError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
