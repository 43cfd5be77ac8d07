"""Values as Grafana writes them, for the units that the dashboards use."""

from __future__ import annotations

_SECONDS = ((60.0, 60.0, "min"), (1.0, 1.0, "s"), (1e-3, 1e-3, "ms"), (1e-6, 1e-6, "µs"))
_THOUSANDS = ((1e9, " B"), (1e6, " M"), (1e3, " K"))
_BYTES = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def written(value: float, unit: str, decimals: int | None = None) -> str:  # noqa: PLR0911
    """Return a value with its unit.

    Args:
        value: The value.
        unit: Grafana's name of the unit.
        decimals: Digits after the point; as many as make three digits where it is None.

    Raises:
        ValueError: The unit is none that the dashboards use.
    """
    if value != value:  # noqa: PLR0124 - NaN
        return "NaN"
    kind, _, name = unit.partition(":")
    match kind:
        case "none":
            return _digits(value, decimals)
        case "locale":
            return f"{value:,.{decimals or 0}f}"
        case "percentunit":
            return f"{_digits(100 * value, decimals)}%"
        case "suffix":
            return f"{_digits(value, decimals)}{name}"
        case "s":
            return _seconds(value, decimals)
        case "bytes":
            return _scaled(value, _BYTES, " ", " B", decimals)
        case "count":
            return f"{_scaled(value, _THOUSANDS, '', '', decimals)} {name}"
        case "reqps":
            return f"{_digits(value, decimals)} req/s"
    raise ValueError(f"unit {unit!r} is unknown: add it to dashboards/units.py")


def _digits(value: float, decimals: int | None) -> str:
    if decimals is None:
        size = abs(value)
        decimals = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
        text = f"{value:.{decimals}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.{decimals}f}"


def _seconds(value: float, decimals: int | None) -> str:
    for least, scale, name in _SECONDS:
        if abs(value) >= least:
            return f"{_digits(value / scale, decimals)} {name}"
    return f"{_digits(value / 1e-6, decimals)} µs" if value else "0 s"


def _scaled(
    value: float,
    scales: tuple[tuple[float, str], ...],
    space: str,
    rest: str,
    decimals: int | None,
) -> str:
    for scale, name in scales:
        if abs(value) >= scale:
            return f"{_digits(value / scale, decimals)}{space}{name}"
    return f"{_digits(value, decimals)}{rest}"
