"""The one place that states moescope's version."""

__version__ = "0.1.0"
