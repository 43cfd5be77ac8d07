"""timing.json: what each arm took, with everything needed to measure it again."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson

from moescope import environment
from moescope.errors import FormatError
from moescope.overhead import arms, comparison, hosting, rounds
from moescope.overhead.rounds import Pass, Round
from moescope.records import ServerInfo
from moescope.replay import Options

ROWS = {"no_log": arms.STOCK, "log": arms.MOESCOPE}
"""The two rows that a timing.json has first, and the arms that they are."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is measured."""

    prompts: Sequence[str]
    arms: Sequence[arms.Arm]
    options: Options
    rounds: int
    """Rounds that count."""
    api_key: str | None = None


def run(
    path: Path,
    setting: Setting,
    hosted: hosting.Hosted,
    commands: dict[str, str],
    on_pass: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Measure, and write timing.json anew after every round.

    Args:
        path: The file.
        setting: What to measure.
        hosted: The arms.
        commands: Their command lines or addresses, by arm.
        on_pass: Called after each pass; see `rounds.Hooks`.

    Returns:
        What was written last.

    Raises:
        CommandError: An arm is not what it must be, or a request failed.
    """
    by_name = {arm.name: arm for arm in setting.arms}
    infos: dict[str, ServerInfo | None] = {}

    def on_visit(name: str, url: str) -> None:
        infos[name] = arms.bring_up(by_name[name], url, setting.api_key)

    measured: list[Round] = []
    values: dict[str, Any] = {}
    for (item,) in rounds.measure(
        [rounds.Load.of_prompts(setting.prompts, setting.options)],
        hosted.host,
        hosted.names,
        rounds=setting.rounds,
        seed=setting.options.seed,
        api_key=setting.api_key,
        hooks=rounds.Hooks(on_visit=on_visit, on_pass=on_pass),
    ):
        measured.append(item)
        values = {
            **summarize(measured, setting.options.seed),
            "complete": len(measured) == setting.rounds,
            "refused": hosted.refused,
            "placement": "together" if hosted.host.stays_up else "in-turn",
            **_circumstances(setting, infos, commands),
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
        raise FormatError(f"{path} is no timing.json: {error}") from error
    if not isinstance(values, dict) or "differences" not in values:
        raise FormatError(f"{path} is no timing.json: it has no differences")
    return values


def summarize(measured: Sequence[Round], seed: int) -> dict[str, Any]:
    """Return the measured part of timing.json.

    ``no_log``, ``log`` and ``overhead`` are there where both arms are.

    Args:
        measured: The rounds that are done.
        seed: Seed of the bootstrap.
    """
    names = list(measured[0].passes)
    differences = comparison.differences(measured, seed)
    passes = {name: [item.passes[name] for item in measured] for name in names}
    return {
        **{row: _row(passes[name]) for row, name in ROWS.items() if set(ROWS.values()) <= {*names}},
        **_overhead(names, differences, len(measured)),
        "arms": {
            name: {**_row(every), "metrics": comparison.means(every)}
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
                    name: {**_row([made]), "metrics": made.metrics}
                    for name, made in item.passes.items()
                },
            }
            for number, item in enumerate(measured, start=1)
        ],
    }


def statements(values: dict[str, Any]) -> list[str]:
    """Return the wall time per token of every arm beside the first, in words."""
    again = next(iter(values["arms"])) + arms.AGAIN
    unknown = f"without the arm {again} the noise of the run is not known"
    said = [
        comparison.statement(
            "capture" if name == arms.MOESCOPE else name,
            "s_per_token",
            comparison.Difference.from_json(by_metric["s_per_token"]),
            len(values["rounds"]),
        )
        for name, by_metric in values["differences"].items()
    ]
    return said if again in values["differences"] else [*said, unknown]


def _overhead(
    names: Sequence[str], differences: dict[str, dict[str, comparison.Difference]], num_rounds: int
) -> dict[str, Any]:
    if names[0] != arms.STOCK or arms.MOESCOPE not in differences:
        return {}
    one = differences[arms.MOESCOPE]["s_per_token"]
    text = comparison.statement("capture", "s_per_token", one, num_rounds)
    return {"overhead": {**one.as_json(), "statement": text}}


def _row(passes: Sequence[Pass]) -> dict[str, float | int]:
    wall_s = sum(item.wall_s for item in passes)
    completion_tokens = sum(item.completion_tokens for item in passes)
    return {
        "wall_s": wall_s,
        "prompt_tokens": sum(item.prompt_tokens for item in passes),
        "completion_tokens": completion_tokens,
        "tokens_per_s": completion_tokens / wall_s,
    }


def _circumstances(
    setting: Setting, infos: dict[str, ServerInfo | None], commands: dict[str, str]
) -> dict[str, Any]:
    info = next((one for one in infos.values() if one), None)
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "model": info.model if info else setting.options.model,
        "device": info.device if info else None,
        "hardware": environment.hardware(),
        "versions": {**(info.versions if info else {}), **environment.system()},
        "prompts": len(setting.prompts),
        "options": setting.options,
        "commands": commands,
    }


def write(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, whole."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY
    new = path.with_suffix(".new")
    new.write_bytes(orjson.dumps(values, option=options))
    new.replace(path)
