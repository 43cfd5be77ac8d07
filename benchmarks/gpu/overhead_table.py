"""Makes the tables and the picture of what the capture costs on a GPU.

``python -m benchmarks.gpu.overhead_table RESULT.json … [--page FILE.md] [--picture FILE.png]``

The results are those of ``benchmarks.gpu.measure --part throughput``, or their summaries. Tables
are printed, and replace what stands between the two markers of a page; a picture is drawn.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from benchmarks.gpu.loads import ENGINE_ITL, Workload, workloads
from benchmarks.gpu.one_server import DETACHED, DETACHED_AGAIN
from moescope.errors import FormatError
from moescope.overhead import plot
from moescope.overhead.arms import AGAIN, BUILT_IN, MOESCOPE, STOCK

BEGIN, END = "<!-- overhead: begin -->", "<!-- overhead: end -->"
WITHIN, OPEN, MISSED = "within", "open", "missed"
NONE, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
ARMS = (DETACHED, DETACHED_AGAIN, *BUILT_IN)
CAPTIONS = {
    DETACHED: "One server, whose capture is taken off its worker and put back between passes:",
    STOCK: "Servers of their own, of one start each; starts of equal servers can differ by more "
    "than these intervals:",
}
"""By the arm that others are compared with."""
MIN_ROUNDS = 3
"""Sittings that were cut off before this many rounds of a load say nothing of it."""
NOTES = """\
Positive is slower. Compared is the client's median time per output token where tokens are decoded
(batch 1, 64 and 256 concurrent, GSM8K), else its wall time; *engine* is the mean time between
tokens on the clock of vLLM's engine (its `vllm:inter_token_latency_seconds`), with neither HTTP nor
the client in it; *hook* is what the capture takes of the worker's thread. 95% intervals of paired
rounds; where the first arm was measured again in the same sitting, none is narrower than what the
two differ by. A target is met (*within*) or *missed* where the whole interval says so, else it is
*open*. Of sittings with the same arms the latest complete one is shown; the files have all."""


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A load, and what the latest sitting with each arm measured under it."""

    workload: Workload
    first: str
    """The arm that the others are compared with."""
    by_arm: Mapping[str, Mapping[str, Any]]
    """What the file holds of that sitting, by arm."""

    def difference(self, arm: str, metric: str | None = None) -> Mapping[str, Any] | None:
        """Return how an arm differs from the first, as `comparison.Difference.as_json` has it.

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
        Rows by the arm that others are compared with, in the order of the loads; and all sittings
        by name.

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
        sittings |= _of_file(values["sittings"], path)
        for name, by_sitting in values["loads"].items():
            found[name] = {**found.get(name, {}), **_of_file(by_sitting, path)}
    places = {name: place_of(name) for name in found}
    rows = [
        Row(
            dataclasses.replace(workloads()[places[name]], name=name),
            first,
            latest(found[name], first),
        )
        for first in CAPTIONS
        for name in sorted(found, key=lambda name: (places[name], name))
    ]
    rows = [row for row in rows if row.by_arm]
    if not rows:
        raise FormatError(f"no sitting has {MIN_ROUNDS} rounds of two arms")
    return rows, sittings


def _of_file(by_sitting: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return sittings by names that no other file has; they still begin with the date."""
    return {f"{name} {path}": one for name, one in by_sitting.items()}


def place_of(name: str) -> int:
    """Return which of all workloads a name is of; other concurrencies are named at its end.

    Raises:
        FormatError: There is none.
    """
    for place, one in enumerate(workloads()):
        if name == one.name or name.startswith(f"{one.name}, "):
            return place
    raise FormatError(f"{name!r} is none of the loads of benchmarks.gpu.loads")


def latest(by_sitting: Mapping[str, Mapping[str, Any]], first: str) -> dict[str, Mapping[str, Any]]:
    """Return the latest sitting of each arm, by arm; of the first arm again that of moescope.

    One that was cut off counts where there is none that was not.

    Args:
        by_sitting: What the sittings measured, by their dates.
        first: The arm that others are compared with: sittings of another do not count, nor those
            of too few rounds.
    """
    chosen: dict[str, Mapping[str, Any]] = {}
    for name in sorted(by_sitting, key=lambda name: (by_sitting[name]["complete"], name)):
        measured = {**by_sitting[name], "sitting": name}
        if next(iter(measured["arms"])) == first and measured["rounds"] >= MIN_ROUNDS:
            chosen |= dict.fromkeys(measured["differences"], measured)
    if MOESCOPE in chosen:
        chosen.pop(first + AGAIN, None)
        if first + AGAIN in chosen[MOESCOPE]["differences"]:
            chosen[first + AGAIN] = chosen[MOESCOPE]
    return {name: chosen[name] for name in ARMS if name in chosen}


def verdict(difference: Mapping[str, Any], target_percent: float) -> str:
    """Return whether a difference is within the target; see `NOTES`."""
    low, high = difference["claim_percent"]
    if high <= target_percent:
        return WITHIN
    return MISSED if low > target_percent else OPEN


def make_tables(rows: Sequence[Row], sittings: Mapping[str, Any]) -> str:
    """Return the tables of capture, each with that of other arms beneath it, and what they mean."""
    blocks = []
    for first, caption in CAPTIONS.items():
        of_first = [row for row in rows if row.first == first]
        if of_first:
            blocks += [caption, *_tables(first, of_first, sittings)]
    return "\n\n".join([*blocks, f"{_where(rows, sittings)} {_lost(rows)}", NOTES])


