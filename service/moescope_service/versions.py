"""Versions, and the guard against a vLLM that moescope was not tested on."""

from __future__ import annotations

import importlib.metadata

import moescope
from moescope_service.errors import RefusedError
from moescope_service.settings import Settings, flag, variable

TESTED_VLLM = ("0.32.0",)
"""vLLM versions on which the internals that moescope relies on were checked."""


def vllm_version() -> str:
    """Return the installed vLLM's version; its CPU build is not distributed as ``vllm``."""
    import vllm

    return str(vllm.__version__).split("+")[0]


def check_vllm(settings: Settings) -> None:
    """Refuse a vLLM version that moescope was not tested on, unless told otherwise.

    Raises:
        RefusedError: The version is not among `TESTED_VLLM`.
    """
    found = vllm_version()
    if found not in TESTED_VLLM and settings.allow_untested_vllm != "on":
        name = "allow_untested_vllm"
        raise RefusedError(
            f"vLLM {found} is installed, but moescope {moescope.__version__} relies on internals "
            f"of vLLM {', '.join(TESTED_VLLM)}; install that, or try it with {flag(name)} on "
            f"({variable(name)}=on)"
        )


def versions() -> dict[str, str]:
    """Return the versions that every trace carries."""
    return {
        "moescope": moescope.__version__,
        "vllm": vllm_version(),
        "torch": importlib.metadata.version("torch"),
    }
