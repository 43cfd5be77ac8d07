"""timing.json: the time that each arm took, and everything needed to measure it again."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from moescope import environment, files
from moescope.errors import FormatError, StoppedError
from moescope.overhead import arms, comparison, engine, hosting, rounds
from moescope.overhead.rounds import Pass, Round
from moescope.records import ServerInfo
from moescope.replay import ReplayOptions

_FIRST = {"no_log": arms.STOCK, "log": arms.MOESCOPE}
"""The two keys that a timing.json has first, and the arms that they stand for."""
_PLAIN = ("wall_s", "completion_tokens", "tokens_per_s")
PLAIN = tuple(key for name in _PLAIN for key in (name, f"{name}_percent"))
"""The keys of `plain`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TimingPlan:
    """What is sent to every arm, how and how often."""

    prompts: Sequence[str]
    options: ReplayOptions
    rounds: int
    """Rounds that count."""
    api_key: str | None = None


def run(
    path: Path,
    plan: TimingPlan,
    started: hosting.StartedArms,
    on_pass: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Measure, and write timing.json anew after every round.

    Args:
        path: The file.
        plan: What to measure.
        started: The arms.
        on_pass: Called after each pass; see `rounds.Hooks`.

    Returns:
        What was written last.

    Raises:
        CommandError: An arm is not what it must be, or a request failed.
        StoppedError: Ctrl-C ended it after the first round.
    """
    measured: list[Round] = []
    try:
        return _measure(path, plan, started, on_pass, measured)
    except KeyboardInterrupt as error:
        if not measured:
            raise
        raise StoppedError(
            f"stopped: {len(measured)} of {plan.rounds} rounds are in {path}"
        ) from error


def _measure(
    path: Path,
    plan: TimingPlan,
    started: hosting.StartedArms,
    on_pass: Callable[[], object],
    measured: list[Round],
) -> dict[str, Any]:
    by_name = {arm.name: arm for arm in started.arms}
    infos: dict[str, ServerInfo | None] = {}
    seed = plan.options.seed or 0

    def on_visit(name: str, url: str) -> None:
        infos[name] = arms.bring_up(by_name[name], url, plan.api_key)

    values: dict[str, Any] = {}
    for (item,) in rounds.measure(
        [rounds.Load.of_prompts(plan.prompts, plan.options)],
        started.arrangement,
        started.names,
        rounds=plan.rounds,
        seed=seed,
        api_key=plan.api_key,
        hooks=rounds.Hooks(
            on_visit=on_visit,
            on_pass=on_pass,
            counters=lambda name, url: engine.read_counters(url, plan.api_key),
        ),
    ):
        measured.append(engine.with_itl(item))
        values = {
            **summarize(measured, seed),
            "complete": len(measured) == plan.rounds,
            "refused": started.refused,
            "placement": "together" if started.arrangement.stays_up else "in-turn",
            **_circumstances(plan, infos, started.commands),
        }
        write(path, values)
    return values


def read(path: Path) -> dict[str, Any]:
    """Read a timing.json.

    Raises:
        FormatError: The file cannot be read, or holds something else.
    """
    try:
        values = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise FormatError(f"{path} is not a timing.json: {error}") from error
    if not isinstance(values, dict) or "differences" not in values:
        raise FormatError(f"{path} is not a timing.json: it has no differences")
    return values


def is_finished(path: Path) -> bool:
    """Whether a timing.json is there, and of a comparison that ran to its end.

    Raises:
        FormatError: The file cannot be read, or holds something else.
    """
    return path.exists() and bool(read(path).get("complete", True))


def summarize(measured: Sequence[Round], seed: int) -> dict[str, Any]:
    """Return the measured part of timing.json.

    ``no_log``, ``log`` and ``overhead`` are there where both arms are; of the last, the words and
    their figures where stock is the first arm.

    Args:
        measured: The rounds that are done.
        seed: Seed of the bootstrap.
    """
    names = list(measured[0].passes)
    differences = comparison.differences(measured, seed)
    passes = {name: [item.passes[name] for item in measured] for name in names}
    has_both = {*_FIRST.values()} <= {*names}
    totals = {key: _total(passes[name]) for key, name in _FIRST.items()} if has_both else {}
    said = _said(names, differences, len(measured))
    return {
        **totals,
        **({"overhead": {**plain(totals), **said}} if has_both else {}),
        "arms": {
            name: {**_total(every), "metrics": comparison.means(every)}
            for name, every in passes.items()
        },
        "differences": {
            name: {metric: one.as_json() for metric, one in by_metric.items()}
            for name, by_metric in differences.items()
        },
        "token_ids": comparison.agreement(measured),
        "rounds": [
            {
                "round": number,
                "order": item.order,
                **{
                    name: {**_total([made]), "metrics": made.metrics}
                    for name, made in item.passes.items()
                },
            }
            for number, item in enumerate(measured, start=1)
        ],
    }


def statements(values: dict[str, Any]) -> list[str]:
    """Return the wall time per token of every arm beside the first, in words.

    Beside the client's clock stands the engine's, where it is known; of the same again, which says
    what the noise is, the client's alone.
    """
    again = next(iter(values["arms"])) + arms.AGAIN
    unknown = f"without the arm {again} the noise of the run is not known"
    said = [
        comparison.statement(
            "capture" if name == arms.MOESCOPE else name,
            metric,
            comparison.Difference.from_json(by_metric[metric]),
            len(values["rounds"]),
        )
        for name, by_metric in values["differences"].items()
        for metric in (comparison.HEADLINE[:1] if name == again else comparison.HEADLINE)
        if metric in by_metric
    ]
    return said if again in values["differences"] else [*said, unknown]


def plain(totals: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return what ``log`` has more than ``no_log``, and that in percent: sums, without intervals.

    Args:
        totals: Both, as a timing.json has them.
    """
    without, logged = (totals[key] for key in _FIRST)
    overhead: dict[str, float] = {}
    for name in _PLAIN:
        more = logged[name] - without[name]
        overhead |= {name: more, f"{name}_percent": 100.0 * more / without[name]}
    return overhead


def _said(
    names: Sequence[str], differences: dict[str, dict[str, comparison.Difference]], num_rounds: int
) -> dict[str, Any]:
    if names[0] != arms.STOCK or arms.MOESCOPE not in differences:
        return {}
    one = differences[arms.MOESCOPE]["s_per_token"]
    text = comparison.statement("capture", "s_per_token", one, num_rounds)
    return {**one.as_json(), "statement": text}


def _total(passes: Sequence[Pass]) -> dict[str, float | int]:
    wall_s = sum(item.wall_s for item in passes)
    completion_tokens = sum(item.completion_tokens for item in passes)
    return {
        "wall_s": wall_s,
        "prompt_tokens": sum(item.prompt_tokens for item in passes),
        "completion_tokens": completion_tokens,
        "tokens_per_s": completion_tokens / wall_s,
    }


def _circumstances(
    plan: TimingPlan, infos: Mapping[str, ServerInfo | None], commands: Mapping[str, str]
) -> dict[str, Any]:
    info = next((one for one in infos.values() if one), None)
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "model": info.model if info else plan.options.model,
        "device": info.device if info else None,
        "hardware": environment.hardware(),
        "versions": {**(info.versions if info else {}), **environment.system()},
        "prompts": len(plan.prompts),
        "options": plan.options,
        "commands": commands,
    }


def write(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file; a reader sees the whole old file or the whole new one."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY
    files.write(path, orjson.dumps(values, option=options))
