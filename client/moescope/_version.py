"""The one place that states moescope's version."""

__version__ = "0.2.0"
