"""What a client says that it takes."""

from __future__ import annotations


def takes_gzip(accept_encoding: str) -> bool:
    """Return whether an ``Accept-Encoding`` header prefers gzip to what is not compressed.

    Source: RFC 9110, section 12.5.3: ``*`` stands for every coding that is not named, and a weight
    of 0 refuses one.
    """
    weights: dict[str, float] = {}
    for part in accept_encoding.lower().split(","):
        coding, *parameters = (one.strip() for one in part.split(";"))
        weights[coding] = min((_weight(one) for one in parameters), default=1.0)
    gzip = next((weights[name] for name in ("gzip", "x-gzip", "*") if name in weights), 0.0)
    return gzip > 0.0 and gzip >= weights.get("identity", 0.0)


def _weight(parameter: str) -> float:
    """Return the weight of ``q=0.5``; 1 of any other parameter, and 0 of a malformed weight."""
    name, _, value = parameter.partition("=")
    if name.strip() != "q":
        return 1.0
    try:
        weight = float(value)
    except ValueError:
        return 0.0
    return weight if 0.0 <= weight <= 1.0 else 0.0
