"""Makes the table and the picture of what the capture costs on a GPU.

``python -m tests.bench.overhead_table RESULT.json … [--readme README.md] [--picture FILE.png]``

The result files are those of ``python -m tests.gpu.measure --part throughput``. The table is
printed, and replaces what stands between the two markers of the README; a picture is drawn.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from moescope.errors import FormatError
from moescope.overhead import plot
from moescope.overhead.arms import BUILT_IN, DEFAULT, MOESCOPE, STOCK, STOCK_AGAIN
from tests.gpu.loads import ENGINE_ITL, WALL, Workload, workloads

BEGIN, END = "<!-- overhead: begin -->", "<!-- overhead: end -->"
WITHIN, UNCLEAR, MISSED = "within", "not distinguishable", "missed"
NONE, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
MIN_ROUNDS = 3
"""Sittings that were cut off before this many rounds of a load say nothing of it."""
NOTES = """\
Positive is slower: *engine* is the mean time between tokens on the clock of vLLM's engine (its
`vllm:inter_token_latency_seconds`), *client* the wall time per token as the client has it, HTTP and
streams included. Medians of stock; 95% intervals of paired rounds, none narrower than what the two
stock servers of the same sitting differ by. The verdict is of the bold one. *Within*: the whole
interval is at most the target, or it excludes zero and its mean is at most the target. *Missed*: it
excludes zero, and its mean is above the target. *Not distinguishable* from zero: all others."""


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A load, and what the latest sitting with each arm measured under it."""

    workload: Workload
    by_arm: Mapping[str, Mapping[str, Any]]
    """What the file holds of that sitting, by arm."""

    def difference(self, arm: str, metric: str | None = None) -> Mapping[str, Any] | None:
        """Return how an arm differs from stock, as `comparison.Difference.as_json` has it.

        Args:
            arm: The arm.
            metric: In what; by default in that in which the arms are compared under the load.

        Returns:
            None where it was not measured.
        """
        if arm not in self.by_arm:
            return None
        found: Mapping[str, Any] = self.by_arm[arm]["differences"][arm]
        return found.get(metric or self.workload.compared)


def read(paths: Iterable[Path]) -> tuple[list[Row], dict[str, Any]]:
    """Read result files.

    Returns:
        Rows in the order of the loads, and all sittings by name.

    Raises:
        FormatError: A file has no sittings, or none that tells anything, or a load is none of those
            there are.
    """
    found: dict[str, dict[str, Any]] = {}
    sittings: dict[str, Any] = {}
    for path in paths:
        values = orjson.loads(path.read_bytes())
        if "loads" not in values:
            raise FormatError(f"{path} holds no loads by sitting: measure it anew")
        sittings |= values["sittings"]
        for name, by_sitting in values["loads"].items():
            found[name] = {**found.get(name, {}), **by_sitting}
    places = {name: place_of(name) for name in found}
    rows = [
        Row(dataclasses.replace(workloads()[places[name]], name=name), latest(found[name]))
        for name in sorted(found, key=lambda name: (places[name], name))
    ]
    rows = [row for row in rows if row.by_arm]
    if not rows:
        raise FormatError(f"no sitting has {MIN_ROUNDS} rounds of stock vLLM and another arm")
    return rows, sittings


def place_of(name: str) -> int:
    """Return which of all workloads a name is of; other concurrencies are named at its end.

    Raises:
        FormatError: There is none.
    """
    for place, one in enumerate(workloads()):
        if name == one.name or name.startswith(f"{one.name}, "):
            return place
    raise FormatError(f"{name!r} is none of the loads of tests.gpu.loads")


