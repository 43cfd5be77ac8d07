"""Holds dashboards to the types of Grafana's own Foundation SDK: no unknown field, no wrong value.

The SDK's ``from_json`` drops fields that it does not know and checks no values, so every object is
read, written again and compared, and its attributes are held to their annotations.
"""

from __future__ import annotations

import enum
import inspect
import json
import types
import typing
from typing import Any

from grafana_foundation_sdk.cog import plugins, runtime
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard


def faults(board: dict[str, Any]) -> list[str]:
    """Return what the types of the SDK do not allow, each with its place."""
    plugins.register_default_plugins()
    found = [
        f"panels[{place}]: {panel.get('type')!r} is no plugin, or has no options"
        for place, panel in enumerate(board["panels"])
        if panel.get("type") != "row"
        and (runtime.panelcfg_config(panel.get("type", "")) is None or not panel.get("options"))
    ]
    differences = [] if found else _differences(Dashboard, board, "")
    return found or [*differences, *_walk(Dashboard.from_json(board), "")]


def _plain(made: Any) -> Any:
    return json.loads(json.dumps(made, cls=JSONEncoder))


def _differences(kind: Any, data: dict[str, Any], place: str) -> list[str]:
    return _compare(data, _plain(kind.from_json(data)), place)


def _compare(had: Any, kept: Any, place: str) -> list[str]:
    if isinstance(had, dict) and isinstance(kept, dict):
        lost = [f"{place}.{key}: unknown field" for key in had.keys() - kept.keys()]
        return lost + [f for key in had.keys() & kept.keys()
                       for f in _compare(had[key], kept[key], f"{place}.{key}")]  # fmt: skip
    if isinstance(had, list) and isinstance(kept, list) and len(had) == len(kept):
        return [f for i, (a, b) in enumerate(zip(had, kept, strict=True))
                for f in _compare(a, b, f"{place}[{i}]")]  # fmt: skip
    return [] if had == kept else [f"{place}: {had!r} was read as {kept!r}"]


def _walk(made: object, place: str) -> list[str]:
    hints = typing.get_type_hints(type(made))
    return [
        fault
        for name, hint in hints.items()
        if hasattr(made, name)
        for fault in _check(getattr(made, name), hint, f"{place}.{name}")
    ]


def _check(value: Any, hint: Any, place: str) -> list[str]:  # noqa: PLR0911
    origin, of = typing.get_origin(hint), typing.get_args(hint)
    if hint in (Any, object):
        return _walk(value, place) if hasattr(value, "to_json") else []
    if origin in (typing.Union, types.UnionType):
        tries = [_check(value, one, place) for one in of]
        return min(tries, key=len) if all(tries) else []
    if origin is typing.Literal:
        return [] if value in of else [f"{place}: {value!r} is none of {of}"]
    if origin in (list, dict) and isinstance(value, origin):
        items = enumerate(value) if origin is list else value.items()
        return [f for key, one in items for f in _check(one, of[-1], f"{place}[{key}]")]
    if inspect.isclass(hint) and issubclass(hint, enum.Enum):
        allowed = [one.value for one in hint]
        return [] if value in allowed else [f"{place}: {value!r} is none of {allowed}"]
    if inspect.isclass(hint) and isinstance(value, hint):
        return _walk(value, place) if hasattr(value, "to_json") else []
    if hint is float and isinstance(value, int):
        return []
    if isinstance(value, dict) and hasattr(hint, "from_json"):  # the SDK leaves it as it came
        return [*_differences(hint, value, place), *_walk(hint.from_json(value), place)]
    if hasattr(value, "to_json"):  # queries and options are of their plugin's classes
        return _walk(value, place)
    return [f"{place}: {value!r} is no {hint}"]
