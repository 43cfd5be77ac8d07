"""Makes what is committed of what was measured.

``python -m benchmarks.summarize RAW.json … --out DIR``

A raw result has every pass with all its metrics, or every kernel of every step. Its summary has the
circumstances, the differences with their intervals and the figures of each round that they were
computed from, and is some tens of kB. Numbers have five significant digits.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

METRICS = ("s_per_token", "median_ttft_ms", "median_tpot_ms", "engine_itl_ms")
"""What is kept of each round, where it was measured."""
MEDIANS = (*METRICS, "output_throughput", "prompt_throughput")
KERNEL_SHARE = 0.0003
"""Kernels that take less of a step in every arm are summed up."""
REST = "all others"
_DIGITS, _WIDTH, _INDENT = 5, 150, 1


def summarize(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summary of a result of any of the benchmarks.

    Args:
        raw: A file of `benchmarks.cpu` or `benchmarks.gpu`, or a timing.json of
            ``moescope overhead``. A summary is returned as it is.
    """
    made: dict[str, Any] = {}
    for key, value in raw.items():
        if key == "loads" and "sittings" in raw:
            made[key] = {
                load: {name: _sitting(one) for name, one in by_sitting.items()}
                for load, by_sitting in value.items()
            }
        elif key == "kernels":
            made[key] = {
                load: one if load == "refused" else _kernels(one) for load, one in value.items()
            }
        elif key == "rounds" and isinstance(value, list) and "differences" in raw:
            made |= {key: len(value), "by_round": _by_round([_passes(one) for one in value])}
        else:
            made[key] = value
    return {key: _rounded(value) for key, value in made.items()}


def _sitting(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return a load's sitting: of each arm what the tables show, of each round what differs."""
    if "passes" not in measured:
        return dict(measured)
    kept = {key: value for key, value in measured.items() if key != "passes"}
    return {
        **kept,
        "arms": {
            name: {**arm, "median": _only(MEDIANS, arm["median"])}
            for name, arm in measured["arms"].items()
        },
        "differences": {
            name: _only(METRICS, by_metric) for name, by_metric in measured["differences"].items()
        },
        "by_round": _by_round([_passes(one) for one in measured["passes"]]),
    }


def _passes(one: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Return a round's metrics by arm, in the order of the arms."""
    return {name: made["metrics"] for name, made in one.items() if name not in {"order", "round"}}


def _by_round(rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Return the values of all rounds by arm and metric."""
    return {
        name: {
            metric: [one[name][metric] for one in rounds]
            for metric in METRICS
            if all(metric in one[name] for one in rounds)
        }
        for name in rounds[0]
    }


def _kernels(by_arm: Mapping[str, Any]) -> dict[str, Any]:
    """Return each arm's kernels: medians of its passes, those that take little summed up."""
    if not all(isinstance(passes, list) for passes in by_arm.values()):
        return dict(by_arm)
    shares: dict[str, float] = {}
    for passes in by_arm.values():
        for one in passes:
            for name, kernel in one["kernels"].items():
                shares[name] = max(shares.get(name, 0.0), kernel["us"] / one["period"])
    shown = [name for name, share in shares.items() if share >= KERNEL_SHARE]
    return {
        arm: {
            "passes": len(passes),
            "steps": sum(one["steps"] for one in passes),
            "period": float(np.median([one["period"] for one in passes])),
            "rest": float(np.median([one["rest"] for one in passes])),
            "period_by_pass": [one["period"] for one in passes],
            "kernels": dict(_medians(passes, shown)),
        }
        for arm, passes in by_arm.items()
    }


def _medians(
    passes: Sequence[Mapping[str, Any]], shown: Sequence[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    none = {"runs": 0.0, "us": 0.0}
    for name in shown:
        every = [one["kernels"].get(name, none) for one in passes]
        yield name, {key: float(np.median([one[key] for one in every])) for key in none}
    rest = [[k for name, k in one["kernels"].items() if name not in shown] for one in passes]
    yield REST, {key: float(np.median([sum(k[key] for k in one) for one in rest])) for key in none}


def _only(names: Iterable[str], values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


def to_text(value: Any, indent: int = 0) -> str:
    """Return JSON that a person can read: what fits stands on one line, numbers fill lines."""
    line = _one_line(value)
    if len(line) + indent <= _WIDTH or not isinstance(value, (dict, list)):
        return line
    inner, end = " " * (indent + _INDENT), " " * indent
    if isinstance(value, dict):
        entries = [
            f"{_one_line(key)}: {to_text(one, indent + _INDENT)}" for key, one in value.items()
        ]
        return "{\n" + ",\n".join(inner + one for one in entries) + f"\n{end}}}"
    if any(isinstance(one, (dict, list)) for one in value):
        entries = [inner + to_text(one, indent + _INDENT) for one in value]
        return "[\n" + ",\n".join(entries) + f"\n{end}]"
    return "[\n" + inner + _filled([_one_line(one) for one in value], inner) + f"\n{end}]"


def _one_line(value: Any) -> str:
    if isinstance(value, dict):
        entries = (f"{_one_line(key)}: {_one_line(one)}" for key, one in value.items())
        return f"{{{', '.join(entries)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_one_line, value))}]"
    return orjson.dumps(value).decode()


def _filled(words: Sequence[str], inner: str) -> str:
    lines = [words[0]]
    for word in words[1:]:
        if len(inner) + len(lines[-1]) + len(word) + 3 > _WIDTH:
            lines.append(word)
        else:
            lines[-1] += f", {word}"
    return f",\n{inner}".join(lines)


def write(raw: Path, out: Path, commit: str | None = None) -> None:
    """Write the summary of a raw result to a file.

    Args:
        raw: The result.
        out: The file.
        commit: What was measured, where the result does not say so.
    """
    summary = summarize({"commit": commit, **orjson.loads(raw.read_bytes())})
    if summary["commit"] is None:
        del summary["commit"]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(to_text(summary) + "\n")


def main() -> None:
    """Summarize what is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("raw", nargs="+", type=Path, help="Raw results.")
    parser.add_argument("--out", type=Path, required=True, help="The directory of the summaries.")
    args = parser.parse_args()
    for path in args.raw:
        write(path, args.out / path.name)


if __name__ == "__main__":
    main()
