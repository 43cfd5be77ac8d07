"""The colors and settings that all pictures share."""

from __future__ import annotations

from typing import Any

INK, SOFT, GRID = "#1f2933", "#66727f", "#e3e7eb"
BAR, TOP = "#4c78a8", "#e4572e"
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
}
"""matplotlib's settings."""
DPI = 160
