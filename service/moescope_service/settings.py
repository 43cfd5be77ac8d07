"""Settings: each is a flag ``--routes-…`` of `moescope serve` and a variable ``MOESCOPE_ROUTES_…``.

The flags are written to the environment and every process reads them from there, so both ways in
(`moescope serve` and ``vllm serve`` with the plugin) are one.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Literal

from moescope_service.parsers import (
    HostPort,
    parse_age,
    parse_choice,
    parse_host_port,
    parse_hosts,
    parse_key,
    parse_on_off,
    parse_share,
    parse_size,
    parse_size_or_zero,
    parse_window,
    shown,
)

ENABLE = "MOESCOPE_ENABLE"
"""``1`` switches moescope on; without it an installed moescope does nothing at all."""
LOG_ALIAS = "VLLM_LOG_MOE"
"""Names the route log, and switches moescope on where `ENABLE` does not say."""
RUNTIME_DIR = "MOESCOPE_RUNTIME_DIR"
"""Set by the first process of a deployment: the directory of the collector's socket."""


def _setting(
    name: str,
    default: str,
    parse: Callable[[str], Any],
    metavar: str,
    text: str,
    default_text: str | None = None,
    *,
    is_secret: bool = False,
    is_memory: bool = False,
) -> Any:
    text = f"{text} (default: {default_text or default or 'none'})"
    metadata = {
        "name": name, "parse": parse, "metavar": metavar, "help": text,
        "is_secret": is_secret, "is_memory": is_memory,
    }  # fmt: skip
    value = parse(default) if default else None
    return dataclasses.field(default=value, metadata=metadata, repr=not is_secret)


def _parse_layers(text: str) -> tuple[int, ...]:
    from moescope.layers import parse_layers  # late: vLLM's plugin needs Python alone

    return parse_layers(text)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What can be set, in its type and unit. Flags, variables and help are made of it."""

    mode: Literal["routes", "counts"] = _setting(
        "mode",
        "routes",
        parse_choice("routes", "counts"),
        "routes|counts",
        "counts: only counts of experts leave the workers; no routes are kept.",
    )
    memory_bytes: int = _setting(
        "memory",
        "1GiB",
        parse_size,
        "SIZE",
        "Memory for finished traces; the oldest requests make room.",
        is_memory=True,
    )
    prefix_bytes: int = _setting(
        "prefix_memory",
        "256MiB",
        parse_size_or_zero,
        "SIZE",
        "With a KV connector: memory for rows of blocks that left the KV cache and may come back; "
        "0: they are missing.",
        is_memory=True,
    )
    queue_bytes: int = _setting(
        "queue",
        "64MiB",
        parse_size,
        "SIZE",
        "Rows a worker may hold back before it drops rows, counted.",
        is_memory=True,
    )
    weights_dtype: Literal["float16", "float32"] = _setting(
        "weights_dtype",
        "float16",
        parse_choice("float16", "float32"),
        "float16|float32",
        "Type of the routing weights.",
    )
    keeps_by_default: bool = _setting(
        "default",
        "on",
        parse_on_off,
        "on|off",
        "Keep the routes of requests that say nothing; off: only of those that ask for it.",
    )
    sampled_share: float = _setting(
        "sample",
        "1",
        parse_share,
        "SHARE",
        "Of the requests that say nothing, keep the routes of this share, chosen by their ids.",
    )
    keeps_token_ids: bool = _setting(
        "token_ids", "on", parse_on_off, "on|off", "Keep the token ids in the traces."
    )
    log: Path | None = _setting(
        "log", "", Path, "PATH", "Also append the routes to this file as JSON Lines."
    )
    log_layers: tuple[int, ...] | None = _setting(
        "log_layers",
        "",
        _parse_layers,
        "LAYERS",
        "Layers that the log holds, such as 0,5-7.",
        "the first one",
    )
    log_max_bytes: int | None = _setting(
        "log_max_bytes",
        "",
        parse_size,
        "SIZE",
        "Size at which the log is renamed to PATH.1, PATH.1 to PATH.2 and so on to PATH.9, and "
        "begun anew.",
    )
    archive: str | None = _setting(
        "archive",
        "",
        str,
        "DIR|s3://BUCKET/PREFIX",
        "Also keep finished traces there as Parquet, by hour; needs pyarrow.",
    )
    archive_interval_s: float = _setting(
        "archive_interval",
        "300",
        parse_window,
        "SECONDS",
        "Longest time until a finished trace is in a file of the archive, up to 3600.",
    )
    archive_ttl_s: float | None = _setting(
        "archive_ttl",
        "",
        parse_age,
        "SECONDS",
        "Age at which traces leave the archive, at least 60.",
    )
    archive_max_bytes: int | None = _setting(
        "archive_max_bytes",
        "",
        parse_size,
        "SIZE",
        "Size of the archive's files beyond which the oldest ones are removed.",
    )
    metrics_window_s: float = _setting(
        "metrics_window",
        "60",
        parse_window,
        "SECONDS",
        "Window of the load balance metrics, up to 3600.",
    )
    expert_metrics: Literal["auto", "on", "off"] = _setting(
        "expert_metrics",
        "auto",
        parse_choice("auto", "on", "off"),
        "auto|on|off",
        "Counts of every expert in /metrics; auto: up to 2,000 layers x experts.",
    )
    allowed_hosts: frozenset[str] | None = _setting(
        "allowed_hosts",
        "",
        parse_hosts,
        "NAMES",
        "Names under which browsers may open a server without API keys, such as moe.example.org, "
        "beside its addresses, names without a dot and the machine's own.",
    )
    is_private: bool = _setting(
        "private",
        "off",
        parse_on_off,
        "on|off",
        "Only the API key that made a request reads and deletes its routes.",
    )
    admin_key: str | None = _setting(
        "admin_key",
        "",
        parse_key,
        "KEY",
        "Key that pause, resume, reset, the label of the weights and the deletion of others' "
        "routes want; set the variable, since other users of the machine see flags.",
        is_secret=True,
    )
    bind: HostPort | None = _setting(
        "bind",
        "",
        parse_host_port,
        "HOST:PORT",
        "Of an engine over several nodes, on each: where the first one's collector listens and the "
        "others reach it.",
    )
    key_file: Path | None = _setting(
        "key_file",
        "",
        Path,
        "FILE",
        "Key of these nodes; the first one writes it where it is missing, the others need a copy.",
    )
    allows_untested_vllm: bool = _setting(
        "allow_untested_vllm",
        "off",
        parse_on_off,
        "on|off",
        "Try a vLLM version that moescope was not tested on.",
    )

    @property
    def kept_share(self) -> float:
        """Share of the requests that say nothing whose routes are kept, 0 to 1."""
        return self.sampled_share if self.keeps_by_default else 0.0

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
            name = variable(field.metadata["name"])
            name = name if name in env else _ALIASES.get(name, name)
            if env.get(name):
                values[field.name] = _parsed(field, name, env[name])
        if values.get("mode") == "counts" and values.get("log"):
            raise ValueError(
                f"{variable('mode')} is counts: there are no routes to log; leave "
                f"{variable('log')} ({LOG_ALIAS}) out"
            )
        if (values.get("bind") is None) != (values.get("key_file") is None):
            raise ValueError(
                f"{variable('bind')} ({flag('bind')}) and {variable('key_file')} "
                f"({flag('key_file')}) go together: give both on every node, or neither"
            )
        if values.get("mode") == "counts" and values.get("archive"):
            raise ValueError(
                f"{variable('mode')} is counts: there are no routes to archive; leave "
                f"{variable('archive')} out"
            )
        return cls(**values)


_ALIASES = {
    "MOESCOPE_ROUTES_LOG": LOG_ALIAS,
    "MOESCOPE_ROUTES_LOG_LAYERS": "VLLM_LOG_MOE_LAYER",
}


def _parsed(field: dataclasses.Field[Any], where: str, text: str) -> Any:
    try:
        value = field.metadata["parse"](text)
    except ValueError as error:
        got = "" if field.metadata["is_secret"] else f" {shown(text)}"
        raise ValueError(f"invalid {where}{got}: {error}") from None
    if field.metadata["is_memory"] and value > (most := memory_bytes()):
        raise ValueError(
            f"invalid {where} {shown(text)}: expected at most this machine's memory, {most:,} bytes"
        )
    return value


def memory_bytes() -> int:
    """Return the machine's memory; a container's limit may be lower."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def variable(name: str) -> str:
    """Return the environment variable of a setting, such as ``memory``."""
    return f"MOESCOPE_ROUTES_{name.upper()}"


