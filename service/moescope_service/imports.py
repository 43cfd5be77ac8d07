"""Imports every module that a deployment needs, before a model is loaded.

vLLM logs that a plugin's endpoints fail to load and serves on without them, which would be noticed
at the first 404 (0.32.0, ``plugins/__init__.py``, ``load_endpoint_plugins``).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil

import moescope_service
from moescope.errors import CommandError
from moescope.service import INSTALL
from moescope_service.errors import RefusedError
from moescope_service.settings import flag

_ENDPOINTS = "moescope_service.api"
_CUDA = "moescope_service.capture.cuda"
"""Needs Triton, which machines without an NVIDIA GPU may lack."""
_NOT_NEEDED = (
    "moescope_service.archive.",  # needs pyarrow: see `check_archive`
    "moescope_service.bundled_model.",  # makes the model; it is there
    "moescope_service.collector.__main__",  # runs the collector when it is imported
    "moescope_service.verify",  # a command of its own
)


def check_imports(*, with_endpoints: bool, with_cuda: bool = False) -> None:
    """Import every module of the service that vLLM's processes or the collector will import.

    Args:
        with_endpoints: Whether a server asks, not a script with a `vllm.LLM`.
        with_cuda: Whether workers run on NVIDIA GPUs.

    Raises:
        RefusedError: One cannot be imported; the message says why, and how to install what it
            lacks. Or vLLM would not find the endpoints.
    """
    left_out = [*_NOT_NEEDED]
    if not with_endpoints:
        left_out.append(_ENDPOINTS)
    if not with_cuda:
        left_out.append(_CUDA)
    for module in pkgutil.walk_packages(moescope_service.__path__, "moescope_service."):
        if not module.name.startswith(tuple(left_out)):
            _import(module.name)
    if with_endpoints and not importlib.metadata.entry_points(
        group="vllm.endpoint_plugins", name="moescope"
    ):
        raise RefusedError(
            "vLLM does not find moescope's endpoints: its entry points are not installed, or those "
            f"of an older version are; {INSTALL}"
        )


def check_archive(location: str | None) -> None:
    """Check that there is what an archive needs, where there is to be one.

    Args:
        location: Where it is; None: there is none.

    Raises:
        RefusedError: pyarrow is not installed, or the location is none.
    """
    if location is None:
        return
    try:
        from moescope.archive.store import check_location
    except ImportError as error:
        raise RefusedError(f"{flag('archive')}: {error}") from error
    try:
        check_location(location)
    except CommandError as error:
        raise RefusedError(f"{flag('archive')}: {error}") from error


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever vLLM would log and forget
        raise RefusedError(f"cannot import {name}: {error}; {INSTALL}") from error
