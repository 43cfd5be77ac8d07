"""How many examples the tests that make up their inputs take: a few, or `make fuzz`'s."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

VARIABLE = "MOESCOPE_FUZZ_EXAMPLES"
"""Examples a test; unset, a few, always the same ones, as continuous integration runs them."""


def made_up(few: int) -> settings:
    """Return hypothesis' settings of a test.

    Args:
        few: Its examples where the variable is unset.
    """
    examples = os.environ.get(VARIABLE)
    return settings(
        max_examples=int(examples or few),
        derandomize=examples is None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