def latest(by_sitting: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the latest sitting of each arm, by arm; of the second stock arm that of moescope.

    Sittings whose first arm is not stock vLLM do not count, nor those of too few rounds.
    """
    chosen: dict[str, Mapping[str, Any]] = {}
    for name in sorted(by_sitting):  # they are dates
        measured = by_sitting[name]
        if next(iter(measured["arms"])) == STOCK and measured["rounds"] >= MIN_ROUNDS:
            chosen |= dict.fromkeys(measured["differences"], measured)
    if MOESCOPE in chosen:
        chosen.pop(STOCK_AGAIN, None)
        if STOCK_AGAIN in chosen[MOESCOPE]["differences"]:
            chosen[STOCK_AGAIN] = chosen[MOESCOPE]
    return {name: chosen[name] for name in BUILT_IN if name in chosen}


def verdict(difference: Mapping[str, Any], target_percent: float) -> str:
    """Return whether a difference is within the target; see `NOTES`."""
    low, high = difference["claim_percent"]
    if high <= target_percent:
        return WITHIN
    if low <= 0.0 <= high:
        return UNCLEAR
    return WITHIN if difference["percent"] <= target_percent else MISSED


def make_table(rows: Sequence[Row], sittings: Mapping[str, Any]) -> str:
    """Return the table of capture, and beneath it that of other arms where there are any."""
    lines = _table(
        (
            *("load", "stock", "engine: stock again", "engine: moescope"),
            *("client: stock again", "client: moescope", "target", "verdict", "host µs a step"),
        ),
        [_cells(row) for row in rows if MOESCOPE in row.by_arm],
    )
    others = [
        arm for arm in BUILT_IN if arm not in DEFAULT and any(arm in row.by_arm for row in rows)
    ]
    if others:
        cells = [
            [row.workload.name, *(_change(row.difference(arm)) for arm in others)]
            for row in rows
            if not row.by_arm.keys().isdisjoint(others)
        ]
        lines += ["", *_table(("load", *others), cells)]
    return "\n".join([*lines, "", f"{_where(sittings)} {_lost(rows)}", NOTES])


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def _cells(row: Row) -> list[str]:
    difference = row.difference(MOESCOPE)
    assert difference is not None
    host_us = row.by_arm[MOESCOPE]["arms"][MOESCOPE]["host_us_per_step"]
    target = row.workload.target_percent
    return [
        row.workload.name,
        _stock(row),
        *(
            _change(row.difference(arm, metric), bold=metric == row.workload.compared)
            for metric in (ENGINE_ITL, WALL)
            for arm in (STOCK_AGAIN, MOESCOPE)
        ),
        f"{target:g}%",
        verdict(difference, target),
        NONE if host_us is None else f"{host_us:.0f}",
    ]


def _stock(row: Row) -> str:
    value = row.by_arm[MOESCOPE]["arms"][STOCK]["median"][row.workload.shown]
    unit = {
        "engine_itl_ms": f"{value:.2f} ms a token",
        "output_throughput": f"{value:,.0f} tokens/s",
        "prompt_throughput": f"{value:,.0f} prompt tokens/s",
    }
    return unit[row.workload.shown]


def _change(difference: Mapping[str, Any] | None, *, bold: bool = False) -> str:
    """Return a difference with the interval that is claimed of it."""
    if difference is None:
        return NONE
    low, high = difference["claim_percent"]
    percent = f"{difference['percent']:+.1f}%"
    text = f"{f'**{percent}**' if bold else percent} [{low:+.1f}, {high:+.1f}]"
    return text.replace("-", MINUS)


def _where(sittings: Mapping[str, Any]) -> str:
    """Return on what and when it was measured."""
    models = sorted({one["model"] for one in sittings.values()})
    gpus = sorted({_device(one["hardware"]) for one in sittings.values()})
    vllms = sorted({one["versions"]["vllm"] for one in sittings.values()})
    dates = sorted({one["date"][:10] for one in sittings.values()})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{', '.join(models)} on {', '.join(gpus)}, vLLM {', '.join(vllms)}, {when}."


def _lost(rows: Sequence[Row]) -> str:
    """Return how many rows the capture took, and how many it lost."""
    arms = [row.by_arm[MOESCOPE]["arms"][MOESCOPE] for row in rows if MOESCOPE in row.by_arm]
    captured, lost = (sum(one[key] for one in arms) for key in ("rows_captured", "rows_lost"))
    return f"Rows captured meanwhile: {captured:,}; lost: {lost:,}."


def _device(hardware: Mapping[str, Any]) -> str:
    return str(hardware.get("gpu") or hardware["cpu"]).partition(",")[0]


def replace_block(text: str, table: str) -> str:
    """Return a text with the table between its markers.

    Raises:
        FormatError: It has not each of the markers once, in their order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in after or END in after:
        raise FormatError(f"the markers {BEGIN} and {END} are wanted, once each")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def draw(path: Path, rows: Sequence[Row], sittings: Mapping[str, Any]) -> None:
    """Draw the differences of all arms, a row a load."""
    differences: dict[str, dict[str, Any]] = {}
    for arm in BUILT_IN:
        found = {row.workload.name: row.difference(arm) for row in rows}
        if any(found.values()):
            differences[arm] = {name: one for name, one in found.items() if one}
    plot.draw_rows(
        path,
        differences,
        {row.workload.name: row.workload.name for row in rows},
        xlabel="slower than stock by percent, paired rounds",
        title=_where(sittings).rstrip("."),
    )


def main() -> None:
    """Make what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--readme", type=Path, help="Replace the table in this file.")
    parser.add_argument("--picture", type=Path, help="The PNG to write.")
    args = parser.parse_args()
    rows, sittings = read(args.results)
    table = make_table(rows, sittings)
    print(table)
    if args.readme:
        args.readme.write_text(replace_block(args.readme.read_text(), table))
    if args.picture:
        draw(args.picture, rows, sittings)


if __name__ == "__main__":
    main()
