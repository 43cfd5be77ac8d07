"""Settings: each is a flag ``--routes-…`` of `moescope serve` and a variable ``MOESCOPE_ROUTES_…``.

The flags are written to the environment and every process reads them from there, so both ways in
(`moescope serve` and ``vllm serve`` with the plugin) are one.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import re
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

ENABLE = "MOESCOPE_ENABLE"
"""``1`` switches moescope on; without it an installed moescope does nothing at all."""
LOG_ALIAS = "VLLM_LOG_MOE"
"""Names the route log, and switches moescope on where `ENABLE` does not say."""
RUNTIME_DIR = "MOESCOPE_RUNTIME_DIR"
"""Set by the first process of a deployment: the directory of the collector's socket."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return bytes for ``1GiB``, ``512MB``, ``1000`` ….

    Raises:
        ValueError: The text is no size, or zero.
    """
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * _UNITS[(match[2] or "").lower()]) if match else 0
    if size <= 0:
        raise ValueError(f"{text!r} is no size: give bytes or a unit, such as 512MiB or 1GiB")
    return size


_RANGE = re.compile(r"\s*(\d{1,4})(?:\s*-\s*(\d{1,4}))?\s*")
_MAX_LAYERS_CHARS = 1000
_MAX_LAYERS = 10_000
"""Clients of the server write such lists: what one costs is bounded."""


def parse_layers(text: str) -> tuple[int, ...]:
    """Return layer numbers for ``0,5-7``, in that order, without repetition.

    Raises:
        ValueError: The text is no list of layers, or too long a one.
    """
    if len(text) > _MAX_LAYERS_CHARS:
        raise ValueError(
            f"a list of layers has at most {_MAX_LAYERS_CHARS} characters, got {len(text)}: give "
            "ranges, such as 0,5-7"
        )
    spans = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(
                f"{text!r} is no list of layers: give numbers and ranges, such as 0,5-7"
            )
        spans.append(range(int(match[1]), int(match[2] or match[1]) + 1))
    if sum(map(len, spans)) > _MAX_LAYERS:
        raise ValueError(f"{text!r} names more than {_MAX_LAYERS:,} layers: name each one once")
    return tuple(dict.fromkeys(itertools.chain(*spans)))


def _choice(*allowed: str) -> Any:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"{text!r} is not one of {', '.join(allowed)}")
        return text

    return parse


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds <= 3600.0:
        raise ValueError(f"{text!r} is no window: give seconds from above 0 to 3600")
    return seconds


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"{text!r} is no share: give a number from 0 to 1, such as 0.1")
    return share


def _setting(
    default: str, parse: Any, metavar: str, text: str, default_text: str | None = None
) -> Any:
    text = f"{text} (default: {default_text or default or 'none'})"
    metadata = {"parse": parse, "metavar": metavar, "help": text}
    return dataclasses.field(default=parse(default) if default else None, metadata=metadata)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What can be set. Source of the flags, the variables and their documentation."""

    mode: str = _setting(
        "routes",
        _choice("routes", "counts"),
        "routes|counts",
        "counts: only counts of experts leave the workers; no routes are kept.",
    )
    memory: int = _setting(
        "1GiB", parse_size, "SIZE", "Memory for finished traces; the oldest requests make room."
    )
    queue: int = _setting(
        "64MiB", parse_size, "SIZE", "Rows a worker may hold back before it drops rows, counted."
    )
    weights_dtype: str = _setting(
        "float16", _choice("float16", "float32"), "DTYPE", "Type of the routing weights."
    )
    default: str = _setting(
        "on",
        _choice("on", "off"),
        "on|off",
        "Keep the routes of requests that say nothing; off: only of those that ask for it.",
    )
    sample: float = _setting(
        "1",
        _share,
        "SHARE",
        "Of the requests that say nothing, keep the routes of this share, chosen by their ids.",
    )
    token_ids: str = _setting(
        "on", _choice("on", "off"), "on|off", "Keep the token ids in the traces."
    )
    log: Path | None = _setting(
        "", Path, "PATH", "Also append the routes to this file as JSON Lines."
    )
    log_layers: tuple[int, ...] | None = _setting(
        "", parse_layers, "LAYERS", "Layers that the log holds, such as 0,5-7.", "the first one"
    )
    metrics_window: float = _setting(
        "60", _seconds, "SECONDS", "Window of the load balance metrics, up to 3600."
    )
    expert_metrics: str = _setting(
        "auto",
        _choice("auto", "on", "off"),
        "auto|on|off",
        "Counts of every expert in /metrics; auto: up to 2,000 layers x experts.",
    )
    allow_untested_vllm: str = _setting(
        "off", _choice("on", "off"), "on|off", "Try a vLLM version that moescope was not tested on."
    )

    @property
    def kept_share(self) -> float:
        """Share of the requests that say nothing whose routes are kept, 0 to 1."""
        return self.sample if self.default == "on" else 0.0

    def log_refusal(self, captured: Sequence[int]) -> str | None:
        """Return why the log cannot hold the layers that it shall; None where it can.

        Args:
            captured: The layers with experts.
        """
        for layer in self.log_layers or ():
            if layer not in captured:
                return (
                    f"{flag('log_layers')} (VLLM_LOG_MOE_LAYER) names layer {layer}, which routes "
                    f"nothing; layers with experts: {', '.join(map(str, captured))}"
                )
        return None

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Settings:
        """Read the variables; ``VLLM_LOG_MOE`` and ``VLLM_LOG_MOE_LAYER`` name the log as well.

        Raises:
            ValueError: A variable's value is not allowed; the message names it.
        """
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            name = variable(field.name)
            name = name if name in env else _ALIASES.get(name, name)
            if env.get(name):
                try:
                    values[field.name] = field.metadata["parse"](env[name])
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        if values.get("mode") == "counts" and values.get("log"):
            raise ValueError(
                f"{variable('mode')} is counts: there are no routes to log; leave "
                f"{variable('log')} ({LOG_ALIAS}) out"
            )
        return cls(**values)