def flag(name: str) -> str:
    """Return the command-line flag of a setting, such as ``memory``."""
    return f"--routes-{name.replace('_', '-')}"


def is_enabled(env: Mapping[str, str] = os.environ) -> bool:
    """Whether moescope is switched on in this process.

    ``VLLM_LOG_MOE=path`` alone is enough: who asks for the log wants it written.
    """
    if ENABLE in env:
        return env[ENABLE] not in {"", "0"}
    return bool(env.get(LOG_ALIAS))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the ``--routes-…`` flags as a group of their own; those not given leave no attribute.

    Their help tells their defaults. vLLM's parser would add "(default: None)" otherwise.
    """
    group = parser.add_argument_group("moescope", "What is captured, and how much of it is kept.")
    for field in dataclasses.fields(Settings):
        group.add_argument(
            flag(field.metadata["name"]),
            default=argparse.SUPPRESS,
            metavar=field.metadata["metavar"],
            help=f"{field.metadata['help']} [{variable(field.metadata['name'])}]",
        )


def export(args: argparse.Namespace, env: MutableMapping[str, str] = os.environ) -> Settings:
    """Write the flags that were given to the environment and return the settings.

    Raises:
        ValueError: A value is not allowed; the message names the flag or the variable.
    """
    for field in dataclasses.fields(Settings):
        name = field.metadata["name"]
        value = getattr(args, f"routes_{name}", None)
        if value is not None:
            _parsed(field, flag(name), value)
            env[variable(name)] = value
        if field.metadata["is_secret"]:
            setattr(args, f"routes_{name}", None)  # what is left of the flags may be logged
    return Settings.from_env(env)
