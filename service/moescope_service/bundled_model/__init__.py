"""A small mixture-of-experts model that solves word problems, so that demos need no download."""

import pathlib


def path() -> pathlib.Path:
    """Return the directory of the model's checkpoint."""
    return pathlib.Path(__file__).parent / "checkpoint"