_ALIASES = {
    "MOESCOPE_ROUTES_LOG": LOG_ALIAS,
    "MOESCOPE_ROUTES_LOG_LAYERS": "VLLM_LOG_MOE_LAYER",
}


def variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return f"MOESCOPE_ROUTES_{name.upper()}"


def flag(name: str) -> str:
    """Return the command-line flag of a setting."""
    return f"--routes-{name.replace('_', '-')}"


def is_enabled(env: Mapping[str, str] = os.environ) -> bool:
    """Whether moescope is switched on in this process.

    ``VLLM_LOG_MOE=path`` alone is enough: who asks for the log wants it written.
    """
    if ENABLE in env:
        return env[ENABLE] not in {"", "0"}
    return bool(env.get(LOG_ALIAS))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the ``--routes-…`` flags as a group of their own."""
    group = parser.add_argument_group("moescope", "What is captured, and how much of it is kept.")
    for field in dataclasses.fields(Settings):
        group.add_argument(
            flag(field.name),
            metavar=field.metadata["metavar"],
            help=f"{field.metadata['help']} [{variable(field.name)}]",
        )


def export(args: argparse.Namespace, env: MutableMapping[str, str] = os.environ) -> Settings:
    """Write the flags that were given to the environment and return the settings.

    Raises:
        ValueError: A value is not allowed; the message names the flag or the variable.
    """
    for field in dataclasses.fields(Settings):
        value = getattr(args, f"routes_{field.name}")
        if value is not None:
            try:
                field.metadata["parse"](value)
            except ValueError as error:
                raise ValueError(f"{flag(field.name)}: {error}") from None
            env[variable(field.name)] = value
    return Settings.from_env(env)
