"""What the endpoints return, besides traces, as frozen records."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from moescope.errors import FormatError
from moescope.received import MALFORMED, check_fields, is_int, shown


class _Record:
    """Built from a JSON object; fields that this version does not know are left out."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Build the record from the endpoint's JSON.

        Raises:
            FormatError: A field is missing or malformed.
        """
        names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        try:
            known = {name: value for name, value in values.items() if name in names}
            check_fields(cls, known)
            for name, value in known.items():
                if name != "seed" and is_int(value) and value < 0:
                    raise ValueError(f"{name} must not be negative, got {value}")
            return cls(**known)
        except MALFORMED as error:
            raise FormatError(f"not a {cls.__name__}: {shown(str(error))}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreInfo(_Record):
    """The server's bounded store of finished traces."""

    limit_bytes: int
    """Bytes it may hold; beyond that the oldest traces make room."""
    bytes: int
    """Bytes it holds."""
    traces: int
    """Traces it holds."""
    evicted: int
    """Traces that made room since the server started."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogInfo(_Record):
    """The route log that a server writes (``--routes-log``)."""

    state: str
    """``off``: it writes none; ``ok``; ``failing``: the file takes no lines, or too slowly."""
    dropped: int
    """Traces that it lacks, in whole or in part, since the collector started."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerInfo(_Record):
    """What a server captures, and with what."""

    model: str
    """The served model's name."""
    layers: tuple[int, ...]
    """Global numbers of the layers with experts."""
    num_hidden_layers: int
    """Layers of the model, those without experts included."""
    num_experts: int
    """Routed experts a layer."""
    top_k: int
    """Experts a token and layer."""
    router_types: tuple[str, ...]
    """vLLM's classes of the routers."""
    id_dtype: str
    """numpy's name of the dtype of ``topk_ids``."""
    weights_dtype: str
    """numpy's name of the dtype of ``topk_weights``."""
    device: str
    """The device that computes the routing."""
    seed: int | None
    """The engine's seed."""
    versions: dict[str, str]
    """Versions of moescope, vLLM and torch."""
    mode: str
    """``routes``, or ``counts`` where the server keeps no routes."""
    capture: str
    """``on`` or ``paused``."""
    routes_default: str
    """Whether requests that say nothing are kept: ``on`` or ``off``."""
    routes_sample: float
    """Share of them that is kept where ``routes_default`` is ``on``, 0 to 1."""
    token_ids: bool
    """Whether traces hold the token ids."""
    store: StoreInfo
    """The store of finished traces."""
    started_s: float
    """Unix time at which the collector started, in seconds."""
    weights_version: int | None = None
    """How often the weights have changed since the server started; None where it does not tell."""
    log: LogInfo | None = None
    """The route log; None where the server does not tell."""
    tokenizer: bool | None = None
    """Whether it has a tokenizer, for the text of tokens; None where the server does not tell."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Build the record from the JSON of ``/moescope/info``.

        Raises:
            FormatError: A field is missing or malformed.
        """
        try:
            nested = {
                "layers": tuple(values["layers"]),
                "router_types": tuple(values["router_types"]),
                "store": StoreInfo.from_json(values["store"]),
                "log": LogInfo.from_json(values["log"]) if "log" in values else None,
            }
        except (TypeError, KeyError, AttributeError) as error:
            raise FormatError(f"not a {cls.__name__}: {shown(error)}") from error
        return super().from_json({**values, **nested})


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ExpertCounts(_Record):
    """How often each expert was selected, over all traffic.

    The functions of `moescope.analysis` take ``counts``.
    """

    model: str
    """The served model's name."""
    phase: str
    """``all``, ``prefill`` or ``decode``."""
    since_s: float
    """Unix time from which the counts run, in seconds."""
    window_s: float | None = None
    """Seconds that a window covers: up to 10 more than requested; fewer just after its start."""
    num_rows: int
    """Routed tokens counted."""
    num_experts: int
    """Routed experts a layer."""
    layers: npt.NDArray[np.int32]
    """Global layer numbers, ``[num_layers]``."""
    counts: npt.NDArray[np.int64]
    """Selections, ``[num_layers, num_experts]``."""

    def __post_init__(self) -> None:
        """Turn lists into arrays and check that they fit each other.

        Raises:
            ValueError: An array's shape does not fit the others.
        """
        layers = np.asarray(self.layers, np.int32)
        counts = np.asarray(self.counts, np.int64)
        if counts.size and counts.min() < 0:
            raise ValueError(f"counts must not be negative, got {counts.min()}")
        if counts.shape != (len(layers), self.num_experts):
            raise ValueError(
                f"counts must be [{len(layers)}, {self.num_experts}], got shape {counts.shape}"
            )
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "counts", counts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceInfo(_Record):
    """One sequence that the server knows: a line of ``GET /routes``."""

    request_id: str
    """An id of the request as its client saw it."""
    ids: tuple[str, ...]
    """Every id under which `Client.routes` finds it."""
    index: int
    """The choice's index in the response."""
    status: str
    """``running`` or ``finished``."""
    prompt_len: int
    """Prompt tokens."""
    num_tokens: int | None
    """Prompt and output tokens; None while it runs, as is all that is only known at the end."""
    finish_reason: str | None
    """``stop``, ``length``, ``abort`` …"""
    complete: bool | None
    """No row is missing."""
    coverage: float | None
    """Share of rows that are not missing, in [0, 1]."""
    created_s: float
    """Unix time at which the request was registered, in seconds."""
    size_bytes: int | None
    """Bytes that the trace takes in the store."""
    oldest_weights_version: int | None = None
    """The smallest number of the weights that computed its rows; None where no one version did."""
    newest_weights_version: int | None = None
    """The largest number of these."""

    def __post_init__(self) -> None:
        """Make the ids a tuple."""
        object.__setattr__(self, "ids", tuple(self.ids))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RecentPage:
    """A page of recent sequences, newest first."""

    sequences: tuple[SequenceInfo, ...]
    """The sequences of this page."""
    next_before: int | None
    """What to give as ``before`` for the next page; None on the last one."""