def _tables(first: str, rows: Sequence[Row], sittings: Mapping[str, Any]) -> Iterator[str]:
    again = first + AGAIN
    captured = [row for row in rows if MOESCOPE in row.by_arm]
    if captured:
        heads = (
            *("load", "GPU", "rounds", first, again, MOESCOPE, "target", "verdict"),
            *(f"engine: {again}", f"engine: {MOESCOPE}", "hook µs a step"),
        )
        yield _table(heads, [_cells(row, sittings) for row in captured])
    others = [
        arm
        for arm in ARMS
        if arm not in {again, MOESCOPE} and any(arm in row.by_arm for row in rows)
    ]
    if others:
        cells = [
            [
                row.workload.name,
                _gpus(row, others, sittings),
                *(_with_rounds(row, arm) for arm in others),
            ]
            for row in rows
            if not row.by_arm.keys().isdisjoint(others)
        ]
        yield _table(("load", "GPU", *others), cells)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (heads, ["---"] * len(heads), *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(row: Row, sittings: Mapping[str, Any]) -> list[str]:
    difference, again = row.difference(MOESCOPE), row.first + AGAIN
    if difference is None:
        raise FormatError(f"{row.workload.name}: {MOESCOPE} lacks {row.workload.compared}")
    hook_us = row.by_arm[MOESCOPE]["arms"][MOESCOPE]["hook_us_per_step"]
    target = row.workload.target_percent
    return [
        row.workload.name,
        _gpus(row, [MOESCOPE], sittings),
        str(row.by_arm[MOESCOPE]["rounds"]),
        _first(row),
        _change(row.difference(again)),
        _change(difference),
        f"{target:g}%",
        verdict(difference, target),
        _change(row.difference(again, ENGINE_ITL)),
        _change(row.difference(MOESCOPE, ENGINE_ITL)),
        NONE if hook_us is None else f"{hook_us:.0f}",
    ]


def _first(row: Row) -> str:
    value = row.by_arm[MOESCOPE]["arms"][row.first]["median"][row.workload.shown]
    unit = {
        "median_tpot_ms": f"{value:.2f} ms a token",
        "output_throughput": f"{value:,.0f} tokens/s",
        "prompt_throughput": f"{value:,.0f} prompt tokens/s",
    }
    return unit[row.workload.shown]


def _gpus(row: Row, arms: Iterable[str], sittings: Mapping[str, Any]) -> str:
    """Return on what some arms were measured under a load."""
    names = {row.by_arm[arm]["sitting"] for arm in arms if arm in row.by_arm}
    devices = {_device(sittings[name]["hardware"]) for name in names}
    return ", ".join(sorted(device.removeprefix("NVIDIA ") for device in devices))


def _change(difference: Mapping[str, Any] | None) -> str:
    """Return a difference with the interval that is claimed of it."""
    if difference is None:
        return NONE
    low, high = difference["claim_percent"]
    text = f"{difference['percent']:+.2f}% [{low:+.2f}, {high:+.2f}]"
    return text.replace("-", MINUS)


def _with_rounds(row: Row, arm: str) -> str:
    """Return how an arm differs, and in how many rounds; other arms' may be of other sittings."""
    change = _change(row.difference(arm))
    return change if change == NONE else f"{change}, {row.by_arm[arm]['rounds']} rounds"


def _where(rows: Iterable[Row], sittings: Mapping[str, Any]) -> str:
    """Return on what and when rows were measured."""
    names = {measured["sitting"] for row in rows for measured in row.by_arm.values()}
    shown = [sittings[name] for name in names]
    models = sorted({one["model"] for one in shown})
    gpus = sorted({_device(one["hardware"]) for one in shown})
    vllms = sorted({one["versions"]["vllm"] for one in shown})
    dates = sorted({one["date"][:10] for one in shown})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{', '.join(models)} on {', '.join(gpus)}, vLLM {', '.join(vllms)}, {when}."


def _lost(rows: Sequence[Row]) -> str:
    """Return how many rows the capture took, and how many it lost."""
    arms = [row.by_arm[MOESCOPE]["arms"][MOESCOPE] for row in rows if MOESCOPE in row.by_arm]
    captured, lost = (sum(one[key] for one in arms) for key in ("rows_captured", "rows_lost"))
    return f"Rows captured meanwhile: {captured:,}; lost: {lost:,}."


def _device(hardware: Mapping[str, Any]) -> str:
    return str(hardware.get("gpu") or hardware["cpu"]).partition(",")[0]


def replace_block(text: str, tables: str) -> str:
    """Return a text with the tables between its markers.

    Raises:
        FormatError: It has not each of the markers once, in their order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in after or END in after:
        raise FormatError(f"the markers {BEGIN} and {END} are wanted, once each")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def draw(path: Path, rows: Sequence[Row], sittings: Mapping[str, Any]) -> None:
    """Draw the differences of all arms to the first of `CAPTIONS` that there is, a row a load."""
    first = rows[0].first
    shown = [row for row in rows if row.first == first]
    differences: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        found = {row.workload.name: row.difference(arm) for row in shown}
        if any(found.values()):
            differences[arm] = {name: one for name, one in found.items() if one}
    plot.draw_differences(
        path,
        differences,
        {row.workload.name: row.workload.name for row in shown},
        xlabel=f"slower than {first} by percent, paired rounds",
        title=f"{CAPTIONS[first].partition(',')[0]}: {_where(shown, sittings).rstrip('.')}",
    )


def main() -> None:
    """Make what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--page", type=Path, help="The Markdown page with the two markers.")
    parser.add_argument("--picture", type=Path, help="The PNG to write.")
    args = parser.parse_args()
    rows, sittings = read(args.results)
    tables = make_tables(rows, sittings)
    print(tables)
    if args.page:
        args.page.write_text(replace_block(args.page.read_text(), tables))
    if args.picture:
        draw(args.picture, rows, sittings)


if __name__ == "__main__":
    main()
